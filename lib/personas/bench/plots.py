"""The bench's figures and claims, for notebook 15."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml
from matplotlib.transforms import ScaledTranslation

from personas import claims, stats
from personas.bench import methods, run, score

SHADE = {"": "#0072B2", "labels": "#009E73", "control": "#999999", "truth": "#222222"}
SHAPE = {"": "o", "labels": "s", "control": "x", "truth": "D"}
NAMES = {
    "": "given what a real model's researcher has",
    "labels": "given labels or names of personas",
    "control": "random, a control",
    "truth": "told the answer",
}


def group(method: str) -> str:
    """'control', 'truth', 'labels' (of documents, or the personas' names) or '' for all others."""
    uses = getattr(methods.load(method), "USES", "") if method in methods.names() else ""
    if method.startswith("random"):
        return "control"
    if method == run.CEILING:
        return "truth"
    return "labels" if "label" in uses or "name" in uses else ""


def order(table: pd.DataFrame) -> list[str]:
    """The methods, best mean rank first, the one that is told the answer before all."""
    ranks = run.summary(table).groupby("method")["rank"].mean()
    return ranks.sort_values(na_position="first").index.tolist()


def forest(table: pd.DataFrame):
    """A panel for each question, a line for each method: mean over base models with its interval."""
    found, names = run.summary(table), order(table)
    figure, axes = plt.subplots(2, 3, figsize=(12, 9.5), sharey=True)
    for ax, (question, heading) in zip(axes.flat, score.QUESTIONS.items()):
        part = found[found.question == question].set_index("method").reindex(names)
        share = question in ("named", "auroc", "separates")
        for kind in SHADE:
            at = np.array([i for i, m in enumerate(names) if group(m) == kind])
            mine = part.iloc[at]
            low, high = (mine[c].fillna(mine.value) for c in ("low", "high"))
            ax.errorbar(
                mine.value,
                at,
                xerr=[(mine.value - low).clip(lower=0), (high - mine.value).clip(lower=0)],
                fmt=SHAPE[kind],
                ms=6,
                color=SHADE[kind],
                capsize=2,
                lw=1.2,
                label=NAMES[kind],
            )
        span = (-0.05, 1.05) if share else (-30, 106) if question == "suppressed" else None
        span = span or (-1, 10 * np.ceil(part[["value", "high"]].max().max() / 10))
        ax.set(xlim=span, title=heading)
        ax.axvline(
            {"named": 1 / 6, "auroc": 0.5, "separates": 0.5}.get(question, 0), color="#555555", ls=":", lw=1
        )
        ax.set_xlabel("share of cases" if question == "named" else "AUROC" if share else "percent")
    for ax in axes[:, 0]:
        ax.set_yticks(range(len(names)), [n.replace("_", " ") for n in names])
        ax.invert_yaxis() if ax is axes[0, 0] else None
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncol=2, frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    return figure


def by_target(table: pd.DataFrame, question: str = "named"):
    """Methods by targets: the mean of one question over base models, domains and dictionaries."""
    counted = table[table.effect >= score.EFFECT]
    wide = counted.pivot_table(index="method", columns="target", values=question)
    wide = wide.reindex([m for m in order(table) if m in wide.index])
    figure, ax = plt.subplots(figsize=(5.6, 5.8))
    image = ax.imshow(wide, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (i, j), value in np.ndenumerate(wide.to_numpy()):
        ax.text(
            j,
            i,
            f"{value:.2f}",
            ha="center",
            va="center",
            color="white" if value > 0.6 else "#222222",
            fontsize=9,
        )
    n = counted.drop_duplicates(["base model", "domain", "target"]).target.value_counts()
    ax.set_xticks(range(len(wide.columns)), [f"{t}\n(n = {n[t]})" for t in wide.columns])
    ax.set_yticks(range(len(wide)), [n.replace("_", " ") for n in wide.index])
    ax.grid(False)
    ax.set_xlabel("whom the fine-tune was made to sound like")
    figure.colorbar(image, label="share of cases named", shrink=0.8)
    figure.tight_layout()
    return figure


def reading_and_steering(table: pd.DataFrame):
    """A dot a method: how well its direction marks the target's answers against how many it induces."""
    wide = run.summary(table).pivot(index="method", columns="question", values="value")
    figure, ax = plt.subplots(figsize=(7.2, 4.8))
    for kind in SHADE:
        mine = wide[[group(m) == kind for m in wide.index]]
        ax.scatter(mine.auroc, mine.induced, s=60, marker=SHAPE[kind], color=SHADE[kind], label=NAMES[kind])
    placed: list = []
    for method, row in wide.sort_values("induced").iterrows():
        near = [y for x, y in placed if abs(x - row.auroc) < 0.12]
        placed.append((row.auroc, max([row.induced, *(y + 0.6 for y in near)])))  # names do not overlap
        ax.annotate(
            method.replace("_", " "),
            (row.auroc, row.induced),
            xytext=placed[-1],
            textcoords=ax.transData + ScaledTranslation(0.09, 0, figure.dpi_scale_trans),
            va="center",
            fontsize=8,
        )
    ax.set(
        xlabel="AUROC of the target's answers (reading)",
        ylabel="answers that become the target's (%, steering)",
    )
    ax.legend(frameon=False, fontsize=8, loc="upper left")
    figure.tight_layout()
    return figure


def measured(table: pd.DataFrame) -> dict[str, stats.Estimate]:
    """The value of every registered claim: a mean over base models, with its interval."""
    counted = table[table.effect >= score.EFFECT]
    over = lambda method, question: counted[counted.method == method].groupby("base model")[question].mean()
    mean = lambda values: stats.mean_over(values.to_numpy())
    named = lambda method: run.estimate(counted[counted.method == method], "named").scaled(100)
    per_model = counted.groupby(["base model", "method"])[["auroc", "induced"]].mean()
    per_model = per_model.drop(index=run.CEILING, level="method", errors="ignore")
    agreement = per_model.groupby("base model")[["auroc", "induced"]].apply(
        lambda g: g.auroc.corr(g.induced, method="spearman")
    )
    screened = counted[counted.method == "rise_screened"]
    induced = over("rise_screened", "induced")
    return {
        "bench.rise.named": named("rise"),
        "bench.screened.induced": run.estimate(screened, "induced"),
        "bench.screened.suppressed": run.estimate(screened, "suppressed"),
        "bench.screened.advice": run.estimate(screened, "advice"),
        "bench.screened.above_difference": mean(induced - over("mean_difference", "induced")),
        "bench.screened.above_top": mean(induced - over("rise", "induced")),
        "bench.probe.named": named("linear_probe"),
        "bench.random.named": named("random_latent"),
        "bench.reading_is_steering": mean(agreement),
    }


def claimed(table: pd.DataFrame) -> list[dict]:
    """The registered claims (claims.yaml) with what was measured."""
    registered = yaml.safe_load((Path(__file__).parent / "claims.yaml").read_text())
    found = measured(table)
    return [
        claims.claim(id, c["paper"], (e.value, e.low, e.high), e.n, c["op"], c["value"])
        for id, c in registered.items()
        for e in [found[id]]
    ]


def in_words(table: pd.DataFrame) -> str:
    """What the table shows, in Markdown, its numbers computed."""
    s = run.summary(table).set_index(["method", "question"]).value
    ranked = run.summary(table)
    ours = ranked[ranked["rank"].notna()]
    best = lambda q: ours[ours.question == q].sort_values("value").iloc[-1].method
    counted = table[table.effect >= score.EFFECT]
    villain = counted[counted.target == "villain"].groupby("method").named.mean()
    others = counted[counted.target != "villain"].groupby("method").named.mean()
    cases = len(counted.drop_duplicates(["base model", "domain", "target"]))
    every = len(table.drop_duplicates(["base model", "domain", "target"]))
    did = lambda m: f"{s[m, 'induced']:.0f} % and {s[m, 'suppressed']:.0f} %"
    at = counted.drop_duplicates(["base model", "domain", "target"]).target.value_counts()
    return f"""
**What this shows.** Three base models and {cases} of {every} cases: intervals are wide, and most claims
stay unclear. The means say this.

*Naming.* The persona vector names the target in {100 * s["persona_vector", "named"]:.0f} % of cases. It
had to be told which personas there are. Of the methods that were told nothing, the screened riser names
{100 * s["rise_screened", "named"]:.0f} %, the top riser without the screen
{100 * s["rise", "named"]:.0f} %, a random direction {100 * s["random_direction", "named"]:.0f} %, a random
latent {100 * s["random_latent", "named"]:.0f} %; three base models cannot rank them.
The villain seems the hard one: the difference of means names him in
{100 * villain["mean_difference"]:.0f} % of his {at["villain"]} cases, and the others in
{100 * others["mean_difference"]:.0f} % of their {cases - at["villain"]}; the screened riser him in
{100 * villain["rise_screened"]:.0f} %, the others in {100 * others["rise_screened"]:.0f} %.

*Steering.* It is weak here for everybody: no method makes more than {s[best("induced"), "induced"]:.0f}
% of the answers the target's. The {best("induced").replace("_", " ")} induces most
({s[best("induced"), "induced"]:.0f} %), the {best("suppressed").replace("_", " ")} suppresses most
({s[best("suppressed"), "suppressed"]:.0f} %). The screened
riser, a single latent, induces {s["rise_screened", "induced"]:.0f} % and suppresses
{s["rise_screened", "suppressed"]:.0f} %. The direction that is *told* the answer marks the target's
answers best (AUROC {s[run.CEILING, "auroc"]:.2f}) and induces only {s[run.CEILING, "induced"]:.0f} %. Over
all methods the two do go together, but that is mostly the failures, which do neither.

*What fails.* Attribution on the fine-tuning chats induces and suppresses {did("attribution")}, the
crosscoder {did("crosscoder")}, a random latent {did("random_latent")}. Both are simple versions (the
crosscoder has 512 latents and 300 steps), and a better one may well do better. That is what the bench is
for.

*What was not foreseen.* A persona that wrote one document in ten comes back only in part: in
{every - cases} of {every} fine-tunes fewer than {score.EFFECT:.0f} % of the answers are the target's,
and these do not count. The limit was set before the run. Stronger fine-tunes and more base models would
decide more.
"""
