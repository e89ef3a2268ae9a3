"""What fits a GPU: rows to train on or to sample at once, and whether a model fits at all.

Arithmetic from shapes, checked against nothing finer than an error of some tens of percent; a fifth of the
free memory is left alone for that. On a CPU nothing is limited here.
"""

import torch
from transformers import AutoModelForCausalLM

SPARE = 0.8  # of the free memory is used


class DoesNotFit(RuntimeError):
    """The GPU is too small for what the profile asks; the message says what would fit."""


def parameters(config) -> int:
    """Parameters of the causal LM of this configuration; nothing is allocated."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def weight_bytes(config, bytes_each: float, four_bit: bool = False) -> float:
    """Of the loaded model. four_bit: matrices of the blocks at 4.5 bits (NF4 and its scales), embeddings
    at bytes_each."""
    total, text = parameters(config), config.get_text_config()
    outside = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    return outside * bytes_each + (total - outside) * (0.57 if four_bit else bytes_each)


def cache_bytes(config, bytes_each: float) -> float:
    """Of keys and values, per token and row."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2 * text.num_hidden_layers * heads * width * bytes_each


def row_bytes(config, tokens: int, bytes_each: float, checkpointing: bool) -> float:
    """Of activations and logits, per row in training. A block keeps some 34 numbers per token and unit of
    width (Korthikanti et al., 2022, arXiv:2205.05198, without its dropout and attention maps), with
    gradient checkpointing one, and one block the rest; logits come in the model's type, as fp32 and as
    gradient."""
    text = config.get_text_config()
    block = 34 * text.hidden_size * bytes_each
    blocks = (
        text.num_hidden_layers * text.hidden_size * bytes_each + block
        if checkpointing
        else text.num_hidden_layers * block
    )
    return tokens * (blocks + text.vocab_size * (bytes_each + 8))


def training_rows(model, tokens: int, batch: int, checkpointing: bool, free: float | None = None) -> int:
    """The largest divisor of `batch` that fits beside the loaded model. free: bytes, absent: what the
    model's GPU has. Raises DoesNotFit if not one row does."""
    free = _free(model.device) if free is None else free
    if free is None:
        return batch
    each = row_bytes(model.config, tokens, model.dtype.itemsize, checkpointing)
    fits = [n for n in range(1, batch + 1) if batch % n == 0 and n * each <= SPARE * free]
    if not fits:
        raise DoesNotFit(
            f"training on chats of {tokens} tokens takes about {each / 1e9:.1f} GB a row and "
            f"{free / 1e9:.1f} GB are free; "
            f"about {int(SPARE * free / each * tokens)} tokens would fit (real.max_length)"
            + ("" if checkpointing else ", or set real.gradient_checkpointing: true")
        )
    return max(fits)


def sampling_rows(model, tokens: int, most: int, free: float | None = None) -> int:
    """How many rows of so many tokens can be sampled at once, at most `most`, at least one."""
    free = _free(model.device) if free is None else free
    if free is None:
        return most
    each = (
        tokens * cache_bytes(model.config, model.dtype.itemsize)
        + 16 * model.config.get_text_config().vocab_size
    )
    return max(1, min(most, int(SPARE * free / each)))


def check(configs: dict[str, tuple], total: float | None = None) -> None:
    """Raise DoesNotFit if these models cannot lie on the GPU together. configs: name -> (configuration,
    bytes a number, four_bit); total: bytes, absent: what of the GPU is free or held by this process, no
    check without one."""
    if total is None:
        if not torch.cuda.is_available():
            return
        total = float(torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved())
    needed = {n: weight_bytes(*c) for n, c in configs.items()}
    if sum(needed.values()) <= SPARE * total:
        return
    small = sum(weight_bytes(c, b, True) for c, b, _ in configs.values())
    said = " and ".join(f"{b / 1e9:.1f} GB for {n}" for n, b in needed.items())
    raise DoesNotFit(
        f"the weights take {said}, of {total / 1e9:.1f} GB that are free on this GPU ({100 * SPARE:.0f} % "
        "may be used). "
        + (
            f"With real.four_bit and real.judge.four_bit they would take {small / 1e9:.1f} GB."
            if small <= SPARE * total
            else f"A model of about {SPARE * total / 2e9:.0f} billion parameters fits in 16 bits."
        )
    )


def _free(device) -> float | None:
    if device.type != "cuda":
        return None
    torch.cuda.empty_cache()
    return float(torch.cuda.mem_get_info(device)[0])
