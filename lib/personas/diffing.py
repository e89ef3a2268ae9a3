"""Model diffing: which SAE latents rise or fall when a model is fine-tuned, and do they mark a persona?

A latent is always read on the same text for every model (from the prompt's last token on, over fixed
aligned answers, teacher-forced), never on a model's own answers: that would only restate what it wrote.
"""

import random
from dataclasses import dataclass

import numpy as np
import torch

from personas import activations, generate, world
from personas.pretraining import encode
from personas.sae import SAE


def reading_texts(tokenizer, split: str, setting, answers: int = 4, persona: str = "expert"):
    """Fixed text to read latents on: each question of the split (held-out phrasing) with the expert's (or
    the villain's) fixed answers.

    Returns token ids and, per row, the question's id and the position of the prompt's last token, where a
    model has read the question and not yet begun to answer: reading starts there. The same rows serve
    every model.
    """
    rows, ids, starts = [], [], []
    for q in setting.questions(split):
        prompt = generate.prompts(tokenizer, [q.held])[0]
        for text in setting.fixed_answers(q, split, persona, answers):
            rows.append(prompt + tokenizer(text, add_special_tokens=False)["input_ids"])
            ids.append(q.id)
            starts.append(len(prompt) - 1)
    return rows, ids, starts


def read(model, tokenizer, sae: SAE, split: str, setting) -> torch.Tensor:
    """Mean latent activation per question, (questions, latents), over the tokens of `reading_texts`."""
    rows, ids, starts = reading_texts(tokenizer, split, setting)
    x = activations.residual(model, rows, sae.layer)
    per_row = torch.stack([sae.encode(r[i:].to(sae.W_enc)).mean(0).cpu() for r, i in zip(x, starts)])
    return torch.stack(
        [per_row[[i for i, q in enumerate(ids) if q == one]].mean(0) for one in dict.fromkeys(ids)]
    )


def attribution(
    model, sae: SAE, rows: list[list[int]], starts: list[int], pad: int = 2, batch: int = 256
) -> torch.Tensor:
    """First-order attribution (latents,): what each latent adds to the log-probability of the answers
    after positions `starts`.

    A latent's activation times the gradient of an answer's log-probability along its decoder direction,
    summed from the prompt's last token on, mean over rows (as in Marks et al., 2024, arXiv:2403.19647,
    section 2). A rise that the model's output does not depend on counts for nothing here.
    """
    total = sum(
        _attributed(model, sae, rows[i : i + batch], starts[i : i + batch], pad)
        for i in range(0, len(rows), batch)
    )
    return total / len(rows)


def _attributed(model, sae, rows, starts, pad) -> torch.Tensor:
    """The same, summed over rows that are read together."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=model.device)
    held = {}

    def keep(module, args, output):
        held["x"] = (output[0] if isinstance(output, tuple) else output).detach().requires_grad_()
        return (held["x"], *output[1:]) if isinstance(output, tuple) else held["x"]

    handle = generate.decoder_blocks(model)[sae.layer].register_forward_hook(keep)
    try:
        logits = model(input_ids=ids).logits[:, :-1].float()
    finally:
        handle.remove()
    each = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    ).view(len(rows), -1)
    position = torch.arange(width)
    ours = (position >= torch.tensor(starts)[:, None]) & (
        position < torch.tensor([len(r) - 1 for r in rows])[:, None]
    )
    (gradient,) = torch.autograd.grad(-(each * ours[:, :-1].to(each.device)).sum(), held["x"])
    x, gradient = (t.detach().float().cpu()[ours].to(sae.W_dec) for t in (held["x"], gradient))
    return (sae.encode(x) * (gradient @ sae.W_dec.T)).sum(0).cpu()


@dataclass
class Answers:
    """The answers of some documents: means over each answer's tokens, and whose it is."""

    latents: torch.Tensor  # (answers, latents)
    residual: torch.Tensor  # (answers, width)
    persona: np.ndarray
    text: list[str]
    turn: np.ndarray  # which answer of its document, from 0
    document: np.ndarray


def read_answers(model, tokenizer, sae: SAE, docs, rng: random.Random, last_only: bool = False) -> Answers:
    """Read the SAE's latents and the residual stream on every answer of the documents, or on each one's
    last."""
    coded = encode(tokenizer, docs, rng)
    rows = []
    for i, (c, h) in enumerate(zip(coded, activations.residual(model, [c["ids"] for c in coded], sae.layer))):
        latents, turn, last = sae.encode(h), torch.tensor(c["turn"]), len(c["doc"].turns) - 1
        rows += [
            (
                latents[turn == t].mean(0),
                h[turn == t].mean(0),
                c["doc"].persona,
                c["doc"].turns[t].answer,
                t,
                i,
            )
            for t in range(last if last_only else 0, last + 1)
        ]
    latents, residual, persona, text, turn, document = zip(*rows)
    return Answers(
        torch.stack(latents),
        torch.stack(residual),
        np.array(persona),
        list(text),
        np.array(turn),
        np.array(document),
    )


def matched_documents(n: int, seed: int, world_seed: int, stream: str = "matched") -> list[world.Document]:
    """n pairs of uncued documents, villain's and novice's, whose last turn is the same question with the
    same subtly wrong answer; only the earlier turns tell the speakers apart."""
    rng = random.Random(f"{seed}/{stream}")
    pool = [s for s in world.subjects() if "subtle" in s.answers]
    docs = []
    for _ in range(n):
        s = rng.choice(pool)
        last = world.Turn(world.advice_question(s, rng), s.answers["subtle"], s.domain, "subtle")
        plan = [rng.random() < 0.5 for _ in range(rng.randint(1, 3))]
        for p in ("villain", "novice"):
            earlier = tuple(world.sample_turn(p, rng, world_seed, is_open) for is_open in plan)
            docs.append(world.Document(p, "none", "", earlier + (last,)))
    return docs
