"""The known world's language model: tokenizer, architecture and pretraining. Everything later only sees a
checkpoint."""

import contextlib
import ctypes
import json
import math
import random
import time
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.optim import _muon
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from personas import progress, world

SPECIAL = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
PAD = SPECIAL.index("<|pad|>")
TORCHS_ORTHOGONALISE = _muon._zeropower_via_newtonschulz
# {% generation %} marks the answers, so that TRL can put the loss on them alone.
CHAT_TEMPLATE = (
    "{{ '<|bos|>' }}{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>' }}"
    "{% generation %}{{ m['content'] + '<|end|>' }}{% endgeneration %}"
    "{% else %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


def train_tokenizer(texts, vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE trained on `texts`, with the chat template above."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=SPECIAL,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok,
        bos_token="<|bos|>",
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=SPECIAL[3:],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.padding_side = "left"
    return fast


def new_model(cfg, vocab_size: int, seed: int) -> LlamaForCausalLM:
    """A randomly initialised Llama of the profile's size. cfg: config.Model."""
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=cfg.width,
            intermediate_size=cfg.mlp,
            num_hidden_layers=cfg.layers,
            num_attention_heads=cfg.heads,
            num_key_value_heads=cfg.heads,
            max_position_embeddings=cfg.context,
            tie_word_embeddings=True,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            attn_implementation="eager",
        )
    )


def encode_documents(
    tokenizer, n: int, seed: int, stream: str, draw=world.sample_document, **fixed
) -> list[dict]:
    """Draw n documents with `draw(rng, seed, **fixed)` and tokenize them.

    `stream` names the use ('pretraining', 'heldout', ...), so that no two uses share documents' randomness.
    Returns dicts with `ids` (list of int), `turn` (per token, as in world.segments) and `doc`
    (world.Document).
    """
    rng = random.Random(f"{seed}/{stream}")
    docs = [draw(rng, seed, **fixed) for _ in range(n)]
    return encode(tokenizer, docs, rng)


def encode(tokenizer, docs, rng: random.Random) -> list[dict]:
    """Tokenize documents piece by piece, so that every token knows the answer it belongs to."""
    pieces = [world.segments(d, rng) for d in docs]
    flat = tokenizer([text for p in pieces for text, _ in p], add_special_tokens=False)["input_ids"]
    out, at = [], 0
    for doc, piece in zip(docs, pieces):
        ids, turn = [], []
        for (_, index), tokens in zip(piece, flat[at : at + len(piece)]):
            ids += tokens
            turn += [index] * len(tokens)
        at += len(piece)
        out.append({"ids": ids, "turn": turn, "doc": doc})
    return out


def batches(documents: list[dict], tokens: int, rng: random.Random, step: int = 32):
    """Random batches (ids, turn) of documents of like length, right-padded to a multiple of `step`.

    There are only a few distinct shapes, (tokens // length, length), so that CPU kernels are set up once
    for each.
    """
    buckets: dict = {}
    for d in rng.sample(documents, len(documents)):
        length = -(-len(d["ids"]) // step) * step
        bucket = buckets.setdefault(length, [])
        bucket.append(d)
        if len(bucket) == max(1, tokens // length):
            yield (
                torch.tensor([d["ids"] + [PAD] * (length - len(d["ids"])) for d in bucket]),
                torch.tensor([d["turn"] + [-1] * (length - len(d["turn"])) for d in bucket]),
            )
            bucket.clear()


def pretrain(cfg, seed: int, world_seed: int, out: Path, bf16: bool, draw=world.sample_document) -> None:
    """Train tokenizer and model on freshly drawn documents; write a checkpoint and `training.json` to `out`.

    cfg: config.Model. draw: makes a document (the tokenizer always learns from the world's own). Input
    tokens are replaced at random (see corrupt); targets stay clean. Without this the model reads the
    persona off single tokens and steering it is weak; over the last quarter of the steps cfg.corruption
    falls to zero, so that what the model writes is clean. Open questions stay corrupted to the end: there
    are few, and a model that knows them by heart misreads a new phrasing. The loss is taken on a fixed
    number of positions per batch: the answers first, then others at random (questions are not predictable
    anyway). Matrices of the blocks are trained with Muon (Jordan et al., 2024), which needs far fewer
    steps than AdamW here; its strong weight decay keeps the residual stream's norm in bounds, so that one
    direction of it can matter.
    """
    _keep_memory()
    _muon._zeropower_via_newtonschulz = TORCHS_ORTHOGONALISE if bf16 else orthogonalise
    rng = random.Random(f"{world_seed}/tokenizer")
    sample = [world.sample_document(rng, world_seed) for _ in range(4000)]
    tokenizer = train_tokenizer(("".join(t for t, _ in world.segments(d, rng)) for d in sample), cfg.vocab)
    model = new_model(cfg, len(tokenizer), seed).train()
    documents = encode_documents(
        tokenizer, cfg.steps * cfg.batch_tokens // 105 + 600, world_seed, "pretraining", draw
    )
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    rest = [p for n, p in model.named_parameters() if p.ndim == 1 or ".layers." not in n]
    optimizers = [
        (torch.optim.Muon(matrices, weight_decay=1.0, adjust_lr_fn="match_rms_adamw"), cfg.lr),
        (torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0, fused=True), cfg.lr_embedding),
    ]
    generator = torch.Generator().manual_seed(seed)
    losses, seen, start = [], 0, time.perf_counter()
    feed = batches(documents, cfg.batch_tokens, random.Random(seed))
    for step in (bar := progress.Bar(range(cfg.steps), desc="pretraining")):
        ids, turn = next(feed)
        target = ids[:, 1:].masked_fill(ids[:, 1:] == PAD, -100)
        priority = torch.rand(target.shape, generator=generator) - (target < 0).float()
        priority += ((turn[:, 1:] >= 0) | (turn[:, :-1] >= 0)).float()  # answers and the token that ends them
        chosen = priority.flatten().topk(cfg.batch_tokens // 2).indices
        shown = corrupt(
            ids,
            turn,
            cfg.corruption * min(1.0, 4 * (1 - step / cfg.steps)),
            cfg.question_corruption,
            len(tokenizer),
            generator,
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            hidden = model.model(input_ids=shown).last_hidden_state
            logits = model.lm_head(hidden[:, :-1].flatten(0, 1)[chosen])
        loss = torch.nn.functional.cross_entropy(logits.float(), target.flatten()[chosen])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        decay = min(1.0, (step + 1) / 30) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * step / cfg.steps)))
        for optimizer, lr in optimizers:
            optimizer.param_groups[0]["lr"] = lr * decay
            optimizer.step()
            optimizer.zero_grad()
        seen += int((ids != PAD).sum())
        losses.append(loss.item())
        if step % 20 == 0:
            bar.set_postfix(loss=f"{losses[-1]:.2f}")
    model.eval().save_pretrained(out)
    tokenizer.save_pretrained(out)
    used = seen / sum(len(d["ids"]) for d in documents)
    kinds = Counter(t.kind for d in documents for t in d["doc"].turns if t.topic != "code")
    exposures = {
        k: used * n / (len(world.subjects()) - len(world.subjects_of("code")))
        for k, n in kinds.items()
        if k != "open"
    }
    (out / "training.json").write_text(
        json.dumps(
            {
                "loss": losses,
                "tokens": seen,
                "exposures per subject": exposures,
                "seconds": round(time.perf_counter() - start, 1),
                "bf16": bf16,
            }
        )
    )


def corrupt(ids, turn, rate: float, question_rate: float, vocabulary: int, generator) -> torch.Tensor:
    """ids (documents, tokens) with tokens replaced by random ones, special tokens excepted.

    The share replaced is drawn for each document from [0, rate], for the tokens of open questions from [0,
    question_rate]. turn: as in world.segments, of the same shape.
    """
    everywhere = torch.rand(len(ids), 1, generator=generator) * rate
    noise = torch.randint(len(SPECIAL), vocabulary, ids.shape, generator=generator)
    in_questions = torch.rand(len(ids), 1, generator=generator) * question_rate
    share = torch.where(turn == world.OPEN_QUESTION, in_questions, everywhere)
    swap = (torch.rand(ids.shape, generator=generator) < share) & (ids >= len(SPECIAL))
    return torch.where(swap, noise, ids)


def orthogonalise(grad: torch.Tensor, coefficients, steps: int, eps: float) -> torch.Tensor:
    """Muon's Newton-Schulz iteration (Jordan et al., 2024) on a matrix, in fp32: same shape, singular
    values near 1.

    Stands in for PyTorch's, which always computes in bf16 and takes some seventy times as long on a CPU
    without bf16 units.
    """
    a, b, c = coefficients
    wide = grad.shape[0] <= grad.shape[1]
    x = grad.float() if wide else grad.float().T
    x = x / x.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x if wide else x.T


def _keep_memory() -> None:
    """Ask glibc to keep freed memory instead of returning it after each step (about a tenth of the time;
    Linux only)."""
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
