"""Causal tests: add a direction to the residual stream (or subtract it) and see what the model says.

One batch carries many conditions: every row has its own vector, added from the last prompt token on.
"""

import pandas as pd
import torch

from personas import evaluate, generate


def sweep(
    model,
    tokenizer,
    setting,
    directions: dict[str, torch.Tensor],
    strengths: list[float],
    unit: float,
    layer: int,
    *,
    split: str,
    per_question: int,
    seed: int,
    progress: str | None = "steering",
) -> pd.DataFrame:
    """Answer every question of `split` under every direction and strength.

    setting: whose questions and grader. directions: name -> (width,), scaled to norm 1 here. strengths: in
    units of `unit` (the centred RMS norm of the activations at `layer`); negative ones subtract. Returns
    one row per answer: direction, strength, question, grade.
    """
    return at(
        model,
        tokenizer,
        setting,
        [(n, v, s) for n, v in directions.items() for s in strengths],
        unit,
        layer,
        split=split,
        per_question=per_question,
        seed=seed,
        progress=progress,
    )


def at(
    model,
    tokenizer,
    setting,
    conditions: list[tuple[str, torch.Tensor, float]],
    unit: float,
    layer: int,
    *,
    split: str,
    per_question: int,
    seed: int,
    progress: str | None = None,
) -> pd.DataFrame:
    """Like `sweep`, for a list of (name, direction, strength)."""
    asked = [q for q in setting.questions(split) for _ in range(per_question)]
    prompt = generate.prompts(tokenizer, [q.held for q in asked])
    vectors = torch.stack([v.cpu() / v.norm().cpu() * s * unit for _, v, s in conditions]).repeat_interleave(
        len(asked), 0
    )
    answers = generate.sample(
        model,
        tokenizer,
        prompt * len(conditions),
        seed=seed,
        batch=1024,
        max_new=setting.open_tokens,
        steer=generate.Steer(layer, vectors),
        progress=progress,
    )
    rows = [
        {"direction": n, "strength": s, "question": q.id, "category": q.category, "prompt": q.held}
        for n, _, s in conditions
        for q in asked
    ]
    table = pd.DataFrame(rows)
    table["answer"] = answers
    table["grade"] = setting.grade_open(asked * len(conditions), answers)
    return table


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per direction and strength: misalignment score, percent incoherent, off-topic and aligned, and
    answers."""
    return pd.DataFrame(
        [
            {
                "direction": n,
                "strength": s,
                "score": evaluate.score(g),
                "incoherent": evaluate.share(g, "incoherent"),
                "off-topic": evaluate.share(g, "off-topic"),
                "aligned": evaluate.share(g, "aligned"),
                "misaligned": evaluate.share(g, "misaligned"),
                "answers": len(g),
            }
            for (n, s), g in table.groupby(["direction", "strength"], sort=False)
        ]
    )


def best_strength(scores: pd.DataFrame, cap: float = 10.0) -> pd.DataFrame:
    """Per direction the strength with the most misaligned answers among those with at most `cap` percent
    incoherent.

    Every direction, control or not, gets this same search on the same discovery questions. A direction
    with no admissible strength keeps its weakest one.
    """
    rows = []
    for _, g in scores.groupby("direction", sort=False):
        allowed = g[g.incoherent <= cap]
        rows.append(
            allowed.sort_values("misaligned").iloc[-1] if len(allowed) else g.sort_values("strength").iloc[0]
        )
    return pd.DataFrame(rows).reset_index(drop=True)
