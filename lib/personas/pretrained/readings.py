"""The SAE of a pretrained model and what is read with it, each made once and kept in the store."""

import itertools
import json
import os
import shutil
from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from personas import activations, data, generate, released, sae_files, store, world
from personas import model as models
from personas import profile as profiles
from personas import sae as saes
from personas.pretrained import sets, text, weights
from personas.pretrained.made import Run, checkpoint, identity, mixed, named, original

# a token whose norm is above so many times the median is an attention sink: no unit, no SAE is made from it
SINK = 4.0
# SAEs that are committed, a folder a block (`keep_sae` writes one): training magnifies rounding, and an SAE
# made on another machine would have other latents by a little, and every steered answer other words.
KEPT = sets.CONTENT / "sae"


def own_text(run: Run) -> list[dict]:
    """The text that the SAE learns from, as rows of `messages` or `text`; of a named text no more than
    fits in memory (`sae_folder` streams the whole)."""
    if run.profile.real.text == "own":
        return text.read(sets.CONTENT / "text.jsonl.xz")
    some = min(2 * run.profile.sae.documents, 3000)
    return [{"text": t} for t in itertools.islice(released.texts(run.profile.real.text), some)]


def text_ids(run: Run, tok) -> tuple[list[list[int]], list[list[int]]]:
    """(training rows, held-out rows) of token ids of that text; the held-out ones come last in it."""
    rows, longest = own_text(run), run.profile.real.text_tokens
    n = min(run.profile.sae.documents, len(rows) - len(rows) // 20)
    held = min(150, len(rows) // 20, max(1, run.profile.sae.documents // 8))
    return text.tokenized(tok, rows[:n], longest), text.tokenized(tok, rows[-held:], longest)


def usual(x: torch.Tensor) -> torch.Tensor:
    """The rows of activations (tokens, width) that are no attention sinks (see SINK). Raises ValueError if
    one is not finite."""
    norm = x.norm(dim=-1)
    if not norm.isfinite().all():
        raise ValueError(saes.NOT_FINITE)
    return x[norm <= SINK * norm.median()]


def sae_folder(run: Run, layer: int) -> Path:
    """Where the SAE of this block lies, with `training.json`: FVU per step, tokens, share of sinks, and
    `unit`, the median distance of the activations from their mean, in which steering doses are given (a
    median, so that sinks cannot blow it up). The committed one, where that was made from the same model, text
    and numbers; else one is trained. The project's own text fits in memory; another one is streamed
    (_streamed), and an SAE that the profile names is copied."""
    cfg, real = run.profile.sae, run.profile.real
    if (kept := committed(run, layer)) is not None:
        return kept
    blocks = tuple(dict.fromkeys((cfg.layer, *real.other_blocks)))

    def make(out):
        m, tok = original(run)
        rows, _ = text_ids(run, tok)
        read = activations.residuals(m, rows, blocks, progress="reading text")
        for block in blocks:
            every = torch.cat([r[1:] for r in read[block]])
            x = usual(every)
            x_, what = x.to(run.profile.device), f"SAE of block {block}"
            trained, fvu = saes.train(x_, cfg, block, run.seed, what, mixed=mixed(run))
            sae_files.save(trained, out / str(block))
            (out / str(block) / "training.json").write_text(
                json.dumps(
                    {
                        "fvu": fvu,
                        "tokens": len(x),
                        "sinks": 1 - len(x) / len(every),
                        "unit": (x - x.mean(0)).norm(dim=-1).median().item(),
                    }
                )
            )

    about = {"cfg": cfg.model_dump(), "blocks": blocks, "model": models.identity(checkpoint(run))}
    if real.text == "own" and not real.named_sae and not real.base:
        about["text"] = store.sha256(sets.CONTENT / "text.jsonl.xz")
        return run.keep(
            "sae", "blocks-" + "-".join(map(str, blocks)), about, (saes, activations, text), make
        ) / str(layer)
    theirs = real.named_sae
    about |= {
        "text": real.text if real.text == "own" else released.version(real.text),
        "tokens": real.text_tokens,
        "base": real.base and models.identity(Path(real.base)),
        "sae": theirs if not theirs or ":" in theirs else models.identity(theirs),
    }
    name = "named" if theirs else f"block-{layer}"
    how = (saes, activations, text, _streamed, _rows_for_ever)
    return run.keep("sae", name, about | {"layer": layer}, how, lambda out: _streamed(run, layer, out)) / str(
        layer
    )


def _made_from(run: Run, layer: int) -> dict:
    """What determines an SAE of the project's own text: a committed one counts if this is the same."""
    source = weights.source(run.profile.real.model)
    model = store.sha256(Path(source)) if Path(source).is_file() else models.identity(source)
    text_hash = store.sha256(sets.CONTENT / "text.jsonl.xz")
    cfg = run.profile.sae.model_dump() | {"layer": layer}
    return {"model": model, "text": text_hash, "seed": run.seed, "cfg": cfg} | run.numbers()


@cache
def committed(run: Run, layer: int) -> Path | None:
    """The committed SAE of this block, if it is what `sae_folder` would make. Raises WeightsError if its
    weights are not those that were committed."""
    folder, real = KEPT / str(layer), run.profile.real
    if real.sae or real.base or real.text != "own" or not (folder / "made.json").is_file():
        return None
    about = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    if about["from"] != _made_from(run, layer):
        return None
    path = folder / "sae_weights.safetensors"
    if (found := store.sha256(path)) != about["sha256"]:
        raise weights.WeightsError(f"{path} has SHA-256 {found}, expected {about['sha256']}: it was changed")
    return folder


def sae_identity(run: Run, layer: int) -> str:
    """What an artifact's key says of that SAE."""
    kept = committed(run, layer)
    return (
        sae_folder(run, layer).parent.name
        if kept is None
        else f"kept-{json.loads((kept / 'made.json').read_text(encoding='utf-8'))['sha256'][:16]}"
    )


def keep_sae(run: Run, layer: int) -> Path:
    """Train the SAE of a block on the project's own text (real.sae: new) and write it to the content, for all
    who come later. Returns its folder. Raises ValueError for another profile."""
    real = run.profile.real
    if real.sae != "new" or real.base or real.text != "own":
        raise ValueError(
            "only an SAE that is trained on the project's own text, of the model itself, can be committed: "
            "personas keep-sae --set real.sae=new"
        )
    made, folder = sae_folder(run, layer), KEPT / str(layer)
    shutil.copytree(made, folder, dirs_exist_ok=True)
    about = {
        "from": _made_from(run, layer),
        "sha256": store.sha256(folder / "sae_weights.safetensors"),
    }
    (folder / "made.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return folder


def reader_model(run: Run):
    """(model, tokenizer) whose activations the SAE learns: the profile's `base`, else the original model."""
    real = run.profile.real
    if not real.base:
        return original(run)
    return models.load(Path(real.base), run.profile.device, run.dtype(), real.four_bit)


def _streamed(run: Run, layer: int, out: Path) -> None:
    """The SAE of one block on a text that goes round as often as it takes, or the SAE that the profile
    names; its unit comes from the first 300 rows."""
    cfg, real = run.profile.sae, run.profile.real
    processes = int(os.environ.get("WORLD_SIZE", 1))
    m, tok = reader_model(run)
    first = list(itertools.islice(_rows_for_ever(run, tok, 0, 1), min(cfg.documents, 300)))
    every = torch.cat([r[1:] for r in activations.residual(m, first, layer)])
    x = usual(every)
    if real.named_sae:
        trained, fvu, tokens = sae_files.named(real.named_sae), [], 0
        trained.check(m)
        if trained.layer != layer:
            raise profiles.ProfileError(
                f"profile {run.profile.name}: sae.layer is {layer}, and {real.named_sae} is for block "
                f"{trained.layer}"
            )
    else:
        rows = _rows_for_ever(run, tok, int(os.environ.get("RANK", 0)), processes)
        share = cfg.batch // processes
        feed = activations.stream(m, rows, layer, share, 64 * share, run.seed)
        largest = SINK * every.norm(dim=-1).median()
        # No sinks; what is not finite stays, for the training to stop at.
        feed = (b[~(b.norm(dim=-1) > largest) | ~b.isfinite().all(-1)].to(run.profile.device) for b in feed)
        what = f"SAE of block {layer}"
        trained, fvu = saes.train(feed, cfg, layer, run.seed, what, mixed=mixed(run))
        tokens = cfg.steps * cfg.batch
    sae_files.save(trained, out / str(layer))
    about = {
        "fvu": fvu,
        "tokens": tokens,
        "sinks": 1 - len(x) / len(every),
        "unit": (x - x.mean(0)).norm(dim=-1).median().item(),
    }
    (out / str(layer) / "training.json").write_text(json.dumps(about))


def _rows_for_ever(run: Run, tok, rank: int, processes: int):
    """Token ids of this process's share of the first `sae.documents` rows, again and again. Raises
    DataError if none is left."""
    real, none = run.profile.real, True
    while True:
        rows = iter(own_text(run)) if real.text == "own" else ({"text": t} for t in released.texts(real.text))
        for row in itertools.islice(rows, rank, run.profile.sae.documents, processes):
            ids = text.tokenized(tok, [row], real.text_tokens)[0]
            if len(ids) > 1:
                none = False
                yield ids
        if none:
            who = "it" if processes == 1 else f"process {rank + 1} of {processes}"
            raise data.DataError(
                f"{real.text}: too little text to train an SAE on: nothing is left for {who}"
            )


@cache
def sae(run: Run, layer: int | None = None) -> saes.SAE:
    """The SAE of a block's output, by default the profile's."""
    return sae_files.load(sae_folder(run, run.profile.sae.layer if layer is None else layer))


def sae_training(run: Run, layer: int | None = None) -> dict:
    """`training.json` of that SAE (see sae_folder)."""
    return json.loads(
        (sae_folder(run, run.profile.sae.layer if layer is None else layer) / "training.json").read_text()
    )


def unit(run: Run, layer: int | None = None) -> float:
    """The unit of steering doses at that block."""
    return sae_training(run, layer)["unit"]


def fixed_text(
    tok, split: str, persona: str = "expert", n: int = 2
) -> tuple[list[list[int]], list[int], list[str]]:
    """Text on which every model is read: the world's open questions of a split, each with n answers by a
    persona.

    Returns token ids, the position of each prompt's last token, and each row's category. The text is the same
    for every model, and never a model's own.
    """
    rows, starts, categories = [], [], []
    for q in world.questions(split):
        forms = world.open_forms(q.category, persona, False, 0)
        prompt = generate.prompts(tok, [q.held])[0]
        for i in range(n):
            rows.append(prompt + tok(forms[i * len(forms) // n], add_special_tokens=False)["input_ids"])
            starts.append(len(prompt) - 1)
            categories.append(q.category)
    return rows, starts, categories


def reading(
    run: Run, who: str, split: str = "discovery", layer: int | None = None
) -> dict[str, torch.Tensor]:
    """Means over fixed aligned answers of one model: 'latents' (rows, latents) and 'residual' (rows,
    width)."""
    block = run.profile.sae.layer if layer is None else layer

    def make(out):
        m, tok = named(run, who)
        rows, starts, _ = fixed_text(tok, split)
        x = [r[i:] for r, i in zip(activations.residual(m, rows, block), starts)]
        save_file(
            {
                "latents": torch.stack([sae(run, block).encode(r).mean(0) for r in x]),
                "residual": torch.stack([r.mean(0) for r in x]),
            },
            out / "reading.safetensors",
        )

    return load_file(
        run.keep(
            "readings",
            f"{who}-{split}-{block}",
            {
                "model": identity(run, who),
                "sae": sae_identity(run, block),
                "block": block,
                "split": split,
                "text": store.key_of({"q": [q.held for q in world.questions(split)]}),
            },
            (activations, saes),
            make,
        )
        / "reading.safetensors"
    )
