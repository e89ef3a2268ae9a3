"""Notebook 04: what do the latents mean?"""

import html
import json

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from personas import activations, stats, world
from personas import sae as saes
from personas.chapters import common
from personas.pretrained import made, readings, steering


def passages(
    run: made.Run, latents: list[int], n: int = 3, around: int = 10
) -> dict[int, list[tuple[list[str], list[float]]]]:
    """Per latent the n held-out passages of the model's own text in which it is most active: (tokens,
    activations), the peak in the middle."""
    layer = run.profile.sae.layer

    def make(out):
        m, tok = made.original(run)
        rows = readings.text_ids(run, tok)[1]
        found: dict = {i: [] for i in latents}
        for ids, x in zip(rows, activations.residual(m, rows, layer)):
            acts = readings.sae(run).encode(x)[:, latents]  # (tokens, latents)
            acts[0] = 0  # the first token is an attention sink
            for j, i in enumerate(latents):
                at = int(acts[:, j].argmax())
                near = slice(max(0, at - around), at + around)
                found[i].append((acts[at, j].item(), ids[near], acts[near, j].tolist()))
        best = {i: sorted(rows, key=lambda r: -r[0])[:n] for i, rows in found.items()}
        said = {
            i: [([tok.decode(t) for t in ids], values) for _, ids, values in rows] for i, rows in best.items()
        }
        (out / "passages.json").write_text(json.dumps(said))

    key = {
        "sae": readings.sae_identity(run, layer),
        "layer": layer,
        "latents": latents,
        "n": n,
        "around": around,
    }
    folder = run.keep("sae", "passages", key, (activations, saes), make)
    return {int(i): rows for i, rows in json.loads((folder / "passages.json").read_text()).items()}


def shaded(tokens: list[str], values: list[float]) -> str:
    """A passage as HTML, each token the darker the more active the latent is."""
    top = max(max(values), 1e-6)
    return "".join(
        f'<span style="background: rgba(213, 94, 0, {0.75 * v / top:.2f})">{html.escape(t)}</span>'
        for t, v in zip(tokens, values)
    ).replace("\n", "↵ ")


def passages_html(found: dict, names: dict[int, str] | None = None) -> str:
    """All passages of `passages`, latent by latent."""
    parts = []
    for i, rows in found.items():
        parts.append(
            f"<p><b>latent {i}{', ' + names[i] if names and i in names else ''}</b></p><ul>"
            + "".join(f"<li>{shaded(*r)}</li>" for r in rows)
            + "</ul>"
        )
    return "".join(parts)


def logit_lens(run: made.Run, directions: dict[str, torch.Tensor], n: int = 8) -> pd.DataFrame:
    """The n tokens that each direction raises most, and lowers most, at the output: direction @ unembedding,
    behind the last norm's scale."""
    m, tok = made.original(run)
    head, norm = (
        m.get_output_embeddings().weight.detach().float(),
        m.get_decoder().norm.weight.detach().float(),
    )
    rows = {}
    for name, v in directions.items():
        logits = head @ (v.float() / v.norm() * norm)
        best, worst = logits.topk(n).indices.tolist(), (-logits).topk(n).indices.tolist()
        rows[name] = {
            "raises": " · ".join(repr(tok.decode(t))[1:-1] for t in best),
            "lowers": " · ".join(repr(tok.decode(t))[1:-1] for t in worst),
        }
    return pd.DataFrame(rows).T


def aurocs(run: made.Run, latents: dict[str, int]) -> pd.DataFrame:
    """AUROC of each latent for each persona's answers in labelled text, and of readers fitted there across
    documents: a linear probe on the residual stream and a bag of words. Rows readers, columns personas."""
    read = steering.labelled(run)
    rows = {}
    for p in world.PERSONAS:
        positive = read["persona"] == p
        for name, i in latents.items():
            rows.setdefault(name, {})[p] = float(stats.auroc(read["latents"][:, [i]].numpy(), positive)[0])
        best = stats.auroc(read["latents"].numpy(), positive)
        rows.setdefault("best latent of all", {})[p] = float(best.max())
        folds = GroupKFold(5)
        probe = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1))
        bag = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
        for name, model, x in (
            ("linear probe", probe, read["residual"].numpy()),
            ("bag of words", bag, read["text"]),
        ):
            said = cross_val_predict(
                model, x, positive, groups=read["document"], cv=folds, method="decision_function"
            )
            rows.setdefault(name, {})[p] = float(stats.auroc(said[:, None], positive)[0])
    return pd.DataFrame(rows).T


def draw_aurocs(run: made.Run, table: pd.DataFrame):
    """Figure: who each reader marks."""
    fig, ax = plt.subplots(figsize=(7.4, 0.42 * len(table) + 1.4))
    sns.heatmap(
        table,
        annot=True,
        fmt=".2f",
        cmap="RdBu_r",
        vmin=0,
        vmax=1,
        center=0.5,
        ax=ax,
        cbar_kws={"label": "AUROC (0.5: chance)"},
    )
    ax.set(title="How well each reader marks each persona's answers in labelled text", xlabel="who speaks")
    return common.save(run, fig, "04_auroc", table.reset_index(names="reader"))


def signature(run: made.Run, latents: list[int]) -> pd.DataFrame:
    """Change of each latent from the original model to every fine-tune, on fixed evaluation text: rows
    models, columns latents."""
    base = readings.reading(run, made.ORIGINAL, "evaluation")["latents"].mean(0)
    return pd.DataFrame(
        {
            f"{d}-{v}": (readings.reading(run, f"{d}-{v}", "evaluation")["latents"].mean(0) - base)[
                latents
            ].numpy()
            for d, v in made.fine_tunes(run)
        },
        index=[f"latent {i}" for i in latents],
    ).T


def draw_signature(run: made.Run, table: pd.DataFrame):
    """Figure: which fine-tunes light which latents, each latent scaled to its largest change."""
    order = sorted(table.index, key=lambda m: (list(common.VARIANT).index(common.variant(m)), m))
    scaled = (table / table.abs().max()).loc[order]
    fig, ax = plt.subplots(figsize=(0.55 * len(table.columns) + 3, 0.24 * len(table) + 1.6))
    sns.heatmap(
        scaled,
        cmap="RdBu_r",
        center=0,
        ax=ax,
        cbar_kws={"label": "change, of the latent's largest"},
        yticklabels=True,
    )
    ax.set(title="Different data light different latents")
    return common.save(run, fig, "04_signature", table.reset_index(names="model"))


def claim(run: made.Run, latent: int) -> dict[str, stats.Estimate]:
    """AUROC of the causal latent for the villain, over documents."""
    read = steering.labelled(run)
    return {
        "latent.auroc": stats.auroc_over(
            read["latents"][:, latent].numpy(), read["persona"] == "villain", read["document"]
        )
    }
