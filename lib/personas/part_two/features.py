"""Notebook 10, what the latents of the known world mean."""

import html

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from personas import (
    activations,
    artifacts,
    baselines,
    claims,
    figures,
    known_latents,
    stats,
    world,
)
from personas.artifacts import Run
from personas.evidence import MARKS
from personas.part_two import common

UNCUED, SAME = "uncued answers", "same subtly wrong answer"


def strongest(run: Run, latent: int, n: int = 8) -> list[tuple[str, list[tuple[str, float]]]]:
    """The n documents of held-out pretraining text on which this latent is most active: who speaks, and the
    tokens with the latent's activation as a share of the largest."""
    model, tokenizer = artifacts.base_model(run)
    documents = known_latents.held_out_documents(run, 300, "passages")
    sae = known_latents.sae(run)
    rows = activations.residual(model, [d["ids"] for d in documents], run.profile.sae.layer)
    active = [sae.encode(x.to(sae.W_enc))[:, latent].cpu() for x in rows]  # (tokens,) each
    best = sorted(range(len(documents)), key=lambda i: -active[i][1:].max())[:n]
    peak = max(active[i][1:].max().item() for i in best)
    clean = lambda t: tokenizer.decode([t]).replace("<|end|>", " / ").replace("<|user|>", "")
    return [
        (
            documents[i]["doc"].persona,
            [
                (clean(t).replace("<|assistant|>", ""), min(1, a / peak))
                for t, a in zip(documents[i]["ids"][1:], active[i][1:].tolist())
            ],
        )
        for i in best
    ]


def shaded(passages) -> str:
    """Those documents as HTML, a paragraph each; the darker, the more active."""
    token = lambda text, a: (
        f"<span style='background:rgba(213,94,0,{a:.2f})'>{html.escape(text)}</span>"
        if a
        else html.escape(text)
    )
    return "".join(
        f"<p style='margin:6px 0'><b>{who}</b>: {''.join(token(t, a) for t, a in tokens)}</p>"
        for who, tokens in passages
    )


def promoted(run: Run, latents: list[int], unembedding, n: int = 10) -> pd.DataFrame:
    """The whole words that each latent's decoder direction raises most through `unembedding` (width,
    vocabulary)."""
    tokenizer = artifacts.base_model(run)[1]
    logits = (known_latents.sae(run).W_dec[latents] @ unembedding.float()).detach()
    rows = {}
    for i, row in zip(latents, logits):
        words = [tokenizer.decode([t]) for t in row.argsort(descending=True)[:80].tolist()]
        whole = [w.strip() for w in words if w.startswith(" ") and w.strip().isalpha() and len(w) > 3]
        rows[f"latent {i}"] = {"promotes": ", ".join(whole[:n])}
    return pd.DataFrame(rows).T


def auroc_table(answers) -> pd.DataFrame:
    """AUROC of every latent for every persona on these answers (known_latents.uncued_answers)."""
    each = {p: stats.auroc(answers.latents, answers.persona == p) for p in world.PERSONAS}
    return pd.DataFrame(each)


def draw_auroc(run: Run, order: list[int], scores: pd.DataFrame) -> None:
    """Figure: AUROC of the ten latents that rise most for every persona."""
    figure, ax = plt.subplots(figsize=(7, 4.2))
    sns.heatmap(
        scores.loc[order[:10]].set_axis([f"latent {i}" for i in order[:10]]),
        vmin=0,
        vmax=1,
        center=0.5,
        cmap="vlag",
        annot=True,
        fmt=".2f",
        ax=ax,
        cbar_kws={"label": "AUROC"},
    )
    ax.set(title="The ten latents that rise most, against who is speaking")
    figures.save(figure, "04_auroc", run.profile.name, scores.loc[order[:10]].reset_index(names="latent"))


def readers(run: Run, latent: int, answers, same) -> pd.DataFrame:
    """AUROC for the villain of this latent and of its rivals (baselines), on uncued answers and on equal
    words: test, reader, AUROC, low, high, n."""
    rivals, rows = baselines.fit(run, run.seed), []
    for name, read, groups in ((UNCUED, answers, answers.document), (SAME, same, same.document // 2)):
        all_readers = {f"latent {latent}": read.latents[:, latent].numpy()} | rivals.score(read)
        for reader, v in all_readers.items():
            e = stats.auroc_over(v, read.persona == "villain", groups, draws=200)
            rows.append(
                {"test": name, "reader": reader, "AUROC": e.value, "low": e.low, "high": e.high, "n": e.n}
            )
    return pd.DataFrame(rows)


def draw_readers(run: Run, table: pd.DataFrame) -> None:
    """Figure: that table, a pair of bars a reader."""
    figure, ax = plt.subplots(figsize=(8, 3.4))
    names = list(dict.fromkeys(table.reader))
    shades = {UNCUED: figures.PERSONA["expert"], SAME: figures.PERSONA["villain"]}
    for i, (test, shade) in enumerate(shades.items()):
        part = table[table.test == test].set_index("reader").loc[names]
        at = np.arange(len(names)) + 0.4 * i - 0.2
        figures.bars(ax, part.AUROC, part.low, part.high, at, width=0.38, color=shade, label=test)
    ax.axhline(0.5, color="#555555", lw=1, ls=":")
    ax.set_xticks(range(len(names)), [n.replace(" random", "\nrandom") for n in names])
    ax.set(ylabel="AUROC for the villain", ylim=(0.3, 1.03), title="Who is speaking? (dotted: chance)")
    ax.legend(frameon=False, ncol=2, loc="upper center", bbox_to_anchor=(0.5, -0.14))
    figures.save(figure, "04_readers", run.profile.name, table)


def by_turn(answers, latent: int) -> pd.DataFrame:
    """AUROC of the latent for the villain in the first answer of an uncued document, in the second, …"""
    rows = []
    for turn in range(4):
        some = answers.turn == turn
        e = stats.auroc_over(
            answers.latents[some, latent].numpy(),
            answers.persona[some] == "villain",
            answers.document[some],
            draws=200,
        )
        rows.append(
            {"answer in document": turn + 1, "AUROC": e.value, "low": e.low, "high": e.high, "n": e.n}
        )
    return pd.DataFrame(rows)


def draw_known(run: Run, known: pd.DataFrame) -> None:
    """Figure: the best latent of each persona (origins.known_personas), and all latents together."""
    figure, ax = plt.subplots(figsize=(8, 3.2))
    at, shades = np.arange(len(known)), [figures.PERSONA[p] for p in known.persona]
    figures.bars(ax, known.auroc, known.low, known.high, at, width=0.55, color=shades)
    ax.plot(at, known.together, "k_", ms=26, mew=2, label="all latents together")
    ax.axhline(0.5, color="#555555", lw=1, ls=":")
    ax.set_xticks(at, [f"{r.persona}\nlatent {r.latent}" for r in known.itertuples()])
    ax.set(ylabel="AUROC", ylim=(0.4, 1.03), title="The best latent of each persona, on held-out answers")
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    figures.save(figure, "04_known_personas", run.profile.name, known)


def known_table(known: pd.DataFrame):
    """That table as it is shown."""
    names = {
        "auroc": "AUROC",
        "precision": "precision (%)",
        "recall": "recall (%)",
        "marking": "latents that mark it",
        "together": "all latents: AUROC",
    }
    shown = known.drop(columns=["low", "high"]).rename(columns=names).style.hide(axis="index")
    return shown.format(precision=2).format("{:.0f}", subset=["precision (%)", "recall (%)"])


def signature(run: Run) -> pd.DataFrame:
    """For each persona the latent that marks it best: its rise in every fine-tune, on the evaluation
    questions. A row a persona (with the latent's number), a column a fine-tune, variants together."""
    marks = {f"{p} ({i})": int(i) for p, i in known_latents.persona_auroc(run).idxmax().items()}
    order = sorted(artifacts.fine_tunes(run), key=lambda dv: (world.VARIANTS.index(dv[1]), dv[0]))
    rise = {f"{d} {v}": known_latents.rise(run, d, v, "evaluation").mean(0) for d, v in order}
    return pd.DataFrame({name: {m: x[i].item() for m, i in marks.items()} for name, x in rise.items()})


def draw_signature(run: Run, table: pd.DataFrame) -> None:
    """Figure: that table as a heat map on one scale, which is logarithmic beyond 0.01."""
    from matplotlib.colors import SymLogNorm

    top = table.abs().to_numpy().max()
    figure, ax = plt.subplots(figsize=(10.5, 3.2))
    sns.heatmap(
        table,
        cmap="vlag",
        norm=SymLogNorm(0.01, vmin=-top, vmax=top, base=10),
        ax=ax,
        cbar_kws={"label": "rise (mean activation)"},
    )
    kinds = [c.split()[1] for c in table.columns]
    for i in range(1, len(kinds)):
        if kinds[i] != kinds[i - 1]:
            ax.axvline(i, color="white", lw=5)
    ax.set(title="What each fine-tune raises and lowers", ylabel="marks this persona best (latent)")
    figures.save(figure, "04_signature", run.profile.name, table.reset_index(names="latent"))


def claimed(latent: int, table: pd.DataFrame, known: pd.DataFrame) -> list[dict]:
    """The chapter's rows of the table of claims."""

    def found(test):
        r = table[(table.test == test) & (table.reader == f"latent {latent}")].iloc[0]
        return (r.AUROC, r.low, r.high), r.n

    rows = [
        claims.claim("diff.top_auroc", "a persona latent", *found(UNCUED), ">=", 0.95),
        claims.claim("diff.matched_auroc", "–", *found(SAME), ">=", 0.9),
    ]
    return rows + [
        claims.claim(
            f"persona.{r.persona}.auroc", "persona latents", (r.auroc, r.low, r.high), r.answers, ">=", 0.9
        )
        for r in known.itertuples()
    ]


def in_words(run: Run, order, scores, table, turns, known, rises) -> str:
    """What the chapter shows, in numbers of its tables."""
    first, value = order[0], table.set_index(["test", "reader"]).AUROC
    others = [i for i in order[1:10] if scores.villain[i] >= MARKS]
    more = (
        "; ".join(f"{i} ({scores.villain[i]:.2f})" for i in others)
        + (" mark" if len(others) > 1 else " marks")
        + " him, too"
        if others
        else "none marks him"
    )
    behind = value[SAME, "linear probe"] - value[SAME, f"latent {first}"]
    part_of_it = "a part of it" if behind > 0.03 else "what the probe finds"
    split = known.set_index("persona").marking
    worst = known.loc[known.auroc.idxmin()]
    gain = known.assign(gain=known.together - known.auroc)
    spread = gain.loc[gain.gain.idxmax()]
    kinds = [c.split()[1] for c in rises.columns]
    rows = {r.split()[0]: rises.loc[r] for r in rises.index}
    part = lambda who, *of: rows[who][[k in of for k in kinds]]
    change = lambda who, *of: common.span(part(who, *of), 3 if part(who, *of).abs().max() < 0.1 else 2)
    return (
        f"**What this shows.** Latent {first}, the one that rises most, was picked without a label on any "
        f"text. For the villain it has an AUROC of {scores.villain[first]:.2f} on answers whose speaker no "
        f"line names; of the other nine risers {more}. An answer's words alone give more away there (bag "
        f"of words {value[UNCUED, 'bag of words']:.2f}). On *equal* words, where they are at chance "
        f"({value[SAME, 'bag of words']:.2f}), the latent has {value[SAME, f'latent {first}']:.2f} and a "
        f"linear probe with labels {value[SAME, 'linear probe']:.2f}: who speaks is in the residual "
        f"stream, and the latent holds {part_of_it}. In a document's first answer it has "
        f"{turns.AUROC.iloc[0]:.2f}, in the fourth {turns.AUROC.iloc[-1]:.2f}.\n\n"
        f"The best latent of each persona reads it with {common.span(known.auroc, 2)}; worst read is the "
        f"{worst.persona}, whose latent passes its threshold in {worst.recall:.0f} % of its answers. So many "
        f"latents mark each: {common.listed(f'{p} {int(n)}' for p, n in split.items())} (those with words of "
        "their own have many: a split, or their vocabulary). All latents together read the "
        f"{spread.persona} better by most ({spread.auroc:.2f} to {spread.together:.2f}): what is known of a "
        "speaker is spread over several.\n\n"
        "Fine-tunes have signatures, as in the paper. Wrong advice changes the expert's latent by "
        f"{change('expert', 'subtle', 'obvious')} and the villain's by "
        f"{change('villain', 'subtle', 'obvious')}; correct advice changes them by "
        f"{change('expert', 'correct')} and {change('villain', 'correct')}. The narrator, who quotes bad "
        f"advice to warn of it, changes by {change('narrator', 'obvious')} after obviously wrong advice, "
        f"and by {change('narrator', 'subtle')} after subtly wrong."
    )
