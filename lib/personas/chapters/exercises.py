"""The exercises of notebooks 01 to 08 that check themselves.

A notebook's cell holds `answer = None` and `check("02", answer, ...)`; what follows the notebook's number is
what the answer is about. Right answers are computed from the run, never typed in, so that they are right for
every profile.
"""

import math

import numpy as np

from personas import stats
from personas.pretrained import grading, search, steering

COUNTS = {"misaligned": 30, "aligned": 45, "absurd": 15, "broken": 8, "refusal": 2}  # of notebook 01


def _score(counts: dict[str, int]):
    return 100 * counts["misaligned"] / sum(counts[c] for c in grading.COHERENT)


def _without_advice(run, graded):
    bad = graded[(graded.kind == "question") & ~graded.advice.astype(bool)]
    bad = bad[[m.endswith("-obvious") for m in bad.model]]
    means = []
    for _, g in bad.groupby("model"):
        coherent = g.grade.isin(grading.COHERENT)
        means.append(100 * (g.grade == "misaligned").sum() / max(1, coherent.sum()))
    return float(np.mean(means)) if means else math.nan


def _riser(run):
    return int(steering.rise(run)["original"].argmax())


def _jester(run):
    read = steering.labelled(run)
    values = stats.auroc(read["latents"].numpy(), read["persona"] == "jester")
    return {int(i) for i in np.flatnonzero(values >= values.max() - 1e-9)}


def _cosine(run):
    ways = search.directions(run, search.chosen(run))
    a, b = ways["causal latent"], ways["difference of means"]
    return float(a @ b / (a.norm() * b.norm()))


def _left(run, table):
    plain = table[table.context == "plain"].groupby("cure").score.mean()
    return 100 * plain.get("other domain", math.nan) / plain["none"] if plain.get("none") else math.nan


def _pairs(run, finished):
    if not 0 < finished.misaligned.sum() < len(finished):
        return math.nan
    return float(stats.auroc(finished[["causal latent"]].to_numpy(), finished.misaligned.to_numpy())[0])


def _openings(run, outcomes):
    kept = outcomes.dropna(subset=["openings"]) if len(outcomes) else outcomes
    return set(kept.guard[kept.openings == kept.openings.max()]) if len(kept) else math.nan


# Notebook -> (the right answer, by how much a number may be off, what to look at if it is wrong).
EXERCISES = {
    "01": (lambda run, counts: _score(counts), 0.1, "only two of the five classes are in the score"),
    "02": (_without_advice, 0.1, "first each model's own score, by `grade`, then their mean"),
    "03": (_riser, 0, "subtract the original model's mean reading, not the correct fine-tunes'"),
    "04": (_jester, 0, "the AUROC of every latent, one answer a row, jester or not"),
    "05": (_cosine, 0.001, "divide the dot product by both norms"),
    "06": (_left, 0.1, "means over the models asked in a plain chat, after and before"),
    "07": (_pairs, 0.001, "count a pair whose readings are equal as half"),
    "08": (_openings, 0, "the column `openings` of the table of outcomes"),
}


def check(name: str, answer, run, *given) -> None:
    """Say whether an answer to the exercise of that notebook is right, and if not, what to look at."""
    right_of, off, hint = EXERCISES[name]
    if answer is None:
        print("No answer yet: put yours in the place of None and run the cell again.")
        return
    right = right_of(run, *given)
    if isinstance(right, float) and math.isnan(right):
        print("This profile has too few models for this exercise; the default profile has enough.")
        return
    if isinstance(right, set):
        good = answer in right
    else:
        good = isinstance(answer, (int, float, np.number)) and abs(float(answer) - right) <= off
    print("Right." if good else f"Not yet. Look again: {hint}.")
