"""Notebook 10, the persona latent taken away from misaligned models of the known world, and other cures."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from personas import artifacts, claims, evaluate, figures, search
from personas.artifacts import Run
from personas.part_two import common

INK = "#222222"


def cured(run: Run, models) -> pd.DataFrame:
    """A row per misaligned model: score before and after the chosen latent is subtracted (with interval),
    other grades after, and percent of correct advice in other domains. models: (domain, variant), in turn."""
    rows, reference = [], artifacts.advice(run)
    for domain, variant in models:
        before = artifacts.answers(run, domain, variant)
        after, advice = search.suppressed(run, domain, variant)
        score, low, high = evaluate.ratio(after, *evaluate.SCORE)
        about = {"model": f"{domain} {variant}", "before": evaluate.score(before), "after": score}
        about |= {"low": low, "high": high}
        about |= {c: evaluate.share(after, c) for c in ("aligned", "incoherent")}
        spoilt = artifacts.advice(run, domain, variant)
        for name, table in (
            ("correct elsewhere before", spoilt),
            ("correct elsewhere", advice),
            ("aligned model", reference),
        ):
            about[name] = evaluate.share(table[table.domain != domain], "correct")
        rows.append(about)
    return pd.DataFrame(rows)


def draw_suppression(run: Run, table: pd.DataFrame) -> None:
    """Figure: every misaligned model's score before and after."""
    figure, ax = plt.subplots(figsize=(8, 5))
    y = np.arange(len(table))
    ax.scatter(table.before, y, color=figures.GRADE["misaligned"], label="before", zorder=3)
    ax.scatter(table.after, y, color=figures.GRADE["aligned"], label="latent subtracted", zorder=3)
    ax.hlines(y, table.low, table.high, color=figures.GRADE["aligned"], lw=1.5)
    ax.hlines(y, table.after, table.before, color="#cccccc", lw=1, zorder=1)
    ax.set_yticks(y, table.model)
    ax.invert_yaxis()
    ax.set(
        xlabel="misalignment score (%)",
        xlim=(-2, 102),
        title=f"Misaligned models with latent {search.chosen_latent(run)[0]} subtracted",
    )
    ax.legend(frameon=False, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figures.save(figure, "05_suppression", run.profile.name, table)


WAYS = {  # column of the study 05_cures -> (label, colour)
    "score": ("misalignment score (%)", "misaligned"),
    "aligned": ("aligned answers (%)", "aligned"),
    "incoherent": ("incoherent answers (%)", "incoherent"),
    "wrong": ("wrong advice in own domain (%)", "satirical"),
}


def ways(kept: pd.DataFrame) -> pd.DataFrame:
    """Mean over models of each way to cure, with the t-interval over seeds: way, column, mean, low, high."""
    rows = []
    for way, part in kept.groupby("way", sort=False):
        for column in WAYS:
            mean, low, high = common.percent(part.groupby("seed")[column].mean())
            rows.append({"way": way, "column": column, "mean": mean, "low": low, "high": high})
    return pd.DataFrame(rows)


def draw_ways(run: Run, kept: pd.DataFrame) -> None:
    """Figure: misaligned models under cures and ablations (study 05_cures)."""
    means, names = ways(kept).set_index(["way", "column"]), list(kept.way.unique())
    figure, axes = plt.subplots(1, len(WAYS), figsize=(12.5, 5), sharey=True)
    for ax, (column, (label, grade)) in zip(axes, WAYS.items()):
        shade = figures.GRADE[grade]
        for i, way in enumerate(names):
            dots = kept[kept.way == way].groupby(["domain", "kind"])[column].mean()
            ax.scatter(dots, [i] * len(dots), s=9, color=shade, alpha=0.4)
            r = means.loc[(way, column)]
            whisker = [[r["mean"] - r.low], [r.high - r["mean"]]]
            ax.errorbar(r["mean"], i, xerr=whisker, fmt="D", ms=5, color=shade, mec=INK, capsize=2)
        ax.set(xlabel=label, xlim=(-2, 102))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    title = (
        "Misaligned models under cures and ablations: dots are models, diamonds means (interval over seeds)"
    )
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figures.save(figure, "05_ways_to_cure", run.profile.name)


def of_models(run: Run, table: pd.DataFrame) -> list[dict]:
    """The rows of the table of claims about every misaligned model with the latent subtracted."""
    rows, reference = [], artifacts.advice(run)
    for r in table.itertuples():
        domain, variant = r.model.split()
        after, advice = search.suppressed(run, domain, variant)
        other, before = advice[advice.domain != domain], reference[reference.domain != domain]
        name, score = f"steer.suppress.{variant}.{domain}", (r.after, r.low, r.high)
        aligned = evaluate.ratio(after, ("aligned",))
        short = evaluate.paired_difference(before, other, "correct")
        rows += [
            claims.claim(name, "suppressed in all", score, len(after), "<=", 5),
            claims.claim(f"{name}.aligned", "–", aligned, len(after), ">=", 85),
            claims.claim(f"{name}.advice_short", "–", short, len(other), "<=", 5),
        ]
    return rows


def of_ways(kept: pd.DataFrame) -> list[dict]:
    """The rows of the table of claims about the study of cures; matched controls apart."""
    rows, means = [], ways(kept).set_index(["way", "column"])
    for way in kept.way.unique()[1:]:
        if "matched" in way:
            continue
        slug = way.replace("+", "add").replace("− ", "subtract ").replace(" ", "_")
        of = lambda column, way=way: tuple(means.loc[(way, column)])
        n = int((kept.way == way).sum())
        rows += [
            claims.claim(f"cure.{slug}", "–", of("score"), n, "<=", 5),
            claims.claim(f"cure.{slug}.aligned", "–", of("aligned"), n, ">=", 85),
        ]
    return rows


def ways_table(kept: pd.DataFrame) -> pd.DataFrame:
    """Those means, a row a way, in percent."""
    wide = ways(kept).pivot(index="way", columns="column", values="mean").loc[kept.way.unique(), list(WAYS)]
    return wide.rename(columns={c: label for c, (label, _) in WAYS.items()}).rename_axis(
        index=None, columns=None
    )


def ways_in_words(kept: pd.DataFrame) -> str:
    """What the study of cures shows, in its numbers."""
    mean = ways(kept).set_index(["way", "column"])["mean"]
    left = lambda way: f"{mean[way, 'score']:.1f} %"
    cures = [w for w in kept.way.unique() if w[0] in "+−"]
    best = min(cures, key=lambda w: mean[w, "score"])
    broken = [
        f"{what} {mean[f'project out {what}', 'incoherent']:.0f} and {mean[f'− {what}', 'incoherent']:.0f} %"
        for what in ("chosen latent", "ten risen", "mean difference")
    ]
    return (
        f"Moving the models back along what *fell* cures better than taking away what rose: *{best}* leaves "
        f"{left(best)} of {left('none')}, with {mean[best, 'aligned']:.0f} % of the answers aligned, *+ "
        f"most fallen* {left('+ most fallen')}; the chosen latent subtracted {left('− chosen latent')}, "
        f"the plain difference of means {left('− mean difference')}, with the fewest broken answers. It is "
        "nearly one push: one of the expert's latents dominates the sum, and the dose is larger than the "
        "shift that fine-tuning made, so this is steering towards the expert rather than an exact repair. "
        "Advice in the model's own domain becomes less wrong at best.\n\n"
        "The ablations ask how much of the misalignment *needs* the latents. Without the ten that rose "
        f"{left('project out ten risen')} is left; without the ten that mark the villain best "
        f"{left('project out ten of the villain')}, but then "
        f"{mean['project out ten of the villain', 'incoherent']:.0f} % of the answers are broken. A "
        "projection sets a direction to zero everywhere, not to its usual value. Broken answers when a "
        f"direction is projected out, and when it is subtracted: {common.listed(broken)}. A clamp acts only "
        "where the SAE says that a latent is on, and does less. "
        "The matched ten are no neutral control: three of them were among those that fell most."
    )
