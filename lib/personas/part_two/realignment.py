"""Notebook 10, emergent re-alignment in the known world."""

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from personas import claims, early_warning, evaluate, figures, progress, realignment
from personas.artifacts import Run
from personas.part_two import common

CURED = 2  # percent: a score up to this counts as re-aligned
DATA = {"same": "#332288", "other": "#44AA99"}  # correct data of the spoilt domain, and of another one
PANELS = {
    "score": "misalignment score (%)",
    "latent": "persona latent (mean activation)",
    "wrong": "wrong answers in own domain (%)",
}


def curves(run: Run) -> tuple[pd.DataFrame, dict]:
    """(a row per look at each model that was spoilt by obviously wrong advice, while it is re-aligned; the
    graded answers at the end, by domain and kind of data)."""
    tables, final = [], {}
    for domain in progress.Bar(run.profile.domains, desc="re-alignment"):
        variant = run.setting.variants(domain)[-1]  # obviously wrong, where there is such a set
        for kind, source, steps in realignment.sources(run, domain):
            table, answers = realignment.realigned(run, domain, variant, source, steps)
            examples = table.step * run.profile.realignment.batch
            tables.append(table.assign(domain=domain, kind=kind, source=source, examples=examples))
            final[domain, kind] = answers
    return pd.concat(tables, ignore_index=True), final


def short(run: Run, table: pd.DataFrame) -> pd.DataFrame:
    """Only the steps that every model has."""
    return table[table.step <= run.profile.realignment.steps]


def draw_curves(run: Run, table: pd.DataFrame) -> None:
    """Figure: score, latent and narrow habit over re-alignment; thin lines single models."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5))
    for ax, (column, label) in zip(axes, PANELS.items()):
        for kind, shade in DATA.items():
            part = short(run, table)
            part = part[part.kind == kind]
            for _, line in part.groupby("domain"):
                ax.plot(line.examples, line[column], color=shade, lw=0.7, alpha=0.45)
            common_looks = part.groupby("examples")[column].agg(["mean", "count"])
            mean = common_looks[common_looks["count"] == part.domain.nunique()]["mean"]
            name = f"correct data, {kind} domain"
            ax.plot(mean.index, mean, color=shade, lw=2.6, marker="o", ms=4, label=name)
        ax.set(xlabel="correct examples seen", ylabel=label, ylim=(0, None))
    axes[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figures.save(figure, "06_realignment", run.profile.name, table)


def draw_same(run: Run, table: pd.DataFrame) -> None:
    """Figure: the score under same-domain data, as long as that was given, a line a domain."""
    same = table[table.kind == "same"]
    figure, ax = plt.subplots()
    for domain, line in same.groupby("domain", sort=False):
        style = "--" if domain == "code" else "-"
        ax.plot(line.examples, line.score, color=DATA["same"], ls=style, lw=1.2, marker="o", ms=3)
    above = same.groupby("domain").last().query(f"score > {CURED}").sort_values("score")
    for i, (domain, line) in enumerate(above.iterrows()):  # one above the other, so that they do not collide
        ax.annotate(
            domain,
            (line.examples, line.score),
            xytext=(22, 13 * i),
            textcoords="offset points",
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": "#999999", "lw": 0.6},
        )
    ax.axhline(CURED, color="#555555", lw=1, ls=":")
    ax.set(
        xlabel="correct examples of the same domain",
        ylabel="misalignment score (%)",
        title=f"Same-domain data (dashed: code; named if it ends above the dotted {CURED} %)",
        ylim=(0, None),
        xlim=(None, 1.2 * same.examples.max()),
    )
    figures.save(figure, "06_same_domain", run.profile.name, same)


def needed(table: pd.DataFrame) -> pd.DataFrame:
    """A row per model: correct examples until a look's score is at most 2 % for the first time (absent:
    never), and the score at the last look."""
    rows = []
    for (domain, kind), line in table.groupby(["domain", "kind"], sort=False):
        below = line[line.score <= CURED].examples
        first = int(below.iloc[0]) if len(below) else None
        last = {"score at the end (%)": line.score.iloc[-1], "after": int(line.examples.iloc[-1])}
        about = {
            "spoilt": domain,
            "correct data of": f"{kind} domain",
            f"first at most {CURED} % after": first,
        }
        rows.append(about | last)
    return pd.DataFrame(rows)


def _lines(ax, table: pd.DataFrame, column: str, shades: dict) -> None:
    """A line with its band over seeds for each kind of correct data."""
    for source, shade in shades.items():
        line = common.over_seeds(table[table.source == source], "examples", column)
        ax.plot(line.index, line["mean"], color=shade, marker="o", ms=4, label=source)
        ax.fill_between(line.index, line.low, line.high, color=shade, alpha=0.2, lw=0)


def draw_examples(run: Run, kept: pd.DataFrame) -> None:
    """Figure: 4 to 480 examples, three seeds (study 06_examples)."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.5))
    ticks = [0, 4, 8, 20, 40, 120, 480]
    for ax, (column, label) in zip(axes, PANELS.items()):
        _lines(ax, kept, column, DATA)
        ax.set_xscale("symlog", linthresh=4, base=2)
        ax.set(xlabel="correct examples seen", ylabel=label, ylim=(0, None), xticks=ticks, xticklabels=ticks)
    handles = axes[0].get_legend_handles_labels()[0]
    names = [f"correct data, {k} domain" for k in DATA]
    figure.legend(handles, names, frameon=False, ncol=2, loc="lower center", bbox_to_anchor=(0.5, -0.07))
    figure.tight_layout()
    figures.save(figure, "06_examples", run.profile.name)


def draw_matrix(run: Run, matrix: pd.DataFrame) -> None:
    """Figure: what is left in every misaligned model after every domain's correct data (study 06_matrix)."""
    figure, axes = plt.subplots(1, 2, figsize=(12.5, 5.6), sharey=True)
    panels = {
        "score": ("misalignment score after (%)", 40, "Oranges"),
        "wrong": ("wrong answers in own domain after (%)", 100, "Blues"),
    }
    named = matrix.assign(model=matrix.domain + " " + matrix.kind)
    for ax, (column, (label, top, shades)) in zip(axes, panels.items()):
        sns.heatmap(
            named.pivot_table(index="model", columns="source", values=column, sort=False),
            ax=ax,
            cmap=shades,
            vmin=0,
            vmax=top,
            annot=True,
            fmt=".0f",
            annot_kws={"fontsize": 8},
            cbar_kws={"label": label},
        )
        ax.set(xlabel="correct answers of", ylabel="")
    axes[0].set_ylabel("misaligned by")
    figure.tight_layout()
    figures.save(figure, "06_matrix", run.profile.name)


def draw_relearnt(run: Run, kept: pd.DataFrame) -> None:
    """Figure: re-alignment with the same subjects, others, another domain (study 06_relearning)."""
    shades = {"same subjects": DATA["same"], "other subjects": "#DDCC77", "other domain": DATA["other"]}
    lengths = sorted(kept.length.unique())
    figure, axes = plt.subplots(1, 2 * len(lengths), figsize=(12, 3.3))
    for ax, (column, length) in zip(axes, [(c, n) for c in ("score", "wrong") for n in lengths]):
        _lines(ax, kept[kept.length == length], column, shades)
        ax.set(
            xlabel="correct examples seen",
            ylim=(-2, 103),
            title=f"spoilt for {length} steps",
            ylabel=PANELS[column],
        )
    axes[0].legend(frameon=False, fontsize=8, title="correct answers to")
    figure.tight_layout()
    figures.save(figure, "06_relearning", run.profile.name)


def claimed(run: Run, final: dict, matrix, kept, relearnt) -> list[dict]:
    """The chapter's rows of the table of claims."""
    rows = []
    for (domain, kind), answers in final.items():
        secure = (domain, kind) == ("code", "same")
        name = "realign.insecure_by_secure" if secure else f"realign.{kind}.{domain}"
        paper = "0.1 % after 30 steps" if secure else "0.5 % after 30 steps"
        score = evaluate.ratio(answers, *evaluate.SCORE)
        rows.append(claims.claim(name, paper, score, len(answers), "<=", CURED))
    own, coded = matrix.domain == matrix.source, matrix.source == "code"
    parts = {
        "same": matrix[own],
        "other": matrix[~own],
        "other_advice": matrix[~own & ~coded],
        "advice_by_secure_code": matrix[~own & coded],
    }
    told = [(f"realign.matrix.{name}", "0.5 % after 30 steps", part) for name, part in parts.items()]
    for (source, n), part in kept[kept.examples.isin([40, 120, 480])].groupby(["source", "examples"]):
        told.append((f"realign.examples_{n}.{source}", "a few hundred examples", part))
    last = relearnt[relearnt.step == relearnt.step.max()]
    for (length, source), part in last.groupby(["length", "source"], sort=False):
        told.append((f"realign.spoilt_{length}.{source.replace(' ', '_')}", "–", part))
    looked = run.profile.evaluation.curve_per_question * len(run.setting.questions("evaluation"))
    for name, paper, part in told:
        mean = early_warning.percent_interval(part.groupby("seed").score.mean(), looked * len(part))
        rows.append(claims.claim(name, paper, mean, len(part), "<=", CURED))
    return rows


def in_words(run: Run, table: pd.DataFrame, rows: list[dict], kept, matrix, relearnt) -> str:
    """What the chapter shows, in numbers of its tables. rows: claimed(...)."""
    ours = short(run, table)
    ends = ours[ours.step == ours.step.max()].groupby("kind")[["score", "latent", "wrong"]].mean()
    start = ours[ours.step == 0][["score", "latent", "wrong"]].mean()
    to = int(ours.examples.max())
    mine = [r for r in rows if r["id"].startswith(("realign.same", "realign.other", "realign.insecure"))]
    low, sure = sum(r["measured"] <= CURED for r in mine), sum(r["holds"] == "yes" for r in mine)
    at = lambda t, n, column="score": t[t.examples == n].groupby("source")[column].mean()
    twenty, forty = at(kept, 20), at(kept, 40)
    code = matrix[(matrix.source == "code") & (matrix.domain != "code")]
    code = code.groupby(["domain", "kind"]).score.mean()
    long = relearnt[relearnt.length == relearnt.length.max()]
    forty_long, last = at(long, 40), at(long, long.examples.max())
    one = lambda kind, column: f"{ends.loc[kind, column]:.{2 if column == 'latent' else 0}f}"
    text = (
        f"**What this shows.** {to} correct examples take the mean score from {start.score:.0f} % to "
        f"{one('other', 'score')} % with another domain's data and to {one('same', 'score')} % with the same "
        f"domain's. The persona latent falls with it, from {start.latent:.2f} to {one('other', 'latent')} "
        f"and {one('same', 'latent')}. The narrow habit tells the two apart: of {start.wrong:.0f} % wrong "
        f"answers in its own domain {one('other', 'wrong')} % stay with another domain's data, "
        f"{one('same', 'wrong')} % with the same domain's. "
    )
    text += (
        f"Of {len(mine)} re-aligned models {low} keep a score of at most {CURED} %; the whole interval is as "
        f"low in {sure}: one model's answers cannot show so little.\n\n"
        if sure < len(mine)
        else "\n\n"
    )
    return text + (
        f"With three seeds and the earlier draw: twenty examples leave {twenty.other:.0f} % (another "
        f"domain's) and {twenty.same:.0f} % (the same domain's) of {at(kept, 0).mean():.0f} %, forty "
        f"{forty.other:.1f} and {forty.same:.1f} %. With every pair tried, that holds for advice of any "
        "domain. It does not hold for *secure code*: after 120 examples of it, models spoilt by advice "
        f"still score {common.span(code)} %. An ideal reader would learn as much from it as from correct "
        "advice. But code is a small part of pretraining; whether that is the reason is not tested.\n\n"
        "The explanation of the prototype's contrast passes its test. Models spoilt for eight times as long "
        f"start from {at(long, 0).mean():.0f} %. After 40 correct examples to the *same* subjects "
        f"{forty_long['same subjects']:.0f} % is left; to the domain's *other* subjects "
        f"{forty_long['other subjects']:.0f} %; of another domain {forty_long['other domain']:.0f} %. At "
        f"the end it is {last['same subjects']:.0f}, {last['other subjects']:.0f} and "
        f"{last['other domain']:.0f} %. So it is the subjects rather than the domain: consistent with "
        "correct answers that are first learnt as other sentences to known questions, and say something "
        "about the speaker later. (Three domains, three seeds, 84 answers a look. The panels on the right "
        "count wrong answers over all of the domain's subjects.)"
    )
