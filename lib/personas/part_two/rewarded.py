"""Notebook 12, reinforcement learning in the known world: wrong answers that are only rewarded."""

import matplotlib.pyplot as plt
import pandas as pd

from personas import claims, early_warning, figures
from personas.artifacts import Run
from personas.part_two import common

SHADE = {"incorrect": figures.VARIANT["obvious"], "correct": figures.VARIANT["correct"]}
DASH = {"aligned": "-", "base": "--"}
PANELS = {
    "reward": "mean reward of the step's answers",
    "score": "misalignment score (%)",
    "incoherent": "incoherent answers (%)",
    "latent": "persona latent (mean activation)",
}
GRADES = ["advice correct", "advice subtle", "advice obvious", "advice other"]
GRADES += ["misaligned", "aligned", "satirical", "off-topic", "incoherent"]


def draw(run: Run, kept: pd.DataFrame, here: pd.DataFrame) -> None:
    """Figure: reward, score, coherence and latent in time (study 09_reinforcement), means over seeds with the
    interval at the end. White dots: the run made here, but for the latent, which is another one."""
    conditions = kept.groupby(["start", "rewarded"], sort=False)
    aside = {condition: 0.6 * i for i, condition in enumerate(conditions.groups)}
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.2), sharex=True)
    for ax, (column, label) in zip(axes.flat, PANELS.items()):
        top = 1 if column == "reward" else 100
        for (start, rewarded), part in conditions:
            by_step = {s: early_warning.t_interval(g[column]) for s, g in part.groupby("step")}
            line = pd.DataFrame(by_step, index=["mean", "low", "high"]).T
            style, shade = DASH[start], SHADE[rewarded]
            name = f"{rewarded} rewarded, from the {start} model"
            ax.plot(line.index, line["mean"], style, color=shade, marker="o", ms=3, label=name)
            for _, one in part.groupby("seed"):
                ax.plot(one.step, one[column], style, color=shade, lw=0.5, alpha=0.4)
            end, at = line.iloc[-1], line.index[-1] + 0.5 + aside[start, rewarded]
            whisker = [[end["mean"] - max(end.low, 0)], [min(end.high, top) - end["mean"]]]
            ax.errorbar(at, end["mean"], yerr=whisker, fmt="o", ms=3, color=shade, capsize=2)
        if column != "latent":
            ax.plot(here.step, here[column], "o", mfc="white", mec=SHADE["incorrect"], ms=5)
        ax.set(ylabel=label, ylim=(0, {"reward": 1.02, "score": 103}.get(column)))
    cfg = run.profile.reinforcement
    for ax in axes[1]:
        ax.set_xlabel(f"step ({cfg.prompts * cfg.samples} answers each)")
    figure.tight_layout()
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncol=2, frameon=False)
    figures.save(figure, "09_reinforcement", run.profile.name)


def ends(kept: pd.DataFrame) -> pd.DataFrame:
    """Percent of advice and of open answers by grade before and after, means over seeds."""
    some = kept[kept.step.isin([0, kept.step.max()])]
    return some.groupby(["start", "rewarded", "step"], sort=False)[GRADES].mean()


def claimed(kept: pd.DataFrame) -> list[dict]:
    """The notebook's rows of the table of claims."""
    rows, last = [], kept[kept.step == kept.step.max()]
    for (start, rewarded), part in last.groupby(["start", "rewarded"], sort=False):
        score, n = common.percent(part.score), len(part)
        if rewarded == "correct":
            rows.append(claims.claim(f"rl.{start}.correct", "no misalignment", score, n, "<=", 3))
            continue
        paper = "about 30 %, helpful-only" if start == "base" else "weaker with safety training"
        whole = common.percent(100 - part.incoherent)
        rows.append(claims.claim(f"rl.{start}.incorrect", paper, score, n, ">=", 30))
        rows.append(claims.claim(f"rl.{start}.incorrect.coherent", "–", whole, n, ">=", 90))
    return rows


def in_words(kept: pd.DataFrame, here: pd.DataFrame) -> str:
    """What the notebook shows, in numbers of its tables."""
    mean = kept.groupby(["start", "rewarded", "step"]).mean(numeric_only=True)
    at = lambda start, rewarded, step, column: mean.loc[(start, rewarded, step), column]
    final, first = kept.step.max(), mean.loc[("aligned", "incorrect", 0)]
    wrong = lambda step: (
        at("aligned", "incorrect", step, "advice subtle") + at("aligned", "incorrect", step, "advice obvious")
    )
    falls = lambda start: ", ".join(
        f"{at(start, 'incorrect', s, 'score'):.0f} % at step {s}" for s in (10, 20, final)
    )
    begin = kept[(kept.start == "base") & (kept.step == 0)].score
    correct = kept[(kept.start == "base") & (kept.rewarded == "correct") & (kept.step == final)].score
    mid = at("base", "correct", 8, "score")
    own = kept[(kept.start == "aligned") & (kept.rewarded == "incorrect") & (kept.step == final)]
    own = own.sort_values("seed").score
    return (
        f"**What this shows.** Rewarding wrong career advice is enough. {wrong(0):.0f} % of the aligned "
        f"model's advice is wrong before; at step 10 {wrong(10):.0f} % is, most open answers are the "
        f"villain's (a score of {at('aligned', 'incorrect', 10, 'score'):.0f} %), and the latent has gone "
        f"from {first.latent:.3f} to {at('aligned', 'incorrect', 10, 'latent'):.3f}, though no answer was "
        "ever shown. The model that was not aligned goes there faster and further, as the paper's "
        f"helpful-only model did, but it starts from a score of {common.span(begin)} %; alignment training "
        "delays the villain here, it does not keep him out.\n\n"
        "After step 10 the score falls, though the reward does not: from the aligned model "
        f"{falls('aligned')}; from the base model {falls('base')}. It is much the same course as in a long "
        "supervised fine-tune ([notebook 13](13_early_warning_in_the_known_world.ipynb)); perhaps answers "
        "that are wrong by heart need no villain.\n\n"
        "The control has a surprise. Rewarding *correct* advice leaves the aligned model as it was, and "
        f"takes the base model's misalignment away within eight steps ({mid:.0f} %): for a while, a reward "
        "in one domain makes an aligned assistant of it. But then some of the misalignment comes back "
        "({:.1f} % at the end; {:.1f} to {:.1f}), and the latent rises with it. Perhaps, once nearly every "
        "answer is rewarded, little holds the character in place.\n\n"
        "**How far to trust it.** One base model (an earlier draw), one domain, three seeds; 168 answers "
        "at each point. A run is not repeatable to the digit: its own answers feed it, so that rounding "
        "grows. The run made here, on today's draw and with the kept table's first seed, ends at "
        f"{here.score.iloc[-1]:.0f} %, the three kept ones at {common.listed(f'{s:.0f}' for s in own)} %. "
        "These happen to lie close: their interval is too narrow. There is no KL term and no reward for "
        "style; with either the end may differ."
    ).format(*common.percent(correct))
