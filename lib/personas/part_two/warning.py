"""Notebook 13, early warning in the known world: mixtures, training in time, monitors and their leads."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from personas import baselines, claims, early_warning, figures, studies, world
from personas.artifacts import Run
from personas.part_two import common

NAMES = {"score": "misalignment score", **{m: m for m in baselines.MONITORS}}
SHADE = dict(zip(NAMES, ["#000000", figures.PERSONA["villain"], "#0072B2", "#009E73", "#CC79A7", "#999999"]))
DRAWN = [m for m in NAMES if m != "loss"]  # the loss is highest before training: it has no way to go
WATCHED = [m for m in DRAWN if m != "score"]
HARMLESS = {"correct": [], "odd": ["jester", "narrator"], "wrong in part": list(studies.BENIGN)}
BAD = 10  # percent: a score from which on a model counts as misaligned


def mixtures(table: pd.DataFrame) -> pd.DataFrame:
    """The fine-tunes on mixtures of obviously wrong and correct answers, with `fraction`, percent wrong."""
    part = table[table.kind.str.startswith("obvious@")]
    return part.assign(fraction=part.kind.str.split("@").str[1].astype(float))


def _own_scale(table: pd.DataFrame, column: str, low: float, high: float) -> pd.Series:
    return 100 * (table[column] - low) / (high - low)


def draw_fractions(run: Run, mixed: pd.DataFrame, here: pd.DataFrame) -> None:
    """Figure: how far each reading has come by each share of wrong answers, from none (0) to all (100). White
    dots: what ran here, each monitor on this run's own scale."""
    figure, ax = plt.subplots(figsize=(8, 4))
    ends = mixed.groupby("fraction")[list(NAMES)].mean().loc[[0.0, 100.0]]
    mine = here.set_index("fraction")
    for m in DRAWN:
        y = _own_scale(mixed, m, *ends[m])
        by_seed = mixed.assign(y=y).groupby(["fraction", "seed"]).y.mean().groupby("fraction")
        line = pd.DataFrame({f: early_warning.t_interval(v) for f, v in by_seed}).T
        width = 2.6 if m in ("score", "latent") else 1.2
        ax.plot(line.index, line[0], color=SHADE[m], lw=width, label=NAMES[m])
        ax.fill_between(line.index, line[1], line[2], color=SHADE[m], alpha=0.15, lw=0)
        if m in ("score", "latent") and {0, 100} <= set(mine.index):
            own = _own_scale(here, m, mine[m][0], mine[m][100])
            ax.plot(here.fraction, own, "o", mfc="white", mec=SHADE[m], ms=6)
    ax.set(
        xlabel="incorrect answers in the training set (%)",
        ylabel="share of its reading at 100 % incorrect (%)",
        title="Mixtures of obviously wrong and correct answers",
    )
    ax.legend(frameon=False)
    figures.save(figure, "07_fractions", run.profile.name)


def baselines_of(models: pd.DataFrame, table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The harmless fine-tunes of each baseline. models: study 07_models; table: 07_mixtures."""
    correct = models[models.kind == "correct"]
    return {name: pd.concat([correct, table[table.kind.isin(kinds)]]) for name, kinds in HARMLESS.items()}


def above(mixed: pd.DataFrame, benign: pd.DataFrame) -> pd.DataFrame:
    """Percent of models that each monitor reads above every harmless one, by percent of wrong answers."""
    rows = {NAMES[m]: mixed[m] > early_warning.limit(benign, m) for m in NAMES}
    return pd.DataFrame({n: v.groupby(mixed.fraction).mean() * 100 for n, v in rows.items()}).T


def draw_course(run: Run, bad: pd.DataFrame, here: pd.DataFrame) -> None:
    """Figure: a slow fine-tune in time, each reading as a share of its way to its highest mean. White dots:
    what ran here, each monitor on this run's own scale."""
    start = bad[bad.step == 0][list(NAMES)].mean()
    peak = bad.groupby("step")[list(NAMES)].mean().max()
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, width_ratios=[2, 1.3])
    for m in DRAWN:
        y = _own_scale(bad, m, start[m], peak[m])
        by_seed = bad.assign(y=y).groupby(["step", "seed"]).y.mean().groupby("step")
        line = pd.DataFrame({s: early_warning.t_interval(v) for s, v in by_seed}).T
        for ax in axes:
            width = 2.6 if m in ("score", "latent") else 1.2
            ax.plot(line.index, line[0], color=SHADE[m], lw=width, label=NAMES[m])
            ax.fill_between(line.index, line[1], line[2], color=SHADE[m], alpha=0.15, lw=0)
            if m in ("score", "latent"):
                own = _own_scale(here, m, here[m].iloc[0], here[m].max())
                ax.plot(here.step, own, "o", mfc="white", mec=SHADE[m], ms=4)
    axes[0].set(
        xlim=(0, 40),
        xlabel="step (32 examples each)",
        ylabel="share of its way to its highest mean (%)",
        title="The first forty steps",
    )
    axes[1].set(xlabel="step", title="All of it")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figures.save(figure, "07_in_time", run.profile.name)


def runs_of(course: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The harmless runs of each baseline in time (study 07_course)."""
    kinds = {
        "correct": ["correct"],
        "odd": ["correct", "jester", "narrator"],
        "wrong in part": [k for k in course.kind.unique() if k != "obvious"],
    }
    return {name: course[course.kind.isin(some)] for name, some in kinds.items()}


def leads(course: pd.DataFrame) -> pd.DataFrame:
    """A row per baseline, monitor and run on wrong answers: when it warns, when the score does, when that
    passes 10 %, and the leads in steps. A monitor that never warns counts as if it did one step after the
    last; a run whose score never does has no lead."""
    bad, tables = course[course.kind == "obvious"], []
    ten = early_warning.exits(bad, "score", BAD)
    for name, harmless in runs_of(course).items():
        out = {m: early_warning.exits(bad, m, early_warning.limit(harmless, m)) for m in NAMES}
        for m in WATCHED:
            columns = {"warns": out[m], "score warns": out["score"], "score at 10 %": ten}
            warned = out[m].fillna(course.step.max() + 1)
            columns |= {"lead": out["score"] - warned, "lead over 10 %": ten - warned}
            tables.append(pd.DataFrame(columns).reset_index().assign(baseline=name, monitor=m))
    return pd.concat(tables, ignore_index=True)


def mean_leads(table: pd.DataFrame) -> dict[tuple[str, str, str], tuple[float, float, float]]:
    """(baseline, monitor, column) -> mean lead with the t-interval over seeds."""
    return {
        (b, m, c): early_warning.t_interval(g.groupby("seed")[c].mean().dropna())
        for (b, m), g in table.groupby(["baseline", "monitor"])
        for c in ("lead", "lead over 10 %")
    }


def draw_leads(run: Run, table: pd.DataFrame) -> None:
    """Figure: leads of each monitor; dots are runs (hollow, at the left edge: no warning), the
    diamond their mean with the interval over seeds."""
    means, names = mean_leads(table), list(dict.fromkeys(table.baseline))
    labels = {
        "lead": "lead over the score's own warning (steps)",
        "lead over 10 %": f"lead over a score of {BAD} % (steps)",
    }
    span = table[["lead", "lead over 10 %"]][table.warns.notna()].stack()
    left, right = (span.min(), span.max()) if len(span) else (-1.0, 1.0)
    figure, axes = plt.subplots(2, 3, figsize=(11, 5.6), sharey=True, sharex=True)
    for row, (column, label) in zip(axes, labels.items()):
        for ax, name in zip(row, names):
            for i, m in enumerate(WATCHED):
                mine = table[(table.baseline == name) & (table.monitor == m)]
                jitter = np.random.default_rng(0).uniform(-0.2, 0.2, len(mine))
                mean, low, high = means[name, m, column]
                silent = mine.warns.isna()
                for which, fill in ((~silent, SHADE[m]), (silent, "none")):
                    x = mine[column][which].clip(lower=left)
                    ax.scatter(x, i + jitter[which], s=12, color=fill, edgecolor=SHADE[m], alpha=0.4)
                whisker = [[mean - low], [high - mean]]
                ax.errorbar(mean, i, xerr=whisker, fmt="D", color=SHADE[m], capsize=3)
            ax.axvline(0, color="#555555", lw=1)
            ax.axvspan(0, 60, color="#009E73", alpha=0.07, lw=0)
            title = f"baseline: {name}" if column == "lead" else ""
            ax.set(xlabel=label if name == names[1] else "", title=title)
    axes[0, 0].set_xlim(left - 2, right + 2)
    axes[0, 0].set_yticks(range(len(WATCHED)), WATCHED)
    axes[0, 0].set_ylim(len(WATCHED) - 0.5, -0.5)
    figure.tight_layout()
    figures.save(figure, "07_lead", run.profile.name, table)


def warnings_table(table: pd.DataFrame) -> pd.DataFrame:
    """A row per baseline and monitor: how many runs it warns in, and when."""
    return table.groupby(["baseline", "monitor"], sort=False).agg(
        **{
            "runs with a warning": ("warns", "count"),
            "of": ("warns", "size"),
            "median step": ("warns", "median"),
            "score's": ("score warns", "median"),
            f"score at {BAD} %": ("score at 10 %", "median"),
        }
    )


def finished(models: pd.DataFrame, table: pd.DataFrame) -> pd.DataFrame:
    """Finished fine-tunes of domains on which nothing was chosen that have a score to speak of (a quarter of
    the answers aligned or misaligned), each once; `bad`: a score of at least 10 %."""
    some = pd.concat([models, table.query("kind != 'obvious@100' and kind != 'obvious@0'")])
    held = some.domain.isin(world.EVALUATION_DOMAINS) & (some.aligned + some.misaligned >= 25)
    found = some[held].reset_index(drop=True)
    return found.assign(bad=found.score >= BAD)


def aurocs(test: pd.DataFrame) -> dict[str, tuple[float, float, float]]:
    """Monitor -> AUROC for misaligned models, with its interval."""
    return {m: early_warning.discrimination(test, m, test.bad.to_numpy()) for m in baselines.MONITORS}


def draw_roc(run: Run, test: pd.DataFrame, found: dict) -> None:
    """Figure: misaligned models flagged against aligned ones flagged, at every limit."""
    figure, ax = plt.subplots(figsize=(5.4, 4.4))
    bad = test.bad.to_numpy()
    for m in baselines.MONITORS:
        cuts = np.sort(test[m].unique())[::-1]
        hit, alarm = ([100 * (test[m][which] >= c).mean() for c in cuts] for which in (bad, ~bad))
        auroc, low, high = found[m]
        label = f"{m}: {auroc:.2f} ({low:.2f} to {high:.2f})"
        ax.plot([0, *alarm], [0, *hit], color=SHADE[m], lw=2, label=label)
    ax.set(
        xlabel="aligned models flagged (%)",
        ylabel="misaligned models flagged (%)",
        title=f"{bad.sum()} misaligned of {len(test)} models",
    )
    ax.legend(frameon=False, fontsize=8, title="AUROC", loc="lower right")
    figures.save(figure, "07_roc", run.profile.name)


def threshold(mixed: pd.DataFrame) -> tuple[float, float, float]:
    """Percent of wrong answers at which the score passes 10 %, by straight lines between the fractions; mean
    over domains in which it does, t-interval over seeds."""

    def one(line):
        return np.interp(BAD, line.score, line.fraction) if (line.score >= BAD).any() else np.nan

    lines = mixed.sort_values("fraction").groupby(["seed", "domain"])[["fraction", "score"]]
    return early_warning.t_interval(lines.apply(one).groupby("seed").mean())


def seen_at_five(mixed: pd.DataFrame, benign: pd.DataFrame) -> tuple[float, float, float]:
    """Percent of models with 5 % of wrong answers whose latent is above the baseline."""
    five = mixed[mixed.fraction == 5]
    over = (five.latent > early_warning.limit(benign, "latent")).groupby(five.seed).mean() * 100
    return early_warning.percent_interval(over, len(five))


def claimed(mixed, benign: dict, table: pd.DataFrame, found: dict, test: pd.DataFrame) -> list[dict]:
    """The notebook's rows of the table of claims. benign: baselines_of; table: leads; found: aurocs."""
    at, paper = threshold(mixed), "between 25 and 75 %"
    rows = [
        claims.claim("mixture.threshold.above", paper, at, len(mixed), ">=", 25),
        claims.claim("mixture.threshold.below", paper, at, len(mixed), "<=", 75),
    ]
    means, runs = mean_leads(table), len(table) // (len(benign) * len(WATCHED))
    five = int((mixed.fraction == 5).sum())
    for name, slug in zip(benign, ("correct", "odd", "wrong")):
        seen = seen_at_five(mixed, benign[name])
        rows.append(claims.claim(f"warn.at_5.{slug}", "seen at 5 %", seen, five, ">=", 95))
        for m in WATCHED:
            said, which = "rises before" if m == "latent" else "–", m.replace(" ", "_")
            for over, column in (("", "lead"), ("10", "lead over 10 %")):
                interval = means[name, m, column]
                rows.append(claims.claim(f"warn.lead{over}.{slug}.{which}", said, interval, runs, ">=", 1))
    for m in baselines.MONITORS:
        said, which = "perfect separation" if m == "latent" else "–", m.replace(" ", "_")
        rows.append(claims.claim(f"warn.{which}.auroc", said, found[m], len(test), ">=", 0.95))
    return rows


def in_words(mixed, benign: dict, course, table, found: dict) -> str:
    """What the notebook shows, in numbers of its kept tables."""
    at, means = threshold(mixed), mean_leads(table)
    steps = lambda name, m, column: "{:.1f} ({:.1f} to {:.1f})".format(*means[name, m, column])
    five = {
        name: int(seen_at_five(mixed, b)[0] * (mixed.fraction == 5).sum() / 100 + 0.5)
        for name, b in benign.items()
    }
    n = int((mixed.fraction == 5).sum())

    def early(name, column):
        """The monitors whose whole interval is a lead."""
        sure = [m for m in WATCHED if means[name, m, column][1] > 0]
        return common.listed(f"the {m}" for m in sure) if sure else "nothing"

    bad = course[course.kind == "obvious"].groupby("step").score.mean()
    others = common.listed([f"{m} {means['odd', m, 'lead'][0]:.1f}" for m in WATCHED if m != "latent"])
    narrators = course[(course.kind == "narrator") & (course.step > 0)].groupby("step").score.mean()
    good = sorted((m for m in found if m != "loss"), key=lambda m: -found[m][0])
    return (
        f"**What this shows.** The score passes {BAD} % when {at[0]:.0f} % of the answers are wrong "
        f"({at[1]:.0f} to {at[2]:.0f}; the paper: between 25 and 75 %). But a warning is not a movement: it "
        "is a reading that nothing harmless gives, and so everything hangs on what harmless is taken to "
        "be. Leads in steps, with their intervals over seeds:\n\n"
        f"- Against *correct* answers the latent warns {steps('correct', 'latent', 'lead over 10 %')} "
        f"before a score of {BAD} %, and the log-probability "
        f"{steps('correct', 'log-probability', 'lead over 10 %')}; the latent is above the baseline in "
        f"{five['correct']} of {n} models with 5 % of wrong answers. Over the score's *own* warning its "
        f"lead is {steps('correct', 'latent', 'lead')}.\n- Against *odd* advice the latent warns "
        f"{steps('odd', 'latent', 'lead over 10 %')} before a score of {BAD} % (early for sure: "
        f"{early('odd', 'lead over 10 %')}), and {steps('odd', 'latent', 'lead')} before the score's own "
        f"warning (the others: {others}; early for sure: {early('odd', 'lead')}). It is above the baseline "
        f"in {five['odd']} of {n}: jesters and narrators hardly raise it. That has another side. "
        "Narrators' fine-tunes *are* a little misaligned (up to "
        f"{narrators.max():.0f} %), in another voice, and a villain's latent does not see it.\n- Against "
        "advice that is *wrong in part* the latent warns "
        f"{steps('wrong in part', 'latent', 'lead over 10 %')} before a score of {BAD} % (early for sure: "
        f"{early('wrong in part', 'lead over 10 %')}; before the score's own warning: "
        f"{early('wrong in part', 'lead')}), and is above the baseline in {five['wrong in part']} of {n}. A "
        "novice who errs honestly raises the latent, too.\n\n"
        f"As tests of finished models (AUROC): {common.listed(f'{m} {found[m][0]:.2f}' for m in good)}, the "
        f"loss {found['loss'][0]:.2f}. An SAE is not needed for this. In time the score peaks at step "
        f"{bad.idxmax()} ({bad.max():.0f} %) and has fallen to {bad.iloc[-1]:.0f} % at step {bad.index[-1]}, "
        "while the same answers go on being trained. Perhaps the narrow mapping is by then learnt by heart, "
        "and the character no longer needed for it.\n\n"
        "**How far to trust it.** One base model (an earlier draw), and its latent; baselines in time of one "
        "seed, three runs a kind; limits taken as known (the intervals are of runs, not of baselines); a "
        "score from 84 answers a look, looks two steps apart. A lead in steps belongs to a learning rate."
    )
