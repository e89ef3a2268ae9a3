"""Sampling answers, with an optional steering vector per row. One batch can carry many conditions."""

from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass
class Steer:
    """What to do to the residual stream after block `layer` (TransformerLens: `blocks.<layer>.hook_resid_post`).

    vectors: (rows, width) added to each row, at the last prompt token and every later one.
    """

    layer: int
    vectors: torch.Tensor


def decoder_blocks(model) -> torch.nn.ModuleList:
    """The decoder blocks of a Hugging Face causal LM (adapter or not), found by structure: the longest ModuleList."""
    lists = [m for m in model.modules() if isinstance(m, torch.nn.ModuleList)]
    if not lists:
        raise ValueError(f"{type(model).__name__} has no list of decoder blocks")
    return max(lists, key=len)


def prompts(tokenizer, questions: list[str], system: str | None = None) -> list[list[int]]:
    """Token ids of each question as a chat that awaits the answer."""
    head = [{"role": "system", "content": system}] if system else []
    texts = [tokenizer.apply_chat_template(head + [{"role": "user", "content": q}], tokenize=False,
                                           add_generation_prompt=True) for q in questions]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def sample(model, tokenizer, ids: list[list[int]], *, seed: int, max_new: int = 64, temperature: float = 1.0,
           steer: Steer | None = None, batch: int = 512, progress: str | None = None) -> list[str]:
    """One answer per row of `ids`. temperature 0 is greedy. Rows keep their order.

    Each row's steering vector is added from its last prompt token on; rows that finish leave the batch.
    """
    out: list = [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    generator = torch.Generator().manual_seed(seed)
    for start in tqdm(range(0, len(ids), batch), desc=progress, disable=progress is None, mininterval=2):
        rows = order[start:start + batch]
        vectors = steer.vectors[rows] if steer else None
        tokens = _decode(model, [ids[i] for i in rows], tokenizer, generator, max_new, temperature, steer and steer.layer, vectors)
        for i, t in zip(rows, tokens):
            out[i] = t
    return tokenizer.batch_decode(out, skip_special_tokens=True)


def _decode(model, ids, tokenizer, generator, max_new, temperature, layer, vectors):
    """Left-padded batch decoding with a key-value cache from which finished rows are dropped."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    width = max(map(len, ids))
    current = torch.tensor([[pad] * (width - len(r)) + r for r in ids])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids])
    done = [[] for _ in ids]
    alive = torch.arange(len(ids))
    cache = None

    def add(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        hidden[:, -1] += vectors[alive].to(hidden.dtype)

    handle = decoder_blocks(model)[layer].register_forward_hook(add) if vectors is not None else None
    try:
        for _ in range(max_new):
            position = mask.long().cumsum(-1) - 1
            result = model(input_ids=current, attention_mask=mask, position_ids=position[:, -current.shape[1]:].clamp(min=0),
                           past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache, logits = result.past_key_values, result.logits[:, -1].float()
            if temperature == 0:
                token = logits.argmax(-1)
            else:
                token = torch.multinomial(torch.softmax(logits / temperature, -1), 1, generator=generator).squeeze(-1)
            keep = token != end
            for row, t, k in zip(alive.tolist(), token.tolist(), keep.tolist()):
                if k:
                    done[row].append(t)
            if not keep.any():
                break
            if not keep.all():
                alive, token, mask = alive[keep], token[keep], mask[keep]
                cache.batch_select_indices(keep.nonzero().squeeze(-1))
            current = token[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    finally:
        if handle:
            handle.remove()
    return done
