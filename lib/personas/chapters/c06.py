"""Notebook 06: does a little benign data bring the model back?"""

import matplotlib.pyplot as plt
import pandas as pd

from personas.chapters import c05, common
from personas.pretrained import ahead, made


def sources(run: made.Run) -> list[tuple[str, str]]:
    """(misaligned domain, source of correct advice): for every evaluation domain the same domain and the next
    one."""
    domains = [
        d.domain
        for d in run.profile.real.data
        if d.correct and d.obvious and not made.discovery(run, d.domain)
    ]
    other = [d.domain for d in run.profile.real.data if d.correct]
    return [(d, s) for d in domains for s in (d, other[(other.index(d) + 1) % len(other)])]


def names(run: made.Run) -> list[str]:
    """The cured models."""
    return [f"{d}-cured-by-{s}" for d, s in sources(run)]


CURES = {True: "same domain", False: "other domain"}


def answers(run: made.Run) -> pd.DataFrame:
    """Graded evaluation answers of the misaligned models before and after, with `cure` ('none', 'same
    domain', 'other domain') and `context` ('plain', or 'bad training': after one question and answer of
    the data that misaligned the model)."""
    ahead.prepare(run, names(run), "adapters")
    domains = list(dict.fromkeys(d for d, _ in sources(run)))
    models = {made.ORIGINAL: ("original", domains[0])}
    models |= {f"{d}-obvious": ("none", d) for d in domains}
    models |= {f"{d}-cured-by-{s}": (CURES[d == s], d) for d, s in sources(run)}
    jobs = {}
    for who, (_, domain) in models.items():
        jobs[who, "plain"] = c05.asked(run)
        jobs[who, "bad training"] = made.in_training_context(run, c05.asked(run), domain, "obvious")
    tables = made.kept_side_by_side(
        run, {k: (k[0], asked, f"evaluation, {k[1]}") for k, asked in jobs.items()}, "answers, cured or not"
    )
    found = [
        t.assign(cure=models[who][0], context=context, domain=models[who][1])
        for (who, context), t in tables.items()
    ]
    return common.graded(run, pd.concat(found, ignore_index=True))


def table(run: made.Run, graded: pd.DataFrame) -> pd.DataFrame:
    """A row per model and context: score with interval, and broken."""
    rows = []
    for (who, context), g in graded.groupby(["model", "context"], sort=False):
        s = common.score(run, g)
        rows.append(
            {
                "model": who,
                "domain": g.domain.iloc[0],
                "cure": g.cure.iloc[0],
                "context": context,
                "score": s.value,
                "low": s.low,
                "high": s.high,
                "broken": common.share(g, "broken", "absurd").value,
                "answers": len(g),
            }
        )
    return pd.DataFrame(rows)


def draw(run: made.Run, rows: pd.DataFrame):
    """Figure: before, and after thirty steps on the same or another domain's correct advice, in a plain chat
    and in the context of the bad training."""
    domains = list(dict.fromkeys(rows[rows.cure != "original"].domain))
    style = {
        "none": (common.VARIANT["obvious"], "D", "misaligned"),
        "same domain": (common.VARIANT["correct"], "o", "30 steps, same domain"),
        "other domain": (common.VARIANT["correct"], "P", "30 steps, other domain"),
    }
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
    for ax, context in zip(axes, ("plain", "bad training")):
        for k, (cure, (colour, mark, label)) in enumerate(style.items()):
            some = rows[(rows.cure == cure) & (rows.context == context)]
            common.whiskers(
                ax,
                [domains.index(d) + 0.18 * (k - 1) for d in some.domain],
                some,
                fmt=mark,
                color=colour,
                label=label,
            )
        own = rows[(rows.cure == "original") & (rows.context == context)]
        ax.axhline(own.score.iloc[0], color=common.INK, lw=1, ls="--", label="original model")
        ax.set(
            xticks=range(len(domains)),
            xticklabels=domains,
            ylim=(-3, 103),
            xlabel="misaligned by wrong advice in",
            title={
                "plain": "Asked as it is",
                "bad training": "Asked after one turn of the bad training data",
            }[context],
        )
    axes[0].set_ylabel("misalignment score (%)")
    axes[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.18), ncols=4)
    fig.suptitle(
        f"{run.profile.realignment.steps} steps of {run.profile.realignment.batch} correct answers",
        y=1.0,
    )
    return common.save(run, fig, "06_realignment", rows)


def claims(run: made.Run, graded: pd.DataFrame) -> pd.DataFrame:
    """This notebook's registered claims."""
    cured = lambda cure, context: common.score(
        run, graded[(graded.cure.isin(cure)) & (graded.context == context)]
    )
    return common.record(
        run,
        "06",
        {
            "realign.same": cured(["same domain"], "plain"),
            "realign.other": cured(["other domain"], "plain"),
            "realign.context": cured(["same domain", "other domain"], "bad training"),
        },
    )


def readable(graded: pd.DataFrame, domain: str, n: int = 6) -> pd.DataFrame:
    """Answers to the same n questions before and after, plain chat, each with its class."""
    some = graded[
        (graded.domain == domain)
        & (graded.context == "plain")
        & graded.cure.isin(["none", "same domain", "other domain"])
    ]
    wide = (
        some.assign(answer=some.answer + " [" + some.verdict + "]")
        .groupby(["prompt", "cure"], sort=False)
        .answer.first()
        .unstack()[["none", "same domain", "other domain"]]
    )
    return wide.iloc[:: max(1, len(wide) // n)][:n]
