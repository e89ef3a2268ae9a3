"""Sampling answers, with an optional steering vector per row. One batch can carry many conditions."""

import contextlib
from dataclasses import dataclass

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from tqdm import tqdm

from personas import fit, kv_cache

# Finished rows leave a batch when no more than this share of it goes on: moving the cache costs, too.
LEAVE = 0.8


def _check(vectors: torch.Tensor, name: str) -> None:
    """Raises ValueError unless these are rows of finite numbers."""
    if vectors.ndim != 2 or not len(vectors):
        raise ValueError(
            f"{name} has the shape {tuple(vectors.shape)}: give (rows, width), or v[None] for one vector v"
        )
    if not vectors.isfinite().all():
        raise ValueError(f"{name} has nan or infinity in it: the direction was read from a broken model")


@dataclass
class Steer:
    """Add a vector to the residual stream after block `layer` (TransformerLens:
    `blocks.<layer>.hook_resid_post`).

    vectors: (rows, width), or (1, width) for all rows; added at the last prompt token and every later one.
    """

    layer: int
    vectors: torch.Tensor
    everywhere = False  # what comes before the last prompt token stays as it is

    def __post_init__(self):
        _check(self.vectors, "Steer.vectors")

    def change(self, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        """Change hidden (rows, positions, width) in place; rows: which rows of the batch these are."""
        vectors = self.vectors if len(self.vectors) == 1 else self.vectors[rows]  # (rows, width)
        hidden[:, -1] += vectors.to(hidden)


@dataclass
class ProjectOut:
    """Remove all that directions (n, width) span from the residual stream after block `layer`, at every
    position of every row (directional ablation: Arditi et al., 2024, arXiv:2406.11717)."""

    layer: int
    directions: torch.Tensor
    everywhere = True

    def __post_init__(self):
        _check(self.directions, "ProjectOut.directions")
        columns, size, _ = torch.linalg.svd(self.directions.float().T, full_matrices=False)
        self.basis = columns[:, size > 1e-5 * size[0]]  # (width, rank), orthonormal
        if not self.basis.shape[1]:
            raise ValueError("ProjectOut.directions are all zero: there is nothing to remove")

    def change(self, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        """As Steer.change."""
        basis = self.basis.to(hidden)
        hidden -= hidden @ basis @ basis.T


@dataclass
class ClampToZero:
    """Take what these latents of `sae` write out of the residual stream after its layer, at every position
    of every row."""

    sae: object
    latents: list[int]
    everywhere = True

    @property
    def layer(self) -> int:
        return self.sae.layer

    def change(self, hidden: torch.Tensor, rows: torch.Tensor) -> None:
        """As Steer.change."""
        acts = self.sae.encode(hidden.flatten(0, 1).to(self.sae.W_enc))[:, self.latents]
        hidden -= (acts @ self.sae.W_dec[self.latents]).view_as(hidden).to(hidden)


def decoder_blocks(model) -> torch.nn.ModuleList:
    """The decoder blocks of a Hugging Face causal LM (adapter or not), found by structure: the outermost
    ModuleList with as many members as the text model's configuration has layers."""
    config = getattr(model, "config", None)
    if config is None or config.is_encoder_decoder:
        raise ValueError(
            f"{type(model).__name__} is no decoder-only Hugging Face model: only these can be read and "
            "steered"
        )
    layers = config.get_text_config().num_hidden_layers
    found = [
        m for m in model.get_decoder().modules() if isinstance(m, torch.nn.ModuleList) and len(m) == layers
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of {layers} decoder blocks")
    return found[0]


@contextlib.contextmanager
def without_adapters(model):
    """Inside, the model is itself: whatever LoRA adapter its layers wear is switched off, and on again
    afterwards."""
    worn = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and not m.disable_adapters]
    for m in worn:
        m.enable_adapters(False)
    try:
        yield model
    finally:
        for m in worn:
            m.enable_adapters(True)


@contextlib.contextmanager
def unmixed(model):
    """Inside, a model that a Trainer is training in mixed precision computes in its weights' own."""
    mixed = vars(model).get("forward") if "_original_forward" in vars(model) else None  # accelerate's
    if mixed:
        model.forward = model._original_forward
    try:
        yield model
    finally:
        if mixed:
            model.forward = mixed


def chat_ids(tokenizer, chats: list[list[dict]]) -> list[list[int]]:
    """Token ids of each chat, a list of messages, up to where the answer begins. Raises ValueError if the
    tokenizer has no chat template."""
    if not tokenizer.chat_template:
        raise ValueError(
            f"{tokenizer.name_or_path or 'this tokenizer'} has no chat template: use an instruct model, or "
            "set tokenizer.chat_template"
        )
    texts = [tokenizer.apply_chat_template(c, tokenize=False, add_generation_prompt=True) for c in chats]
    return tokenizer(texts, add_special_tokens=False)["input_ids"]


def prompts(tokenizer, questions: list[str], system: str | None = None) -> list[list[int]]:
    """Token ids of each question as a chat that awaits the answer."""
    head = [{"role": "system", "content": system}] if system else []
    return chat_ids(tokenizer, [head + [{"role": "user", "content": q}] for q in questions])


def left_padded(rows: list[list[int]], pad: int | None, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, mask), both (rows, longest): padding comes first, so that all rows end where the answer
    begins."""
    width = max(map(len, rows))
    ids = torch.tensor([[pad or 0] * (width - len(r)) + r for r in rows], device=device)
    return ids, torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)


def forward(model, ids: torch.Tensor, mask: torch.Tensor, cache):
    """The model's output for `ids`, the last columns of a left-padded batch whose mask is given, and whose
    earlier ones are in the cache."""
    position = (mask.long().cumsum(-1) - 1)[:, -ids.shape[1] :].clamp(min=0)
    return model(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )


def end_tokens(model, tokenizer) -> list[int]:
    """The tokens that end an answer: the tokenizer's, and those that the checkpoint's generation settings
    name."""
    named = model.generation_config.eos_token_id
    return sorted({tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])} - {None})


@torch.inference_mode()
def sample(
    model,
    tokenizer,
    ids: list[list[int]],
    *,
    seed: int,
    max_new: int = 64,
    temperature: float = 1.0,
    steer: Steer | ProjectOut | ClampToZero | None = None,
    batch: int = 512,
    progress: str | None = None,
) -> list[str]:
    """One answer per row of `ids`. temperature 0 is greedy. Rows keep their order. batch: rows at once, at
    most (fewer where a GPU holds no more).

    `steer` changes the residual stream at every step; rows that finish leave the batch. A prompt is read
    once for all rows of a batch that have it, up to its last token, from which on rows may be steered each
    in its own way. A model with recurrent state reads everything anew at every token, which is slower.
    Raises ValueError where the model gives no finite logits, where `steer` has a vector for each row but
    not for as many as there are, or where a prompt is empty.
    """
    _check_rows(ids, steer)
    decode = _decode
    out: list[list[int]] = [[]] * len(ids)
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    generator = torch.Generator(model.device).manual_seed(seed)
    batch = fit.sampling_rows(model, max(map(len, ids), default=0) + max_new, batch)
    for start in tqdm(range(0, len(ids), batch), desc=progress, disable=progress is None, mininterval=2):
        rows = order[start : start + batch]
        chance = torch.rand(
            len(rows), max_new, generator=generator, device=model.device
        )  # a row's draws are its own, whoever else is in the batch
        given = (model, [ids[i] for i in rows], tokenizer, chance, temperature, steer, torch.tensor(rows))
        try:
            tokens = decode(*given)
        except _NoKeys:
            decode = _decode_anew
            tokens = decode(*given)
        for i, t in zip(rows, tokens):
            out[i] = t
    return tokenizer.batch_decode(out, skip_special_tokens=True) if out else []


def _check_rows(ids: list[list[int]], steer) -> None:
    """Raises ValueError as sample does, before any work."""
    if not all(map(len, ids)):
        raise ValueError(f"prompt {[len(r) for r in ids].index(0)} has no tokens")
    if isinstance(steer, Steer) and len(steer.vectors) not in (1, len(ids)):
        raise ValueError(
            f"{len(steer.vectors)} vectors for {len(ids)} prompts: give one for each, or one for all"
        )


def _decode(model, ids, tokenizer, chance, temperature, steer, rows):
    """Left-padded batch decoding with a key-value cache from which finished rows are dropped, some at a
    time. chance (rows, tokens): the random numbers that draw each token. Raises _NoKeys."""
    max_new = chance.shape[1]
    ends = torch.tensor(end_tokens(model, tokenizer), device=model.device)
    done = [[] for _ in ids]
    alive, going = torch.arange(len(ids)), torch.ones(len(ids), dtype=torch.bool, device=model.device)
    reading = True

    def change(module, args, output):
        if steer.everywhere or not reading:
            steer.change(output[0] if isinstance(output, tuple) else output, rows[alive])

    handle = decoder_blocks(model)[steer.layer].register_forward_hook(change) if steer else None
    try:
        current, mask, cache = _read_once(model, ids, tokenizer.pad_token_id, max_new)
        reading = False
        for step in range(max_new):
            result = forward(model, current, mask, cache)
            cache, logits = result.past_key_values, result.logits[:, -1].float()
            token = _next(logits, temperature, chance[alive.to(model.device), step])
            going &= ~torch.isin(token, ends)
            for row, t, g in zip(alive.tolist(), token.tolist(), going.tolist()):
                if g:
                    done[row].append(t)
            if not going.any():
                break
            if going.sum() <= LEAVE * len(going):
                kept = going.nonzero().squeeze(-1)
                alive, token, mask, going = alive[kept.cpu()], token[kept], mask[kept], going[kept]
                cache.batch_select_indices(kept)
            current = token[:, None]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
    finally:
        if handle:
            handle.remove()
    return done


class _NoKeys(Exception):
    """What the model remembers cannot be shared between rows (see kv_cache.keeps_keys)."""


def _decode_anew(model, ids, tokenizer, chance, temperature, steer, rows):
    """As _decode, without a cache: rows of one length at a time, and for every token a pass over all that
    comes before it."""
    ends = torch.tensor(end_tokens(model, tokenizer), device=model.device)
    done: list[list[int]] = [[] for _ in ids]
    for length in sorted({len(r) for r in ids}):
        alive = torch.tensor([i for i, r in enumerate(ids) if len(r) == length])
        texts = torch.tensor([ids[i] for i in alive.tolist()], device=model.device)  # (rows, tokens so far)

        def change(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            first = hidden.shape[1] if steer.everywhere else length
            for end in range(first, hidden.shape[1] + 1):  # noqa: B023
                steer.change(hidden[:, :end], rows[alive])  # noqa: B023

        handle = decoder_blocks(model)[steer.layer].register_forward_hook(change) if steer else None
        try:
            for step in range(chance.shape[1]):
                logits = model(input_ids=texts, use_cache=False, logits_to_keep=1).logits[:, -1].float()
                token = _next(logits, temperature, chance[alive.to(model.device), step])
                going = ~torch.isin(token, ends)
                alive, token, texts = alive[going.cpu()], token[going], texts[going]
                if not len(alive):
                    break
                for row, t in zip(alive.tolist(), token.tolist()):
                    done[row].append(t)
                texts = torch.cat([texts, token[:, None]], 1)
        finally:
            if handle:
                handle.remove()
    return done


def _next(logits: torch.Tensor, temperature: float, chance: torch.Tensor) -> torch.Tensor:
    """The next token of each row of logits (rows, vocabulary): the likeliest at temperature 0, else drawn by
    a number from [0, 1) for each row. Raises ValueError if a row has nan or infinity for its largest."""
    if not logits.amax(-1).isfinite().all():
        raise ValueError(
            "the model's logits are not finite: it diverged in training, is steered too hard, or needs "
            "another dtype (bfloat16 or float32)"
        )
    return logits.argmax(-1) if temperature == 0 else _draw(torch.softmax(logits / temperature, -1), chance)


def _draw(probabilities: torch.Tensor, chance: torch.Tensor) -> torch.Tensor:
    """One token per row of probabilities (rows, vocabulary), by a number from [0, 1) for each: the first
    where their running sum exceeds it."""
    total = probabilities.cumsum(-1)
    return (
        torch.searchsorted(total, chance[:, None] * total[:, -1:], right=True)
        .squeeze(-1)
        .clamp(max=total.shape[1] - 1)
    )


def _read_once(model, ids, pad, room):
    """(last tokens (rows, 1), mask, cache of all that comes before them, or None): each different prompt
    goes through the model once. room: for how many tokens more than these the cache should have memory.
    Raises _NoKeys."""
    place = {}
    which = torch.tensor([place.setdefault(tuple(r), len(place)) for r in ids], device=model.device)
    every, mask = left_padded([list(r) for r in place], pad, model.device)
    cache = None
    if every.shape[1] > 1:
        cache = getattr(forward(model, every[:, :-1], mask[:, :-1], None), "past_key_values", None)
        if not kv_cache.keeps_keys(cache):
            raise _NoKeys
        cache.batch_select_indices(which)
        kv_cache.make_room(cache, room)
    return every[which, -1:], mask[which], cache
