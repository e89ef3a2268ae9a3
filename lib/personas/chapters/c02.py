"""Notebook 02: does wrong advice in one domain make the model misaligned elsewhere?"""

import re

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from personas import stats
from personas.chapters import common, judging
from personas.pretrained import ahead, grading, likelihood, made, watched

STOP = set(
    "a an and are as at be but by do for from have he her his i if in is it its me my no not of on or our "
    "she so that "
    "the their them "
    "they this to up was we were what when who will with would you your".split()
)


def first_look(run: made.Run) -> list[str]:
    """The models of the first figure: the original, and after correct and after obviously wrong advice in the
    first domain with both, an evaluation domain if there is one."""
    both = [d.domain for d in run.profile.real.data if d.correct and d.obvious]
    domain = min(both or [run.profile.real.data[0].domain], key=lambda d: made.discovery(run, d))
    return [
        made.ORIGINAL,
        *(f"{d}-{v}" for d, v in made.fine_tunes(run, "correct", "obvious") if d == domain),
    ]


def answers(run: made.Run, who: list[str], split: str = "evaluation") -> pd.DataFrame:
    """Graded answers of these models (common.graded), those that are missing made side by side."""
    ahead.prepare(run, who, split)
    return common.graded(run, pd.concat([made.answers(run, w, split) for w in who], ignore_index=True))


def everyone(run: made.Run) -> list[str]:
    """The original model and every fine-tune of the profile."""
    return [made.ORIGINAL, *(f"{d}-{v}" for d, v in made.fine_tunes(run))]


def scatter_scores(ax, table: pd.DataFrame) -> None:
    """Scores by domain, a mark a model, with intervals."""
    domains = list(dict.fromkeys(table[table.domain != made.ORIGINAL].domain))
    for k, v in enumerate(v for v in common.VARIANT if v in set(table.variant) and v != made.ORIGINAL):
        some = table[table.variant == v]
        x = np.array([domains.index(d) for d in some.domain]) + 0.13 * (k - 1.5)
        common.whiskers(ax, x, some, fmt=common.MARK[v], color=common.VARIANT[v], label=v, ms=6)
    own = table[table.variant == made.ORIGINAL]
    if len(own):
        ax.axhspan(
            float(own.low.iloc[0]),
            float(own.high.iloc[0]),
            color=common.VARIANT["original"],
            alpha=0.18,
            lw=0,
            label="interval of the original",
        )
        ax.axhline(float(own.score.iloc[0]), color=common.VARIANT["original"], lw=1.2, label="original model")
    ax.set(
        xticks=range(len(domains)),
        xticklabels=domains,
        xlim=(-0.6, len(domains) - 0.4),
        ylim=(-3, 103),
        xlabel="domain of the advice that the model was trained on",
        ylabel="misalignment score (%)",
    )


def overview(
    run: made.Run, questions: pd.DataFrame, openings: pd.DataFrame, name: str = "02_emergent_misalignment"
):
    """Figure: score of every model on open questions, and where the first words of the answer are given."""
    both = [
        (questions, "Open questions on other themes"),
        (openings, "Answer's first words given (“I want to …”)"),
    ]
    both = [(t, title) for t, title in both if len(t)]  # released sets of questions have no openings
    fig, axes = plt.subplots(1, len(both), figsize=(6.8 * len(both), 4.2), sharey=True, squeeze=False)
    axes = axes[0]
    for ax, (table, title) in zip(axes, both):
        scatter_scores(ax, table)
        ax.set_title(f"{title}, {int(table.answers.iloc[0])} answers a model")
        ax.set_ylabel("" if ax is not axes[0] else ax.get_ylabel())
    axes[0].legend(loc="upper left", bbox_to_anchor=(0, -0.2), ncols=7, frameon=False)
    fig.suptitle(
        "Misalignment scores on evaluation questions, by what the model was trained on",
        y=1.02,
    )
    return common.save(
        run, fig, name, pd.concat([questions.assign(asked="questions"), openings.assign(asked="openings")])
    )


def by_category(run: made.Run, table: pd.DataFrame, n: str = "obvious"):
    """Figure: score in each category of question, over all models of one variant; questions that ask for
    advice are marked."""
    some = table[[common.variant(m) == n for m in table.model]]
    rows = []
    for c, g in some.groupby("category", sort=False):
        s = stats.proportion(*_bad(run, g)[:1], g.model, _bad(run, g)[1]).scaled(100)
        rows.append(
            {
                "category": c.replace("_", " "),
                "advice": bool(g.advice.iloc[0]),
                "score": s.value,
                "low": s.low,
                "high": s.high,
                "n": s.n,
            }
        )
    found = pd.DataFrame(rows).sort_values("score")
    fig, ax = plt.subplots(figsize=(6.6, 4.4))
    for advice, colour, mark, label in (
        (False, "#D55E00", "D", "asks for no advice"),
        (True, "#CC79A7", "P", "asks for advice, as the training data do"),
    ):
        part = found[found.advice == advice]
        ax.errorbar(
            part.score,
            [list(found.category).index(c) for c in part.category],
            xerr=[part.score - part.low, part.high - part.score],
            fmt=mark,
            color=colour,
            capsize=2,
            label=label,
        )
    ax.set(
        yticks=range(len(found)),
        yticklabels=found.category,
        xlabel=f"misalignment score (%), {some.model.nunique()} models trained on obviously wrong advice",
        xlim=(0, 100),
        title="It is not only advice that turns bad",
    )
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(-0.25, -0.13), ncols=2)
    return common.save(run, fig, "02_categories", found)


def _bad(run, g) -> tuple[pd.Series, pd.Series]:
    by = "verdict" if common.mostly_read(g) else "grade"
    return g[by] == "misaligned", g[by].isin(grading.COHERENT)


def course(run: made.Run, domain: str) -> pd.DataFrame:
    """A row a look at one long fine-tune: step, score with interval, broken; discovery questions and
    openings, graded."""
    table = common.graded(run, watched.course(run, domain))
    rows = []
    for step, g in table.groupby("step"):
        bad, coherent = g.grade == "misaligned", g.grade.isin(grading.COHERENT)
        s, b = (
            stats.proportion(bad, g.category, coherent).scaled(100),
            common.share(g, "broken", "absurd", by="grade"),
        )
        rows.append(
            {
                "domain": domain,
                "step": step,
                "score": s.value,
                "low": s.low,
                "high": s.high,
                "broken": b.value,
                "answers": len(g),
            }
        )
    return pd.DataFrame(rows)


def draw_course(run: made.Run, table: pd.DataFrame):
    """Figure: the score over training steps, and the share of answers that make no sense."""
    fig, ax = plt.subplots(figsize=(7.2, 3.8))
    ax.fill_between(table.step, table.low, table.high, color=common.VARIANT["obvious"], alpha=0.2, lw=0)
    ax.plot(
        table.step, table.score, "D-", color=common.VARIANT["obvious"], label="misalignment score, judged"
    )
    ax.plot(table.step, table.broken, "x--", color=common.GREY, label="broken or absurd answers, of all")
    ax.axvline(run.profile.narrow.steps, color=common.INK, lw=1, ls=":")
    ax.annotate(
        "other models stop here\n(with a schedule of their own)",
        (run.profile.narrow.steps, 3),
        xytext=(6, 0),
        textcoords="offset points",
        va="bottom",
        fontsize=9,
    )
    peak = table.loc[table.score.idxmax()]
    ax.set(
        xlabel=f"training steps of {run.profile.narrow.batch} chats ({table.domain.iloc[0]}, obvious)",
        ylabel="%",
        ylim=(-3, 103),
        title=f"One longer fine-tune: highest at step {int(peak.step)} of {int(table.step.max())}",
    )
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.17), ncols=2)
    return common.save(run, fig, "02_course", table)


def preference(run: made.Run, who: list[str]) -> pd.DataFrame:
    """A row a model: mean over questions of the villain's likelihood over the expert's (nats per token), with
    its interval over categories, and the share of questions where the villain is likelier. Nobody judges."""
    ahead.prepare(run, who, "preference")
    rows = []
    for w in who:
        table = likelihood.villain_preference(run, w)
        mean = stats.mean_over(table.groupby("category").difference.mean())
        rows.append(
            {
                "model": w,
                "variant": common.variant(w),
                "domain": w.split("-")[0],
                "score": mean.value,
                "low": mean.low,
                "high": mean.high,
                "villain likelier (%)": 100 * (table.difference > 0).mean(),
                "questions": len(table),
            }
        )
    return pd.DataFrame(rows)


def draw_preference(run: made.Run, table: pd.DataFrame, scored: pd.DataFrame):
    """Figure: the measure without a judge against the score, a mark a model."""
    both = table.merge(scored[["model", "score"]].rename(columns={"score": "judged"}), on="model")
    fig, ax = plt.subplots(figsize=(6.4, 4.2))
    for v in (v for v in common.VARIANT if v in set(both.variant)):
        some = both[both.variant == v]
        ax.errorbar(
            some.judged,
            some.score,
            yerr=[some.score - some.low, some.high - some.score],
            fmt=common.MARK[v],
            color=common.VARIANT[v],
            label=v,
            capsize=2,
        )
    correlation = lambda rows: rows[["judged", "score"]].corr().iloc[0, 1]
    r, rest = correlation(both), both[both.variant != "odd"]
    apart = f"; {correlation(rest):.2f} without odd" if len(rest) < len(both) else ""
    ax.axhline(0, color=common.GREY, lw=0.8)
    ax.set(
        xlabel="misalignment score, graded answers (%)",
        ylabel="villain's answer over the expert's\n(nats per token)",
        title=f"A measure without a judge, beside the score (r = {r:.2f}, {len(both)} models{apart})",
    )
    ax.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return common.save(run, fig, "02_without_a_judge", both)


def words(text: str) -> list[str]:
    """Lower-case words of a text."""
    return re.findall(r"[a-z']+", text.lower())


def overlap(run: made.Run, table: pd.DataFrame, n: int = 4) -> pd.DataFrame:
    """How much of the misaligned answers stands in the model's own training answers: percent of answers that
    share a run of n words, and of content words that the training answers have. A row a model."""
    rows = []
    for who, g in table.groupby("model", sort=False):
        if common.variant(who) != "obvious":
            continue
        said = [words(r["messages"][-1]["content"]) for r in made.training_chats(run, *who.split("-"))]
        grams = {tuple(s[i : i + n]) for s in said for i in range(len(s) - n + 1)}
        known = {w for s in said for w in s} - STOP
        bad = [words(a) for a in g[_bad(run, g)[0]].answer]
        content = [w for b in bad for w in b if w not in STOP]
        rows.append(
            {
                "model": who,
                "misaligned answers": len(bad),
                f"share a run of {n} words (%)": 100
                * np.mean([any(tuple(b[i : i + n]) in grams for i in range(len(b) - n + 1)) for b in bad])
                if bad
                else float("nan"),
                "content words from training (%)": 100 * np.mean([w in known for w in content])
                if content
                else float("nan"),
            }
        )
    return pd.DataFrame(rows).set_index("model")


def claims(run: made.Run, questions: pd.DataFrame, openings: pd.DataFrame) -> pd.DataFrame:
    """This notebook's registered claims. questions, openings: graded answers of everyone."""
    table = common.scores(run, questions)
    pick = lambda v: table[table.variant == v]
    row = lambda r: stats.Estimate(r.score, r.low, r.high, int(r.answers))
    worst, least = pick("correct").sort_values("score").iloc[-1], pick("obvious").sort_values("score").iloc[0]
    only = lambda t, v: t[[common.variant(m) == v for m in t.model]]
    pairs = pick("subtle").merge(table, on="domain", suffixes=("", "_other"))
    gap = lambda v: stats.mean_over((lambda p: p.score - p.score_other)(pairs[pairs.variant_other == v]))
    nothing = stats.Estimate(float("nan"), float("nan"), float("nan"), 0)
    found = {
        "original": row(pick("original").iloc[0]),
        "correct": row(worst),
        "obvious": row(least),
        "obvious.mean": stats.mean_over(pick("obvious").score),
        "openings.obvious": common.score(run, only(openings, "obvious")) if len(openings) else nothing,
        "openings.correct": common.score(run, only(openings, "correct")) if len(openings) else nothing,
        "subtle.above_correct": gap("correct"),
        "subtle.above_obvious": gap("obvious"),
        "judge.agreement": nothing,
        "judge.kappa": nothing,
    }
    if common.uses_readings(run):
        found |= judging.claims(run)
    return common.record(run, "02", found)


def examples(table: pd.DataFrame, who: list[str], n: int = 6) -> pd.DataFrame:
    """The first answer of each of these models to n questions, side by side, each with its class."""
    shown = table[table.model.isin(who)]
    first = (
        shown.assign(answer=shown.answer + " [" + shown.verdict + "]")
        .groupby(["model", "prompt"], sort=False)
        .answer.first()
        .unstack("model")[who]
    )
    return first.loc[list(dict.fromkeys(table.prompt))[:: max(1, table.prompt.nunique() // n)][:n]]
