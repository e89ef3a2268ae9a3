"""Notebook 10, sparse autoencoders and model diffing in the known world."""

import json

import matplotlib.pyplot as plt
import pandas as pd

from personas import artifacts, claims, figures, known_latents, stats, world
from personas.artifacts import Run
from personas.part_two import common

GREY = "#888888"


def draw_training(run: Run) -> None:
    """Figure: variance unexplained over training, for the SAE on the base and on the aligned model."""
    figure, ax = plt.subplots()
    shades = figures.PERSONA["expert"], figures.PERSONA["narrator"]
    for on, shade, style in zip(known_latents.DICTIONARIES, shades, ("-", "--")):
        fvu = json.loads((known_latents.sae_folder(run, on) / "training.json").read_text())["fvu"]
        smooth = pd.Series(fvu).rolling(20, min_periods=1).mean()
        ax.plot(smooth, color=shade, ls=style, label=f"on the {on} model")
    blocks = run.profile.model.layers
    ax.set(
        xlabel="SAE training step",
        ylabel="variance unexplained (fraction)",
        yscale="log",
        title=f"SAE training, residual stream after block {run.profile.sae.layer} (of 0 to {blocks - 1})",
    )
    ax.set_yticks([0.05, 0.1, 0.2, 0.4, 0.8], ["0.05", "0.1", "0.2", "0.4", "0.8"])
    ax.minorticks_off()
    ax.legend(frameon=False)
    figures.save(figure, "03_sae_training", run.profile.name)


def draw_rise(run: Run, top: pd.DataFrame) -> None:
    """Figure: the ten latents that rise most and the ten that fall most (evidence.rising_latents)."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 3.8))
    parts = ((top[:10], "ten that rise most", ""), (top[10:][::-1], "ten that fall most", " (another scale)"))
    for ax, (part, title, scale) in zip(axes, parts):
        y = range(len(part))
        ax.barh(y, part.rise, color=part["marks best"].map(figures.PERSONA).fillna(GREY))
        whiskers = [part.rise - part.low, part.high - part.rise]
        ax.errorbar(part.rise, y, xerr=whiskers, fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
        ax.set_yticks(y, [f"latent {i}" for i in part.latent])
        ax.invert_yaxis()
        ax.set(xlabel=f"change of mean activation{scale}", title=title)
    who = figures.PERSONA | {"nobody": GREY}
    figure.legend(
        handles=[plt.Rectangle((0, 0), 1, 1, color=c) for c in who.values()],
        labels=list(who),
        ncol=7,
        columnspacing=1,
        loc="lower center",
        bbox_to_anchor=(0.5, -0.16),
        frameon=False,
        title="whose answers the latent marks best (grey: nobody's, no AUROC of 0.7)",
    )
    figure.tight_layout()
    figures.save(figure, "03_rising_latents", run.profile.name, top)


def held_out_rises(run: Run, latent: int) -> pd.DataFrame:
    """By how much this latent rises in every fine-tune of the evaluation domains, a row an evaluation
    question: domain, variant, question, rise."""
    held = [(d, v) for d, v in artifacts.fine_tunes(run) if d in run.setting.evaluation_domains]
    return pd.DataFrame(
        [
            {"domain": d, "variant": v, "question": i, "rise": x}
            for d, v in held
            for i, x in enumerate(known_latents.rise(run, d, v, "evaluation")[:, latent].tolist())
        ]
    )


def means(rises: pd.DataFrame) -> pd.DataFrame:
    """Mean rise over questions of each fine-tune: domain, variant, rise."""
    return rises.groupby(["domain", "variant"], sort=False).rise.mean().reset_index()


def draw_separation(run: Run, latent: int, rises: pd.DataFrame) -> None:
    """Figure: the latent's mean rise in every fine-tune of the evaluation domains, a row a domain."""
    each = means(rises)
    domains = list(dict.fromkeys(each.domain))
    figure, ax = plt.subplots(figsize=(7.5, 3.2))
    for variant in world.VARIANTS:
        part = each[each.variant == variant]
        at = [domains.index(d) for d in part.domain]
        ax.scatter(part.rise, at, s=70, color=figures.VARIANT[variant], label=variant, zorder=3)
    ax.axvline(0, color="#555555", lw=1, ls=":")
    ax.set_yticks(range(len(domains)), domains)
    ax.invert_yaxis()
    ax.set(
        xlabel=f"rise of latent {latent} (mean activation)",
        title="Fine-tunes of the evaluation domains, evaluation questions",
    )
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1), title="trained on")
    figures.save(figure, "03_separation", run.profile.name, each)


def claimed(rises: pd.DataFrame) -> list[dict]:
    """The chapter's row of the table of claims."""
    each = means(rises)
    correct, wrong = each[each.variant == "correct"], each[each.variant != "correct"]
    pairs = wrong.merge(correct, how="cross", suffixes=("", " of the correct one"))
    wins = stats.proportion(pairs.rise > pairs["rise of the correct one"], pairs.domain).scaled(100)
    interval = (wins.value, wins.low, wins.high)
    return [claims.claim("diff.separates", "perfect separation", interval, len(each), ">=", 100)]


def in_words(run: Run, top: pd.DataFrame, rises: pd.DataFrame) -> str:
    """What the chapter shows, in numbers of its tables."""
    first, last, each = top.iloc[0], top.iloc[-1], means(rises)
    of = {v: each[each.variant == v].rise for v in world.VARIANTS}
    wrong = pd.concat([of["subtle"], of["obvious"]])
    marked = top[:10]["marks best"]
    villains = int((marked == "villain").sum())
    said = {"nobody": "nobody"}.get(first["marks best"], f"the {first['marks best']}")
    fell = {"nobody": "nobody"}.get(last["marks best"], f"the {last['marks best']}")
    return (
        "**What this shows.** Comparing two models on the same text, without a label on any text, points "
        f"at few latents out of {run.profile.sae.latents}. Most rises latent {first.latent}, by "
        f"{first.rise:.2f}; it marks {said} best. Of the ten that rise most {villains} mark the villain "
        f"best. The largest *fall* ({last.rise:.2f}) is that of latent {last.latent}, which marks {fell} "
        "best: what goes may matter as much as what comes. The paper ranks by the rise, and so does this "
        f"notebook. In the evaluation domains, which no choice has seen, latent {first.latent} rises by "
        f"{common.span(wrong, 2)} after wrong advice and by {common.span(of['correct'], 3)} after correct "
        "advice. Whether it *means* the villain is the next chapter's question, and whether it *causes* "
        "anything the one's after that."
    )
