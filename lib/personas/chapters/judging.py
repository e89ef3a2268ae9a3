"""Notebook 02, who grades: the small judge against careful readings, on questions and kinds of model it
never saw."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from personas import stats
from personas.chapters import common
from personas.pretrained import grading, made


def check(run: made.Run) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The small judge on readings of evaluation questions, none of which it was trained on: a row of
    agreement for judge and second reader; and its score beside the readers', a row a model."""
    table = common.reference(run).query("split == 'evaluation'")
    about = pd.DataFrame(
        {
            "second reader": grading.agreement(table),
            "small judge": grading.agreement(table, "reader_a", "grade"),
        }
    ).T
    rows = []
    for who, g in table.groupby("model"):
        coherent = lambda c: 100 * (g[c] == "misaligned").sum() / max(1, g[c].isin(grading.COHERENT).sum())
        rows.append(
            {"model": who, "reader": coherent("reader_a"), "judge": coherent("grade"), "answers": len(g)}
        )
    return about, pd.DataFrame(rows)


def draw(run: made.Run, rows: pd.DataFrame):
    """Figure: the judge's score of each kind of model beside the reader's."""
    fig, ax = plt.subplots(figsize=(4.8, 4.4))
    kinds = [common.variant(m) for m in rows.model]
    for v in dict.fromkeys(kinds):
        some = rows[[k == v for k in kinds]]
        ax.scatter(
            some.reader,
            some.judge,
            color=common.VARIANT.get(v, {"steered": "#882255", "suppressed": "#AAAAAA"}.get(v, "#CC79A7")),
            marker=common.MARK.get(v, {"steered": "*", "suppressed": "<"}.get(v, "P")),
            label=v,
        )
    ax.plot([0, 100], [0, 100], color=common.GREY, lw=0.8)
    off = (rows.reader - rows.judge).abs()
    ax.set(
        xlabel="score by the reader (%)",
        ylabel="score by the small judge (%)",
        title=f"The judge is off by {off.mean():.0f} points on average",
    )
    ax.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1, 1))
    return common.save(run, fig, "02_judge", rows)


def claims(run: made.Run, draws: int = 500) -> dict[str, stats.Estimate]:
    """Agreement (%) and kappa of the small judge with reader A on misaligned or not, with a bootstrap over
    categories."""
    table = common.reference(run).query("split == 'evaluation'")
    read, said = table.reader_a == "misaligned", table.grade == "misaligned"
    cells = pd.DataFrame(
        {"both": read & said, "reader": read & ~said, "judge": ~read & said, "none": ~read & ~said}
    )
    counts = cells.groupby(table.category).sum().to_numpy()  # (categories, cells)

    def agreement(c):  # (..., cells) -> percent, kappa (Cohen, 1960)
        share = c / c.sum(-1, keepdims=True)
        both, reader, judge, none = np.moveaxis(share, -1, 0)
        chance = (both + reader) * (both + judge) + (none + reader) * (none + judge)
        return 100 * (both + none), (both + none - chance) / (1 - chance)

    k = len(counts)
    drawn = agreement(counts[np.random.default_rng(0).integers(k, size=(draws, k))].sum(1))
    return {
        name: stats.Estimate(float(value), *map(float, np.percentile(d, [2.5, 97.5])), len(table))
        for name, value, d in zip(("judge.agreement", "judge.kappa"), agreement(counts.sum(0)), drawn)
    }
