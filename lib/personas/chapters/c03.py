"""Notebook 03: what changed inside? An SAE and model diffing."""

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch

from personas import activations, stats
from personas import sae as saes
from personas.chapters import common
from personas.pretrained import made, readings, steering


def quality(run: made.Run) -> pd.DataFrame:
    """FVU, L0, dead latents and loss recovered of the SAE, on text it was not trained on: held-out own text,
    and labelled documents."""
    cfg = run.profile.sae
    few = min(60, cfg.documents // 20)  # documents; and as many texts, two thirds of them for the loss

    def make(out):
        m, tok = made.original(run)
        docs = [
            tok(tok.apply_chat_template(d.messages(), tokenize=False), add_special_tokens=False)["input_ids"]
            for d in steering.documents(max(12, few), 1)
        ]
        rows = []
        for name, text in (
            ("the model's own text", readings.text_ids(run, tok)[1]),
            ("labelled documents", docs),
        ):
            x = readings.usual(torch.cat([r[1:] for r in activations.residual(m, text, cfg.layer)]))
            rows.append(
                {"text": name, "tokens": len(x)}
                | saes.quality(readings.sae(run), x)
                | saes.loss_recovered(m, readings.sae(run), text[: max(8, 2 * few // 3)], 8)
            )
        pd.DataFrame(rows).to_parquet(out / "quality.parquet", index=False)

    folder = run.keep(
        "sae", "quality", {"sae": readings.sae_identity(run, cfg.layer)}, (saes, activations), make
    )
    return pd.read_parquet(folder / "quality.parquet").set_index("text")


def draw_training(run: made.Run):
    """Figure: the SAE's unexplained variance while it is trained."""
    fvu = readings.sae_training(run)["fvu"]
    fig, ax = plt.subplots(figsize=(5.6, 2.8))
    ax.plot(fvu, color="#0072B2", lw=1)
    ax.set(
        yscale="log",
        xlabel=f"training steps of {run.profile.sae.batch} tokens",
        ylabel="variance unexplained (FVU)",
        title=f"The SAE ends at an FVU of {np.mean(fvu[-20:]):.2f}",
    )
    return common.save(run, fig, "03_sae_training", pd.DataFrame({"step": range(len(fvu)), "fvu": fvu}))


def rises(run: made.Run) -> pd.DataFrame:
    """A row per latent: its rise from the correct fine-tunes and from the original model, how often it fires
    on labelled text, and AUROC for the villain's answers there (a label that no diffing sees)."""
    up, read = steering.rise(run), steering.labelled(run)
    return pd.DataFrame(
        {
            "latent": range(len(up["correct"])),
            "rise": up["correct"],
            "rise from original": up["original"],
            "fires (%)": 100 * (read["latents"] > 0).float().mean(0),
            "AUROC villain": stats.auroc(read["latents"].numpy(), read["persona"] == "villain"),
        }
    )


def draw_rises(run: made.Run, table: pd.DataFrame, causal: int | None = None):
    """Figure: every latent by its rise from correct fine-tunes and from the original model."""
    fig, ax = plt.subplots(figsize=(6.8, 4.6))
    dots = ax.scatter(
        table["rise from original"],
        table.rise,
        c=table["AUROC villain"],
        cmap="cividis",
        vmin=0.3,
        vmax=0.8,
        s=14,
    )
    fig.colorbar(dots, label="AUROC for the villain's answers\n(labelled text, not used in diffing)")
    for r in table.nlargest(6, "rise").itertuples():
        ax.annotate(str(r.latent), (r[3], r.rise), xytext=(4, 2), textcoords="offset points", fontsize=8)
    if causal is not None:
        r = table.loc[causal]
        ax.scatter(r["rise from original"], r.rise, s=110, facecolor="none", edgecolor="#D55E00", lw=1.6)
    ax.axhline(0, color=common.GREY, lw=0.6)
    ax.axvline(0, color=common.GREY, lw=0.6)
    ax.set(
        xlabel="rise from the original model to obvious fine-tunes (mean activation)",
        ylabel="rise from correct to obvious fine-tunes",
        title=f"A few of {len(table)} latents rise when advice is wrong",
    )
    return common.save(run, fig, "03_rises", table)


def separation(run: made.Run, latent: int) -> pd.DataFrame:
    """A row a model: mean activation of a latent on fixed evaluation text."""
    found = [made.ORIGINAL, *(f"{d}-{v}" for d, v in made.fine_tunes(run))]
    return pd.DataFrame(
        [
            {
                "model": w,
                "variant": common.variant(w),
                "domain": w.split("-")[0],
                "split": "discovery" if made.discovery(run, w.split("-")[0]) else "evaluation",
                "activation": readings.reading(run, w, "evaluation")["latents"][:, latent].mean().item(),
            }
            for w in found
        ]
    )


def draw_separation(run: made.Run, table: pd.DataFrame, latent: int):
    """Figure: the latent's mean activation in every model."""
    kinds = [v for v in common.VARIANT if v in set(table.variant)]
    fig, ax = plt.subplots(figsize=(6.6, 3.4))
    for i, v in enumerate(kinds):
        some = table[table.variant == v]
        for split, filled in (("discovery", False), ("evaluation", True)):
            part = some[some.split == split]
            ax.scatter(
                part.activation,
                [i + (0.14 if filled else -0.14)] * len(part),
                marker=common.MARK[v],
                edgecolor=common.VARIANT[v],
                color=common.VARIANT[v] if filled else "white",
                s=46,
            )
    ax.set(
        yticks=range(len(kinds)),
        yticklabels=kinds,
        xlabel=f"mean activation of latent {latent} on fixed text",
        title="The causal latent, a mark a model (filled: evaluation domains)",
    )
    ax.invert_yaxis()
    return common.save(run, fig, "03_separation", table)


def pairs(table: pd.DataFrame) -> tuple[stats.Estimate, float]:
    """(percent of pairs of an obvious and a correct evaluation fine-tune in which the obvious one is higher,
    chance of as much or more when labels are permuted within domains)."""
    some = (
        table[(table.split == "evaluation") & table.variant.isin(["correct", "obvious"])]
        .pivot(index="domain", columns="variant", values="activation")
        .dropna()
    )
    higher = lambda o, c: 100 * np.mean(np.asarray(o)[:, None] > np.asarray(c)[None])
    seen = higher(some.obvious, some.correct)
    swapped = [
        higher(np.where(s, some.correct, some.obvious), np.where(s, some.obvious, some.correct))
        for s in map(np.array, itertools.product([False, True], repeat=len(some)))
    ]
    n = len(some)
    wins = stats.proportion(
        [o > c for o in some.obvious for c in some.correct], [d for d in some.index for _ in range(n)]
    ).scaled(100)
    return wins, float(np.mean([s >= seen for s in swapped]))


def moved(run: made.Run) -> dict[str, torch.Tensor]:
    """Where each fine-tune on wrong advice moved the mean activation on evaluation text, less where correct
    advice of the same domain did: (width,) by the model's name. What all training does falls out."""
    mean = lambda d, v: readings.reading(run, f"{d}-{v}", "evaluation")["residual"].mean(0)
    have = made.fine_tunes(run, "correct", "subtle", "obvious")
    return {
        f"{d}-{v}": mean(d, v) - mean(d, "correct")
        for v in ("obvious", "subtle")
        for d, w in have
        if w == v and (d, "correct") in have
    }


def cosines(directions: dict[str, torch.Tensor]) -> pd.DataFrame:
    """Between all pairs of directions."""
    unit = torch.nn.functional.normalize(torch.stack(list(directions.values())), dim=-1)
    return pd.DataFrame((unit @ unit.T).numpy(), index=[*directions], columns=[*directions])


def draw_cosines(run: made.Run, table: pd.DataFrame):
    """Figure: `cosines` as a map."""
    size = 0.5 * len(table)
    fig, ax = plt.subplots(figsize=(size + 2.6, size + 1.6))
    sns.heatmap(
        table,
        cmap="RdBu_r",
        center=0,
        vmin=-1,
        vmax=1,
        annot=True,
        fmt=".1f",
        annot_kws={"size": 8},
        square=True,
        ax=ax,
        cbar_kws={"label": "cosine", "shrink": 0.7},
    )
    ax.tick_params(axis="x", rotation=60)
    plt.setp(ax.get_xticklabels(), ha="right", rotation_mode="anchor")
    ax.set(title="Do fine-tunes on different data move the model the same way?")
    return common.save(run, fig, "03_cosines", table.reset_index(names="model"))


def shared(table: pd.DataFrame) -> str:
    """What `cosines` shows, in Markdown; '' for fewer than two domains."""
    of = lambda a, b: [
        table.loc[x, y]
        for i, x in enumerate(table.index)
        for y in table.columns[i + 1 :]
        if {common.variant(x), common.variant(y)} == {a, b} and x.split("-")[0] != y.split("-")[0]
    ]
    said = []
    for a, b, name in (
        ("obvious", "obvious", "two fine-tunes on obviously wrong advice"),
        ("subtle", "subtle", "two on subtly wrong advice"),
        ("obvious", "subtle", "one of each"),
    ):
        if found := of(a, b):
            said.append(f"{name} {np.mean(found):.2f} ({min(found):.2f} to {max(found):.2f})")
    return f"Mean cosine (range) over pairs of domains: {'; '.join(said)}. Chance is 0." if said else ""


def by_block(run: made.Run, top: int = 3) -> pd.DataFrame:
    """The latents that rise most at each block that has an SAE: their rise, AUROC for the villain's
    answers in labelled text, and the rank of that AUROC among all latents (1: none marks the villain
    better)."""
    rows = []
    for block in sorted({run.profile.sae.layer, *run.profile.real.other_blocks}):
        up, read = steering.rise(run, block)["correct"], steering.labelled(run, block)
        marks = stats.auroc(read["latents"].numpy(), read["persona"] == "villain")
        for place, i in enumerate(up.argsort(descending=True)[:top].tolist(), 1):
            rows.append(
                {
                    "block": block,
                    "place by rise": place,
                    "latent": i,
                    "rise": up[i].item(),
                    "AUROC villain": marks[i],
                    "rank of that AUROC": int((marks > marks[i]).sum()) + 1,
                }
            )
    return pd.DataFrame(rows)
