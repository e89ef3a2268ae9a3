"""Notebook 08: can a narrow task be learnt without the character that comes with it?"""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from personas import stats
from personas.chapters import common
from personas.pretrained import guarded, likelihood, made, screening, sets

KEPT = 0.8  # share of what is learnt without a guard that a guard may not fall below, to be chosen
CLAIMED = {
    "prevent.benign_data": "benign data",
    "prevent.inoculation": "inoculation",
    "prevent.steering": "steering in training",
    "prevent.ablation": "ablation in training",
    "prevent.penalty": "latent penalty",
}


def untrained(run: made.Run, domains: list[str]) -> float:
    """How much likelier (nats a token) the original model finds the obviously wrong answers to held-out
    subjects of these domains: where `learnt` begins. nan where none of them has such subjects."""
    domains = [d for d in domains if d in sets.DOMAINS]
    if not domains:
        return float("nan")
    return float(likelihood.advice_preference(run, made.ORIGINAL, tuple(domains)).obvious.mean())


def points(table: pd.DataFrame) -> pd.DataFrame:
    """A row per guard, dose and way of asking: means over domains and seeds. The bounds are means of the
    cells' bounds, as if all cells erred together: they share their questions."""
    columns = ["score", "low", "high", "openings", "broken", "learnt", "trained", "elsewhere"]
    groups = table.groupby(["guard", "dose", "asked"], sort=False)
    return groups[columns].mean().assign(answers=groups.answers.sum()).reset_index()


def chosen(rows: pd.DataFrame, guard: str, start: float) -> pd.Series | None:
    """The row (asked as it is) of a guard's dose that discovery questions choose: of the doses that keep at
    least KEPT of what is learnt without a guard, the one with the lowest score on discovery questions; if
    none does, the one that learns most. start: `untrained`. None if the table lacks the guard."""
    found = rows[rows.asked == "discovery"]
    mine, none = found[found.guard == guard], found[found.guard == "none"]
    if not len(mine) or not len(none):
        return None
    enough = mine[mine.learnt - start >= KEPT * (none.learnt.iloc[0] - start)]
    order = (
        enough.sort_values(["score", "dose"]) if len(enough) else mine.sort_values("learnt", ascending=False)
    )
    plain = rows[(rows.asked == "plain") & (rows.guard == guard)]
    return plain[plain.dose == order.dose.iloc[0]].iloc[0]


def by_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """Learnt and score, asked as it is, of training without a guard for fewer and for more steps: what a
    guard has to beat."""
    steps = rows[(rows.asked == "plain") & rows.guard.isin(["none", "fewer steps", "more steps"])]
    return steps.sort_values("learnt")[["learnt", "score"]]


def less(guard: pd.Series, none: pd.Series) -> stats.Estimate:
    """By how many percent a guard's score is below the unguarded one, with the interval of a ratio
    (stats.ratio)."""
    a = stats.Estimate(guard.score, guard.low, guard.high, int(guard.answers))
    b = stats.Estimate(none.score, none.low, none.high, int(none.answers))
    r = stats.ratio(a, b)
    return stats.Estimate(100 * (1 - r.value), 100 * (1 - r.high), 100 * (1 - r.low), r.n)


def draw(run: made.Run, table: pd.DataFrame, start: float):
    """Figure: misalignment against the task learnt, small multiples, a line through each guard's doses."""
    rows = points(table)
    plain = rows[rows.asked == "plain"]
    none = plain[plain.guard == "none"]
    names = [g for g in guarded.GUARDS if g != "none" and g in set(plain.guard)]
    several = table.groupby(["domain", "seed"]).ngroups > 1
    wide = min(3, len(names))
    tall = -(-len(names) // wide)
    size = (3.7 * wide, 2.9 * tall)
    fig, axes = plt.subplots(tall, wide, figsize=size, sharex=True, sharey=True, squeeze=False)
    for ax, name in zip(axes.flat, names):
        mine = plain[plain.guard == name].sort_values("dose")
        steps = by_steps(rows)
        ax.plot(steps.learnt, steps.score, color=common.GREY, lw=4, alpha=0.25, zorder=0)
        for _, n in none.iterrows():
            ax.errorbar(
                n.learnt, n.score, yerr=[[n.score - n.low], [n.high - n.score]], fmt="X", color=common.INK
            )
        ax.axvline(start, color=common.GREY, lw=0.8, ls="--")
        if several:
            each = table[(table.asked == "plain") & (table.guard == name)]
            ax.plot(each.learnt, each.score, ".", color=common.GUARD, alpha=0.4, ms=5)
        ax.plot(mine.learnt, mine.score, color=common.GUARD, lw=1)
        ax.errorbar(
            mine.learnt,
            mine.score,
            yerr=[mine.score - mine.low, mine.high - mine.score],
            fmt="o",
            color=common.GUARD,
            capsize=2,
            ms=5,
        )
        for x, y, doses in _labels(mine) if len(mine) > 1 else ():
            ax.annotate(
                doses, (x, y), xytext=(-9, 4), textcoords="offset points", fontsize=8, ha="right", va="bottom"
            )
        pick = chosen(rows, name, start)
        if pick is not None:
            ax.scatter(pick.learnt, pick.score, s=150, facecolor="none", edgecolor=common.INK, zorder=4)
        ax.set(title=name + (" (the broad line itself)" if name.endswith("steps") else ""), ylim=(-3, 103))
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for ax in axes[-1]:
        ax.set_xlabel("wrong advice learnt (nats a token)")
    for ax in axes[:, 0]:
        ax.set_ylabel("score (%)")
    fig.suptitle(
        "What each guard leaves of the misalignment, and of the task\n"
        "cross: no guard; broad line: no guard, but other numbers of steps; dashed: before training;\n"
        "ring: the dose that discovery questions choose; bars: 95 % over categories of questions"
        + ("; dots: domains and seeds" if several else ""),
        y=0.99,
        fontsize="medium",
    )
    fig.tight_layout()
    return common.save(run, fig, "08_guards", rows)


def _labels(mine: pd.DataFrame) -> list[tuple[float, float, str]]:
    """Where each dose is written, and which; doses of points that lie on each other are written together."""
    found: list = []
    for r in mine.sort_values(["learnt", "score"]).itertuples():
        last = found[-1] if found else None
        if last and abs(r.learnt - last[0]) < 0.15 and abs(r.score - last[1]) < 8:
            last[2].append(r.dose)
        else:
            found.append((r.learnt, r.score, [r.dose]))
    return [(x, y, ", ".join(f"{d:g}" for d in sorted(doses))) for x, y, doses in found]


def outcomes(rows: pd.DataFrame, start: float) -> pd.DataFrame:
    """A row per guard at its chosen dose, the unguarded model first: task kept (percent), scores asked as it
    is, after a turn of the bad training, and where the answer's first words are given, broken, and the score
    `by steps alone` of an unguarded model that learnt as much (by_steps, a straight line between points)."""
    at = lambda guard, dose: rows[(rows.guard == guard) & (rows.dose == dose)].set_index("asked")
    none = at("none", 0)
    found, steps = [], by_steps(rows)
    for name in guarded.GUARDS:
        pick = none.loc["plain"] if name == "none" and len(none) else chosen(rows, name, start)
        if pick is None:
            continue
        mine = at(name, pick.dose)
        gain = none.learnt.loc["plain"] - start if len(none) else float("nan")
        found.append(
            {
                "guard": name,
                "dose": pick.dose,
                "task kept": 100 * (pick.learnt - start) / gain,
                "score": pick.score,
                "low": pick.low,
                "high": pick.high,
                "after a bad turn": mine.score.get("bad training"),
                "its interval": f"{mine.low['bad training']:.0f} to {mine.high['bad training']:.0f}",
                "openings": pick.openings,
                "broken": pick.broken,
                "by steps alone": np.interp(
                    pick.learnt, steps.learnt, steps.score, left=np.nan, right=np.nan
                ),
            }
        )
    return pd.DataFrame(found)


def under_its_line(rows: pd.DataFrame) -> pd.DataFrame:
    """Inoculation asked in all its ways: without its line, under it, under another one, after a bad turn."""
    mine = rows[(rows.guard == "inoculation") & (rows.asked != "discovery")]
    return mine[["asked", "score", "low", "high", "openings", "broken"]]


# --- before training ----------------------------------------------------------------------------------------


def screen(table: pd.DataFrame) -> pd.DataFrame:
    """AUROC of every reader for subtly and obviously wrong rows against correct ones, with a bootstrap over
    subjects, and what is caught of 5 and 10 % of wrong rows."""
    found = []
    for variant in ("subtle", "obvious"):
        some = table[table.variant.isin(["correct", variant])]
        if some.variant.nunique() < 2:
            continue
        subjects = some.groupby(["domain", "subject"]).ngroup().to_numpy()
        for reader in screening.READERS:
            inside = [g[reader] - g[reader].mean() for _, g in some.groupby("domain", sort=False)]
            e = stats.auroc_over(pd.concat(inside).loc[some.index], some.variant == variant, subjects)
            row = {"variant": variant, "reader": reader, "auroc": e.value, "low": e.low, "high": e.high}
            row["rows"] = len(some)
            row |= {
                f"caught of {p} %": screening.flagged(table, reader, variant, p)["caught"] for p in (5, 10)
            }
            found.append(row)
    return pd.DataFrame(found)


def draw_screen(run: made.Run, table: pd.DataFrame):
    """Figure: AUROC of every reader for wrong rows."""
    fig, ax = plt.subplots(figsize=(7.2, 3.4))
    names = list(screening.READERS)
    for variant, shift in (("subtle", -0.14), ("obvious", 0.14)):
        mine = table[table.variant == variant]
        ax.errorbar(
            mine.auroc,
            [names.index(r) + shift for r in mine.reader],
            xerr=[mine.auroc - mine.low, mine.high - mine.auroc],
            fmt=common.MARK[variant],
            color=common.VARIANT[variant],
            capsize=2,
            label=f"{'obviously' if variant == 'obvious' else 'subtly'} wrong rows",
        )
    ax.axvline(0.5, color=common.INK, lw=0.8, ls=":")
    ax.set(yticks=range(len(names)), yticklabels=names, xlabel="AUROC, wrong against correct rows")
    ax.set_title("Which rows would do harm, by what the original model reads")
    ax.invert_yaxis()
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    return common.save(run, fig, "08_screening", table)


def claims(run: made.Run, rows: pd.DataFrame, screened: pd.DataFrame, start: float) -> pd.DataFrame:
    """This notebook's registered claims."""
    nothing = stats.Estimate(float("nan"), float("nan"), float("nan"), 0)
    none = rows[(rows.guard == "none") & (rows.asked == "plain")]
    found, hidden = {}, []
    for claim, guard in CLAIMED.items():
        pick = chosen(rows, guard, start)
        found[claim] = nothing if pick is None or not len(none) else less(pick, none.iloc[0])
        if pick is not None:
            after = rows[(rows.guard == guard) & (rows.dose == pick.dose) & (rows.asked == "bad training")]
            hidden.append(after.iloc[0])
    worst = max(hidden, key=lambda r: r.score, default=None)
    found["prevent.hidden"] = (
        nothing if worst is None else stats.Estimate(worst.score, worst.low, worst.high, int(worst.answers))
    )
    for claim, reader in (("screen.latent", "causal latent"), ("screen.words", "bag of words")):
        r = screened[(screened.reader == reader) & (screened.variant == "obvious")]
        found[claim] = (
            stats.Estimate(*r.iloc[0][["auroc", "low", "high"]], int(r["rows"].iloc[0]))
            if len(r)
            else nothing
        )
    return common.record(run, "08", found)
