"""Base models of the known world that are committed, so that nobody has to pretrain them: a folder each,
weights in bf16, with what determined them and their hash. `personas keep-base-models` makes them anew."""

import functools
import json
import shutil
from pathlib import Path

import torch

from personas import model, store
from personas.pretrained import weights

FOLDER = Path(__file__).parent / "committed"
FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def committed(about: dict) -> Path | None:
    """The committed checkpoint of which `about` (numbers, seeds, world) is true; None if there is none.
    Raises weights.WeightsError if its weights are not those that were committed."""
    for path in sorted(FOLDER.glob("*/made.json")):
        made = json.loads(path.read_text(encoding="utf-8"))
        if made["from"] == json.loads(json.dumps(about)):
            _check(path.parent, made["sha256"])
            return path.parent
    return None


@functools.cache
def _check(folder: Path, sha256: str) -> None:
    found = store.sha256(folder / "model.safetensors")
    if found != sha256:
        raise weights.WeightsError(
            f"{folder / 'model.safetensors'} is not the base model that was committed (SHA-256 "
            f"{found[:12]}, not {sha256[:12]}): get it again (`git checkout`), "
            "or remove the folder and pretrain one"
        )


def keep(made: Path, about: dict, name: str) -> Path:
    """Put a pretrained checkpoint among the committed ones, its weights rounded to bf16. made: its folder,
    with `training.json`; about: see `committed`. Returns the new folder."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    net, _ = model.load(made)
    net.to(torch.bfloat16).save_pretrained(folder)
    for file in FILES:
        if (made / file).exists():
            shutil.copy(made / file, folder / file)
    training = json.loads((made / "training.json").read_text())
    training["loss"] = [round(x, 4) for x in training["loss"]]
    (folder / "training.json").write_text(json.dumps(training) + "\n")
    about = {"from": about, "sha256": store.sha256(folder / "model.safetensors")}
    (folder / "made.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return folder
