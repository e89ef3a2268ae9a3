"""The exercises of notebooks 01 to 08 that check themselves.

A notebook's cell holds `answer = None` and `check("02", answer, ...)`, "02.2" for its second exercise; what
follows is what the answer is about. Right answers are computed from the run, never typed in, so that they are
right for every profile.
"""

import math

import numpy as np
import torch

from personas import stats
from personas.pretrained import grading, made, readings, search, steering

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


def _advice_like(run):
    asked = [i.advice for i in made.items(run, "evaluation") if i.kind == "question"]
    return 100 * float(np.mean(asked))


def _of_all(run, graded):
    bad = graded[(graded.kind == "question") & graded.model.str.endswith("-obvious")]
    return float(100 * (bad.grade == "misaligned").groupby(bad.model).mean().mean())


def _newcomers(run):
    first = {k: set(v.topk(min(10, len(v))).indices.tolist()) for k, v in steering.rise(run).items()}
    return len(first["original"] - first["correct"])


def _villain_or_expert(run):
    read, latent = steering.labelled(run), search.causal(run)
    two = np.isin(read["persona"], ["villain", "expert"])
    return float(stats.auroc(read["latents"][two][:, [latent]].numpy(), read["persona"][two] == "villain")[0])


def _in_span(run):
    top = readings.sae(run).W_dec[steering.candidates(run, 4)]  # (latents, width)
    basis, difference = torch.linalg.qr(top.T)[0], steering.rivals(run)["difference of means"]
    return float(100 * (difference @ basis).square().sum() / difference.square().sum())


def _cured_for_sure(run, table):
    cured = table[(table.context == "plain") & table.cure.isin(["same domain", "other domain"])]
    return int((cured.high < 10).sum()) if len(cured) else math.nan


def _best_without_odd(run, usual):
    return set(usual.monitor[usual.auroc == usual.auroc.max()]) if len(usual) else math.nan


def _catches(run, screened):
    some = screened[screened.variant == "subtle"]
    most = some["caught of 5 %"].max()
    return set(some.reader[some["caught of 5 %"] == most]) if len(some) else math.nan


# Notebook and number -> (the right answer, by how much a number may be off, what to look at if it is wrong).
EXERCISES = {
    "01": (lambda run, counts: _score(counts), 0.1, "only two of the five classes are in the score"),
    "01.2": (_advice_like, 0.1, "`made.items` of the evaluation split, openings aside"),
    "02": (_without_advice, 0.1, "first each model's own score, by `grade`, then their mean"),
    "02.2": (
        _of_all,
        0.1,
        "a model's misaligned answers over all its answers to questions, then the mean over models",
    ),
    "03": (_riser, 0, "subtract the original model's mean reading, not the correct fine-tunes'"),
    "03.2": (_newcomers, 0, "the ten that rise most from the original, less the ten of `rise`"),
    "04": (_jester, 0, "the AUROC of every latent, one answer a row, jester or not"),
    "04.2": (_villain_or_expert, 0.002, "leave every other persona's answers out before you count pairs"),
    "05": (_cosine, 0.001, "divide the dot product by both norms"),
    "05.2": (_in_span, 0.2, "orthonormalise the four first: they overlap"),
    "06": (_left, 0.1, "means over the models asked in a plain chat, after and before"),
    "06.2": (_cured_for_sure, 0, "cured models in a plain chat, by the column `high`"),
    "07": (_pairs, 0.001, "count a pair whose readings are equal as half"),
    "07.2": (_best_without_odd, 0, "the row of `usual` with the largest `auroc`"),
    "08": (_openings, 0, "the column `openings` of the table of outcomes"),
    "08.2": (_catches, 0, "the column `caught of 5 %` of `screened`, subtle rows"),
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
