"""Persona vectors (Chen et al., 2025, arXiv:2507.21509): for each persona that a researcher can name, mean
activations on what the model says when a system line asks for it, less the mean over all personas; of these
vectors the one along which the fine-tune moved the model most."""

import torch

from personas import generate

USES = "system lines that name personas"
CHANCE = True
LINES = 2


def find(case):
    means = {p: _asked_for(case, lines[:LINES]) for p, lines in case.system.items()}
    middle = torch.stack(list(means.values())).mean(0)
    vectors = torch.stack([m - middle for m in means.values()])
    shift = case.answers_after.mean(0) - case.answers_before.mean(0)
    return vectors[(vectors / vectors.norm(dim=1, keepdim=True) @ shift).argmax()]


def _asked_for(case, lines):
    """Mean activation (width,) over the tokens that the model answers the questions with under these
    lines."""
    prompts = [p for line in lines for p in generate.prompts(case.tokenizer, case.questions, line)]
    said = generate.sample(case.before, case.tokenizer, prompts, seed=case.seed, max_new=40)
    coded = case.tokenizer(said, add_special_tokens=False)["input_ids"]
    rows = [(p + a, len(p)) for p, a in zip(prompts, coded) if a]
    return torch.cat(
        [x[i:] for x, (_, i) in zip(case.residual(case.before, [r for r, _ in rows]), rows)]
    ).mean(0)
