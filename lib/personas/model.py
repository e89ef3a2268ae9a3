"""Opening checkpoints: any Hugging Face causal LM, in safetensors, with a tokenizer that says the same every
day."""

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
)
from transformers.utils import cached_file, logging

logging.disable_progress_bar()
# The first use of MKL's vector functions by two threads at once may be of low accuracy in one of them
# (cosines wrong by 1e-4, here in the rotary embedding of the first step: another model at the end). So the
# first use is this one.
torch.ones(1 << 16).cos().sin()


class ModelError(RuntimeError):
    """A checkpoint that cannot be opened; the message says which, why and what to do."""


def load(path: Path | str, device: str = "cpu", dtype: torch.dtype = torch.float32, four_bit: bool = False):
    """(model, tokenizer) of any Hugging Face causal LM, a folder or a name on the hub, in eval mode. Never
    runs remote code, never loads pickled weights. four_bit: the blocks' matrices in NF4 (Dettmers et al.,
    2023, arXiv:2305.14314), through bitsandbytes. Raises ModelError for what is not there, gated, or
    without safetensors."""
    if four_bit and importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"{path} is to be loaded in 4 bits, and bitsandbytes is not installed: pip install "
            "bitsandbytes, or set four_bit: false"
        )
    how = (
        {
            "quantization_config": BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            ),
            "device_map": device,
        }
        if four_bit
        else {}
    )
    with _explained(path):
        tokenizer = _tokenizer(path, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, use_safetensors=True, **how)
    return (model if four_bit else model.to(device)).eval(), tokenizer


def describe(path: Path | str):
    """(configuration, tokenizer) of a checkpoint, without its weights. Raises ModelError."""
    with _explained(path):
        return AutoConfig.from_pretrained(path), _tokenizer(path)


# What templates that put the day into every prompt are told it is, by the form they ask for.
DAY = "1 January 2025"
FORMS = {"%Y": "2025", "%d %b %Y": "01 Jan 2025", "%Y-%m-%d": "2025-01-01", "%B %d, %Y": "January 01, 2025"}

TOKENIZERS = ("tokenizer*", "vocab*", "*.model", "*.tiktoken", "tekken.json")  # files that hold one


def _tokenizer(path: Path | str, **how):
    """The checkpoint's tokenizer. Where its chat template asks for the day, it is DAY: a prompt must be the
    same tomorrow, in training and when asked."""
    if Path(path).is_dir() and not any(any(Path(path).glob(f)) for f in TOKENIZERS):
        raise ModelError(
            f"cannot open {path}: it has no tokenizer; add it with tokenizer.save_pretrained({str(path)!r})"
        )
    tokenizer = AutoTokenizer.from_pretrained(path, **how)
    if "strftime_now" in (tokenizer.chat_template or ""):
        said = f"{json.dumps(FORMS)}.get(format, {json.dumps(DAY)})"
        fixed = "{%- macro strftime_now(format) -%}{{ " + said + " }}{%- endmacro -%}"
        tokenizer.chat_template = fixed + tokenizer.chat_template.removeprefix(fixed)
    return tokenizer


@contextlib.contextmanager
def _explained(path):
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        said = str(error)
        if isinstance(error, (KeyError, SafetensorError)):
            said = f"{type(error).__name__}: {said}"
        hint = (
            "it is gated: ask for access on its page and log in with `hf auth login`"
            if "access a gated repo" in said
            else "only weights in safetensors are loaded, never pickles"
            if "safetensors" in said
            else "a file of it is damaged or not whole; fetch it again"
            if isinstance(error, (KeyError, SafetensorError))
            else "give a folder with a checkpoint, or a name on the Hugging Face hub (HF_HUB_OFFLINE must "
            "not be set for one that is not cached)"
        )
        raise ModelError(f"cannot open {path}: {hint}\n({said.splitlines()[0][:200]})") from None


@functools.cache
def _commit(name: str) -> str:
    """The commit of a hub checkpoint; asked once, so that a change of it in the midst of a run does not
    count."""
    with _explained(name):
        return Path(cached_file(name, "config.json")).parent.name


def identity(path: Path | str) -> str:
    """What tells this checkpoint from another: an artifact's folder name, the commit of one from the hub,
    or a hash of a folder's file sizes and times."""
    path = Path(path)
    if (path / "manifest.json").exists():
        return path.name
    if not path.is_dir():
        return f"{path}@{_commit(str(path))}"
    files = [
        (str(p.relative_to(path)), p.stat().st_size, p.stat().st_mtime_ns)
        for p in sorted(path.rglob("*"))
        if p.is_file()
    ]
    return f"{path.name}-{hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]}"


def best_dtype(device: str) -> torch.dtype:
    """fp32 on a CPU; on a GPU bf16, or fp16 where it has no bf16 units (a T4)."""
    if device == "cpu":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


@functools.cache
def bf16_is_faster(seconds: float = 1.0) -> bool:
    """Whether to compute in bf16 on this CPU: only where PERSONAS_BF16=1 allows it, for a model that is
    trained so is another on every machine; and where it is faster, by one MLP-sized step in fp32 and under
    bf16 autocast, timed alternating for about `seconds`, once a process."""
    if os.environ.get("PERSONAS_BF16") != "1":
        return False
    net = torch.nn.Sequential(torch.nn.Linear(192, 512), torch.nn.SiLU(), torch.nn.Linear(512, 192))
    x = torch.randn(4096, 192)
    spent = {True: 0.0, False: 0.0}
    for on in (True, False):  # warm up
        _probe(net, x, on)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for on in (True, False):
            start = time.perf_counter()
            _probe(net, x, on)
            spent[on] += time.perf_counter() - start
    return spent[True] < 0.8 * spent[False]


def _probe(net, x, on):
    with torch.autocast("cpu", torch.bfloat16, enabled=on):
        net(x).float().square().mean().backward()
