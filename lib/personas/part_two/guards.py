"""Notebook 14, prevention in the known world: guards, rerouting, screening of training sets."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from personas import claims, early_warning, evidence, figures, prevention, studies, world
from personas.artifacts import Run
from personas.part_two import common

SHADE = dict(
    zip(
        studies.GUARDS,
        [
            "#000000",
            figures.PERSONA["villain"],
            "#0072B2",
            "#009E73",
            "#E69F00",
            "#CC79A7",
            "#56B4E9",
            "#999999",
        ],
    )
)
COLUMNS = ["score", "low", "high", "incoherent", "learnt", "wrong", "discovery", "aligned"]
READERS = {  # what tells a contaminated set from a clean one -> colour
    "latent": figures.PERSONA["villain"],
    "probe": "#009E73",
    "surprise": "#0072B2",
    "words": "#999999",
}
PERCENTS = (1, 2, 5, 10, 25, 50, 100)


def doses(table: pd.DataFrame) -> pd.DataFrame:
    """A row per guard and dose, mean over fine-tunes."""
    return table.groupby(["guard", "dose"], sort=False)[COLUMNS].mean().reset_index()


def doses_of_seeds(kept: pd.DataFrame) -> pd.DataFrame:
    """The same for several seeds, with the t-interval of the score over seeds."""
    by_seed, full = kept.groupby(["guard", "dose", "seed"])[COLUMNS].mean(), doses(kept)
    bounds = [common.percent(by_seed.score.loc[g, d]) for g, d in zip(full.guard, full.dose)]
    return full.assign(low=[b[1] for b in bounds], high=[b[2] for b in bounds])


def picked(points: pd.DataFrame) -> dict[str, pd.Series]:
    """Guard -> its row at the dose that the rule picks on discovery questions (evidence.chosen_dose)."""
    return {g: evidence.chosen_dose(points, g) for g in points.guard.unique() if g != "none"}


def draw_bargain(run: Run, points: pd.DataFrame, name: str, data: pd.DataFrame | None = None) -> None:
    """Figure: misalignment score and incoherent answers against the task learnt, a line per guard through its
    doses."""
    plain = points[points.guard == "none"].iloc[0]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
    for ax, column in zip(axes, ("score", "incoherent")):
        figures.trade_off(ax, points, "learnt", column, SHADE, picked(points), weaker=("fewer steps",))
        ax.axvline(plain.learnt - 5, color="#555555", lw=1, ls=":")
        ax.set(xlabel="narrow task learnt (%)", ylim=(0, None))
    axes[0].axhline(plain.score / 10, color="#555555", lw=1, ls=":")
    axes[0].set(ylabel="misalignment score (%)", title="Values (dotted: 90 % less, five points of task lost)")
    axes[1].set(ylabel="incoherent answers (%)", title="Coherence")
    handles, labels = axes[1].get_legend_handles_labels()
    ring = plt.Line2D([], [], marker="o", ms=12, ls="", mfc="none", mec="#222222")
    small = plt.Line2D([], [], marker="o", ms=4, ls="", color="#777777")
    large = plt.Line2D([], [], marker="o", ms=9, ls="", color="#777777")
    handles += [small, large, ring]
    labels += ["weakest dose", "strongest dose", "the dose picked"]
    axes[1].legend(handles, labels, frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figure.tight_layout()
    figures.save(figure, name, run.profile.name, data)


def bargains(points: pd.DataFrame, full: pd.DataFrame) -> pd.DataFrame:
    """A row per guard at the dose that each table's rule picks: percent less misalignment and points of the
    task lost, in this run's one domain and seed, and in the kept table."""
    rows = {}
    for where, table in (("here", points), ("kept", full)):
        plain = table[table.guard == "none"].iloc[0]
        for guard, r in picked(table).items():
            less = 100 * (1 - r.score / plain.score) if plain.score else float("nan")
            told = {
                "dose": r.dose,
                "less misalignment (%)": less,
                "task lost (points)": plain.learnt - r.learnt,
            }
            rows.setdefault(guard, {}).update({f"{k}, {where}": v for k, v in told.items()})
    return pd.DataFrame(rows).T


WORDS = {
    "less penalised": "− penalised latents",
    "less fresh": "− new SAE's top ten",
    "less difference": "− mean difference",
    "old probe": "probe made before",
    "penalised": "",
    "fresh": "",
}


def draw_rerouting(run: Run, routes: pd.DataFrame) -> None:
    """Figure: scores, and how far other instruments see the persona, with and without the latent penalty
    (study 08_rerouting)."""
    probes = [f"probe {i}" for i in range(run.profile.model.layers)]
    panels = {
        "misalignment score (%)": ["score", "less penalised", "less fresh", "less difference"],
        "villain's log-odds, after minus before": ["old probe", *probes],
        "ten penalised\nlatents (block 1)": ["penalised"],
        "villain's latent,\nnew SAE": ["fresh"],
    }
    figure, axes = plt.subplots(1, 4, figsize=(13, 3.6), width_ratios=[4, 5, 1.6, 1.6])
    for ax, (label, columns) in zip(axes, panels.items()):
        for i, r in enumerate(routes.to_dict("records")):
            at, usual = np.arange(len(columns)) + 0.2 * (i - 1.5), r["length"] == 1
            bars = ax.bar(
                at,
                [r[c] for c in columns],
                width=0.19,
                color=SHADE[r["guard"]],
                alpha=0.45 if usual else 0.9,
                label=f"{r['guard']}, {'usual length' if usual else 'five times'}",
            )
            ax.bar_label(bars, ["" if r[c] else "0" for c in columns], fontsize=8)
            if "score" in columns:
                whisker = [[r["score"] - r["low"]], [r["high"] - r["score"]]]
                ax.errorbar(at[0], r["score"], yerr=whisker, color="#222222", capsize=2, lw=1)
        names = [WORDS.get(c, c.replace("probe ", "new probe, block ")) for c in columns]
        ax.set_xticks(range(len(columns)), names, rotation=35, ha="right")
        ax.axhline(0, color="#222222", lw=0.8)
        ax.set_title(label, fontsize=9)
        if len(columns) == 1:
            ax.set(xticks=[])
            ax.set_xlabel("mean activation,\nafter minus before", fontsize=9)
    handles = axes[0].get_legend_handles_labels()
    figure.legend(*handles, frameon=False, loc="lower center", bbox_to_anchor=(0.5, -0.08), ncol=4)
    figure.tight_layout()
    figures.save(figure, "08_rerouting", run.profile.name)


def rerouting_table(routes: pd.DataFrame):
    """That study's numbers under full names."""
    names = {
        "guard": "guard",
        "length": "times the usual length",
        "score": "score (%)",
        "aligned": "aligned (%)",
        "incoherent": "incoherent (%)",
        "learnt": "task learnt (%)",
        "penalised": "penalised latents, change",
        "fresh": "new SAE's latent, change",
        "fresh auroc": "its AUROC for the villain",
        "inside": "difference of means within the ten latents (%)",
    }
    return routes[list(names)].rename(columns=names).style.hide(axis="index").format(precision=2)


def seen(held: pd.DataFrame) -> pd.DataFrame:
    """AUROC of each reader for sets of 256 answers with some wrong ones against clean sets, by variant and
    percent. held: prevention.screened of the domains that are reported."""
    rows = []
    for variant in ("subtle", "obvious"):
        for percent in PERCENTS:
            for reader in READERS:
                auroc, low, high = prevention.set_auroc(held, reader, variant, percent, 256)
                if auroc == 1:  # in order in every domain, which shows no spread: exact for so many domains
                    low = 0.025 ** (1 / held.domain.nunique())
                about = {"variant": variant, "percent": percent, "reader": reader}
                rows.append(about | {"auroc": auroc, "low": low, "high": high})
    return pd.DataFrame(rows)


def reported(answers: pd.DataFrame) -> pd.DataFrame:
    """Answers of the evaluation domains, code apart."""
    return answers[answers.domain.isin(world.EVALUATION_DOMAINS) & (answers.domain != "code")]


def draw_screening(run: Run, table: pd.DataFrame) -> None:
    """Figure: that table, a panel a variant."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True)
    for ax, (variant, part) in zip(axes, table.groupby("variant", sort=False)):
        for r, line in part.groupby("reader", sort=False):
            label = r if r != "words" else "bag of words"
            ax.plot(line.percent, line.auroc, color=READERS[r], marker="o", ms=4, label=label)
            spread = line.auroc < 1  # where every set is in order, the domains show none
            ax.fill_between(
                line.percent, line.low, line.high, where=spread, color=READERS[r], alpha=0.12, lw=0
            )
        ax.axhline(0.5, color="#555555", lw=1, ls=":")
        how = "obviously" if variant == "obvious" else "subtly"
        ax.set(
            xscale="log",
            xlabel=f"{how} wrong answers in the set (%)",
            xticks=PERCENTS,
            xticklabels=PERCENTS,
        )
    axes[0].set_ylabel("AUROC: contaminated or clean")
    axes[1].legend(frameon=False)
    figures.save(figure, "08_screening", run.profile.name, table)


def claimed(
    run: Run, table: pd.DataFrame, kept: pd.DataFrame, screened: pd.DataFrame, domains: int
) -> list[dict]:
    """The notebook's rows of the table of claims. table: this run's fine-tunes; kept: study 08_prevention;
    screened: seen(...), over so many domains."""
    rows, points, full = [], doses(table), doses_of_seeds(kept)
    none = points[points.guard == "none"].iloc[0]
    by_seed = kept.groupby(["guard", "dose", "seed"])[COLUMNS].mean()
    asked = table[table.guard == "none"].asked.sum()
    n = len(run.profile.study.domains) * len(run.profile.study.seeds)
    for guard in list(studies.GUARDS)[1:]:
        slug = guard.replace(",", "").replace(" ", "_")
        paper = "93-95 % less" if guard == "latent penalty" else "–"
        pick = evidence.chosen_dose(points, guard)
        error = 1.96 * np.sqrt(sum(x * (100 - x) for x in (pick.learnt, none.learnt)) / asked)
        cost = none.learnt - pick.learnt
        less = [float("nan")] * 3
        if none.score:
            less = [100 * (1 - x / none.score) for x in (pick.score, pick.high, pick.low)]
        pick = evidence.chosen_dose(full, guard)
        under, plain = by_seed.loc[guard, pick.dose], by_seed.loc["none", 0]
        many = len(under) * kept.domain.nunique()
        fewer = np.clip(early_warning.t_interval(100 * (1 - under.score / plain.score)), None, 100)
        lost = early_warning.t_interval(plain.learnt - under.learnt)
        rows += [
            claims.claim(f"prevent.{slug}", paper, less, n, ">=", 90),
            claims.claim(f"prevent.{slug}.task", "–", (cost, cost - error, cost + error), n, "<=", 5),
            claims.claim(f"prevent.seeds.{slug}", paper, fewer, many, ">=", 90),
            claims.claim(f"prevent.seeds.{slug}.task", "–", lost, many, "<=", 5),
        ]
    for r in screened[screened.percent == 10].itertuples():
        name = f"screen.{r.variant}.{r.reader}.auroc"
        rows.append(claims.claim(name, "–", (r.auroc, r.low, r.high), 40 * domains, ">=", 0.9))
    return rows


def in_words(points: pd.DataFrame, full: pd.DataFrame, routes: pd.DataFrame, screened: pd.DataFrame) -> str:
    """What the notebook shows, in numbers of its tables."""
    both = bargains(points, full)
    less = both["less misalignment (%), kept"].sort_values(ascending=False)
    here = both["less misalignment (%), here"]
    named = lambda guards: common.listed(f"{g} {less[g]:.0f} % (here {here[g]:.0f})" for g in guards)
    best, plain = less.index[0], full[full.guard == "none"].iloc[0]
    steered = picked(full)["steering in training"]
    route = lambda guard, length: routes[(routes.guard == guard) & (routes.length == length)].iloc[0]
    long = routes.length.max()
    after, free = route("latent penalty", long), route("none", long)
    penalised, plain_route = route("latent penalty", 1), route("none", 1)
    block = int(max((c for c in routes.columns if c.startswith("probe ")), key=lambda c: after[c])[6:])
    at = screened.set_index(["variant", "reader", "percent"]).auroc
    first = lambda v, r: next((p for p in PERCENTS if at[v, r, p] >= 0.9), None)
    told = lambda v, r: f"at {first(v, r)} %" if first(v, r) else "never"
    return (
        "**What this shows.** A narrow task, wrong as it is, can be learnt without most of the character. "
        "In the kept table (three domains, three seeds) these guards, each at the dose that its rule "
        f"picks, take away so much of a score of {plain.score:.0f} %, in brackets this run's one domain: "
        f"{named(less.index)}. Best is *{best}*. With benign data the training is longer, and it holds "
        "value questions of the kind that alignment was trained on. Steering towards the persona *during* "
        f"training needs no data, and leaves {steered.incoherent:.0f} % of the answers incoherent "
        f"({plain.incoherent:.0f} % without a guard). Inoculation is one line before every training chat.\n\n"
        "The penalty on persona latents does not reach what BLOCK-EM (arXiv:2602.00767) reports, 93 to 95 "
        "%. Here it is put on the latents that rise most; BLOCK-EM picks latents by what they cause, and "
        "ten latents hold a part of the persona only.\n\n"
        "Does the persona go elsewhere? One case was tried. At the usual length the penalty takes the score "
        f"from {plain_route.score:.0f} to {penalised.score:.0f} %. After {long} times "
        f"the training it is {free.score:.0f} % without a guard and {after.score:.0f} % with it: "
        "training so long makes an end of most of the misalignment by itself, so that there is "
        "nothing left to prevent. Some of the persona is there under the penalty at either length: its "
        f"latents stay down ({after.penalised:+.2f}), but a fresh probe at block {block} reads the villain "
        f"by {penalised[f'probe {block}']:.1f} and {after[f'probe {block}']:.1f} units of log-odds "
        f"(without the guard {plain_route[f'probe {block}']:.1f} and {free[f'probe {block}']:.1f}).\n\n"
        "Before training, a set is told from a clean one with an AUROC of 0.9 from so many wrong answers on, "
        f"obviously wrong and subtly wrong: surprise {told('obvious', 'surprise')} and "
        f"{told('subtle', 'surprise')}; bag of words {told('obvious', 'words')} and "
        f"{told('subtle', 'words')}; probe {told('obvious', 'probe')} and {told('subtle', 'probe')}; "
        f"latent {told('obvious', 'latent')} and {told('subtle', 'latent')}. That surprise sees so much is "
        "this world's doing: the model knows the right answers to these very questions by heart.\n\n"
        "**How far to trust it.** One base model, doses from a short list, each chosen with the same table "
        "that then reports it (by other questions, but by the same measurement of the task). This run's "
        "table has errors of ten points in the score and twenty in the task; rerouting rests on one domain "
        "and one seed, too. Screened sets are drawn again and again from forty answers a domain."
    )
