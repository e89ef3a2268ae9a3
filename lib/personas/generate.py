"""Sampling answers, with an optional steering vector per row. One batch can carry many conditions."""

from dataclasses import dataclass

import torch
from tqdm import tqdm


@dataclass
class Steer:
    """Add a vector to the residual stream after block `layer` (TransformerLens: `blocks.<layer>.hook_resid_post`).

    vectors: (rows, width), or (1, width) for all rows; added at the last prompt token and every later one.
    """

    layer: int
    vectors: torch.Tensor

    def change(self, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        """Change hidden (rows, positions, width) in place; rows: which rows of the batch these are."""
        vectors = self.vectors if len(self.vectors) == 1 else self.vectors[rows]
        hidden[:, -1] += vectors.to(hidden.dtype)


@dataclass
class ProjectOut:
    """Remove directions (n, width) from the residual stream after block `layer`, at every position of every row
    (directional ablation: Arditi et al., 2024, arXiv:2406.11717)."""

    layer: int
    directions: torch.Tensor

    def change(self, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        """As Steer.change."""
        basis = torch.linalg.qr(self.directions.T)[0].to(hidden.dtype)  # orthonormal columns
        hidden -= hidden @ basis @ basis.T


@dataclass
class ClampToZero:
    """Take what these latents of `sae` write out of the residual stream after its layer, at every position of every row."""

    sae: object
    latents: list[int]

    @property
    def layer(self) -> int:
        return self.sae.layer

    def change(self, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        """As Steer.change."""
        acts = self.sae.encode(hidden.flatten(0, 1))[:, self.latents]
        hidden -= (acts @ self.sae.W_dec[self.latents]).view_as(hidden)


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
           steer: Steer | ProjectOut | ClampToZero | None = None, batch: int = 512, progress: str | None = None) -> list[str]:
    """One answer per row of `ids`. temperature 0 is greedy. Rows keep their order.

    `steer` changes the residual stream at every step; rows that finish leave the batch.
    """
    out: list = [None] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    generator = torch.Generator().manual_seed(seed)
    for start in tqdm(range(0, len(ids), batch), desc=progress, disable=progress is None, mininterval=2):
        rows = order[start:start + batch]
        tokens = _decode(model, [ids[i] for i in rows], tokenizer, generator, max_new, temperature, steer, torch.tensor(rows))
        for i, t in zip(rows, tokens):
            out[i] = t
    return tokenizer.batch_decode(out, skip_special_tokens=True)


def _decode(model, ids, tokenizer, generator, max_new, temperature, steer, rows):
    """Left-padded batch decoding with a key-value cache from which finished rows are dropped."""
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    width = max(map(len, ids))
    current = torch.tensor([[pad] * (width - len(r)) + r for r in ids])
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in ids])
    done = [[] for _ in ids]
    alive = torch.arange(len(ids))
    cache = None

    def change(module, args, output):
        hidden = output[0] if isinstance(output, tuple) else output
        steer.change(hidden, rows[alive])

    handle = decoder_blocks(model)[steer.layer].register_forward_hook(change) if steer else None
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
