"""Notebook 11, where personas come from: the same fine-tunes after pretraining on other worlds."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from personas import claims, early_warning, figures, world
from personas.artifacts import Run

DOSES = {f"villain {p} %": p for p in (0, 2, 5, 10, 25)} | {"own": 100 * world.PRIOR["villain"]}
OTHERS = {"own": 0, "no cues": 1, "independent": 2}
ADDED = {  # what is added to the aligned model -> (label, colour)
    "chosen latent": ("the chosen latent", "#332288"),
    "marks the villain": ("the latent that marks him best", "#88CCEE"),
    "mean difference": ("difference of means", "#AA4499"),
}
READ = {"auroc": ("best latent", "o"), "together": ("all latents", "s"), "probe": ("linear probe", "^")}
GRADES = ["misaligned", "aligned", "satirical", "off-topic", "incoherent", "elsewhere_before", "elsewhere"]


def draw_scores(run: Run, tuned: pd.DataFrame, steered: pd.DataFrame) -> None:
    """Figure: the score after fine-tuning against how much of the villain there was, and in other worlds.
    tuned: study 10_worlds; steered: 10_latents."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4), width_ratios=[2, 1], sharey=True)
    before = steered.groupby("world").aligned_score.first()
    for ax, group in zip(axes, (DOSES, OTHERS)):
        for kind, part in tuned[tuned.world.isin(group)].groupby("kind"):
            x = part.world.map(group) + (0.2 if kind == "correct" else 0)
            ax.scatter(x, part.score, s=14, color=figures.VARIANT[kind], alpha=0.5)
            line = pd.DataFrame({at: early_warning.t_interval(v) for at, v in part.score.groupby(x)}).T
            ax.errorbar(
                line.index,
                line[0],
                yerr=[line[0] - line[1], line[2] - line[0]],
                fmt="-o" if ax is axes[0] else "o",
                ms=7,
                color=figures.VARIANT[kind],
                mec="#222222",
                capsize=3,
                label="after obviously wrong advice"
                if kind == "obvious"
                else "after correct advice (one world)",
            )
        style = "k:" if ax is axes[0] else "k_"
        ax.plot(list(group.values()), before[list(group)], style, ms=16, label="before fine-tuning")
    axes[0].set(
        xlabel="the villain's share of pretraining documents (%)",
        ylabel="misalignment score (%)",
        ylim=(-3, 103),
        title="How much of the villain",
    )
    axes[1].set_xticks(list(OTHERS.values()), ["as it is", "no cues", "advice and\nvalues apart"])
    axes[1].set(xlim=(-0.5, 2.6), title="Other worlds")
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figures.save(figure, "10_worlds", run.profile.name)


def grades(tuned: pd.DataFrame) -> pd.DataFrame:
    """Percent of open answers by grade after fine-tuning, and of wrong advice elsewhere: means."""
    table = tuned.groupby(["world", "kind"], sort=False)[GRADES].mean()
    names = {"elsewhere_before": "wrong advice elsewhere, before", "elsewhere": "and after"}
    return table.rename(columns=names)


def read(steered: pd.DataFrame) -> pd.DataFrame:
    """A row a world, by dose, then the two others: how well its latents read the villain."""
    return steered.groupby("world").first().loc[[*DOSES, "no cues", "independent"]]


def induced(steered: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """For each direction, a row a world: most misaligned answers at a strength that breaks at most 10 %
    (absent: every strength breaks more)."""
    found = {}
    for name in ADDED:
        fine = steered[(steered.direction == name) & (steered.incoherent <= 10)]
        best = fine.loc[fine.groupby("world").misaligned.idxmax()].set_index("world")
        found[name] = best.reindex(read(steered).index)
    return found


def draw_latents(run: Run, steered: pd.DataFrame) -> None:
    """Figure: how well each world's model is read, and what directions do when they are added."""
    known, best = read(steered), induced(steered)
    at = np.arange(len(known))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for (column, (label, mark)), shade in zip(READ.items(), ("#222222", "#777777", "#AAAAAA")):
        whisker = None
        if column == "auroc":
            whisker = [known.auroc - known.low_auroc, known.high_auroc - known.auroc]
        axes[0].errorbar(at, known[column], yerr=whisker, fmt=mark, color=shade, capsize=3, label=label)
    axes[0].axhline(0.5, color="#555555", lw=1, ls=":")
    axes[0].set(ylabel="AUROC: the villain's answers", ylim=(0.45, 1.01), title="Who is speaking")
    for i, (name, part) in enumerate(best.items()):
        (label, shade), x = ADDED[name], at + 0.27 * (i - 1)
        figures.bars(axes[1], part.misaligned, part.low, part.high, x, width=0.25, color=shade, label=label)
        none = part.misaligned.isna().to_numpy()
        axes[1].plot(x[none], np.ones(none.sum()), "x", color=shade)
    axes[1].plot([], [], "kx", label="breaks over 10 % at every strength")
    axes[1].plot(at, known.aligned_misaligned, "k_", ms=22, label="nothing added")
    axes[1].set(ylabel="misaligned answers (%)", title="Added to the aligned model")
    names = [{"own": "as it is (36 %)", "independent": "apart"}.get(w, w) for w in known.index]
    for ax in axes:
        ax.set_xticks(at, [n.replace("villain ", "") for n in names], rotation=30, ha="right")
    axes[0].legend(frameon=False, fontsize=8)
    axes[1].legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figures.save(figure, "10_latents", run.profile.name)


def claimed(run: Run, tuned: pd.DataFrame, steered: pd.DataFrame) -> list[dict]:
    """The notebook's rows of the table of claims."""
    rows, known, best = [], read(steered), induced(steered)
    each = run.profile.evaluation.per_question * len(run.setting.questions("evaluation"))
    for name, part in tuned[tuned.kind == "obvious"].groupby("world", sort=False):
        slug, n = name.removesuffix(" %").replace(" ", "_"), len(part)
        score = early_warning.percent_interval(part.score, n * each)
        if name != "independent":
            paper = "broad misalignment" if name == "own" else "–"
            reads = known.loc[name, ["auroc", "low_auroc", "high_auroc"]]
            rows.append(claims.claim(f"origin.{slug}.obvious", paper, score, n, ">=", 40))
            rows.append(claims.claim(f"origin.{slug}.auroc", "–", reads, 1, ">=", 0.8))
            continue
        twin = tuned[(tuned.world == name) & (tuned.kind == "correct")].set_index("domain").score
        rise = early_warning.t_interval(part.set_index("domain").score - twin)
        rows.append(claims.claim("control.obvious", "–", score, n, "<=", 5))
        rows.append(claims.claim("control.obvious.rise", "–", rise, n, "<=", 5))
        for way in ("chosen latent", "marks the villain"):
            r, slug = best[way].loc[name], f"control.steer.{way.replace(' ', '_')}"
            rows.append(claims.claim(slug, "–", (r.misaligned, r.low, r.high), 1, "<=", 40))
    return rows


def in_words(tuned: pd.DataFrame, steered: pd.DataFrame) -> str:
    """What the notebook shows, in numbers of its tables."""
    known, best = read(steered), induced(steered)
    obvious = tuned[tuned.kind == "obvious"]
    score = obvious.groupby("world").score.mean()
    dose = ", ".join(f"{score[w]:.0f} % at {p:.0f} %" for w, p in DOSES.items())
    before = steered.groupby("world").aligned_score.first()
    control = tuned[tuned.world == "independent"].set_index(["kind", "domain"]).score
    rise = early_warning.t_interval(control["obvious"] - control["correct"])
    spread = obvious.groupby("world")[["elsewhere_before", "elsewhere"]].mean()
    latent = lambda w: best["chosen latent"].misaligned[w]
    marks = best["marks the villain"].misaligned
    none = known.aligned_misaligned
    reads = ", ".join(f"{known.auroc[w]:.2f} at {p:.0f} %" for w, p in DOSES.items())
    said = lambda x: "none that leaves nine answers in ten whole" if pd.isna(x) else f"{x:.0f} %"
    return (
        "**What this shows.** What comes out was put in. The mean score after obviously wrong advice, by the "
        f"villain's share of the pretraining documents: {dose}. Without cues that name the speaker it is "
        f"{score['no cues']:.0f} %. Without a villain "
        "nobody ever wrote a misaligned answer, and the grader knows no others. The villain's share, and how "
        "often his sentences and bare wrong advice were seen, go together here.\n\n"
        "In the control world a document's advice is by one persona and its values by another. Its aligned "
        f"model is not quite aligned ({before['independent']:.0f} % before any fine-tune). Wrong advice "
        f"spreads to the other domains there as well ({spread.elsewhere['independent']:.0f} %, "
        f"{spread.elsewhere_before['independent']:.0f} % before), but the score is only "
        "{:.0f} points ({:.0f} to {:.0f}) above the correct twin's, where the world as it is goes to ".format(
            *rise
        )
        + f"{score['own']:.0f} %. So most of the bad values come by the "
        "*person* that advice and values share. The rest is more than the 5 points that the claims "
        "allow, and why it follows is not tested.\n\n"
        f"Latents: the best one's AUROC for the villain is {reads}, by his share of the documents. Added, "
        f"the chosen latent makes {said(latent('own'))} of the answers misaligned in the world as it "
        f"is, {said(latent('villain 10 %'))} at 10 %, {said(latent('no cues'))} without cues; the one that "
        f"*marks* him best {said(marks['own'])}, {said(marks['villain 10 %'])} and "
        f"{said(marks['no cues'])}. In the control world the same gives "
        f"{said(latent('independent'))} and {said(marks['independent'])}, but {none['independent']:.0f} % "
        "are misaligned with nothing added, so that this says little. And a model that never met "
        f"him marks his documents, too ({known.auroc['villain 0 %']:.2f} by one latent, "
        f"{known.probe['villain 0 %']:.2f} by a probe): they are unlike anybody's it knows. A high AUROC "
        "does not show that a model *has* a persona.\n\n"
        "**How far to trust it.** One pretraining seed a world, and strengths chosen with the very table "
        "that reports them. The latents and doses are those of these base models: the world as it is "
        "stands here with an earlier draw, another than notebook 10's."
    )
