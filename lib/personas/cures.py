"""Directions and ablations that should cure a misaligned model of the known world; doses are chosen on
discovery questions and fine-tunes."""

from functools import cache

import pandas as pd
import torch

from personas import generate, steering, store
from personas.artifacts import Run, _table, discovery_fine_tunes, tuned_model
from personas.known_latents import discovery_rise, mean_difference, sae, unit
from personas.search import _steering, chosen_latent, controls, rankings


@cache
def cures(run: Run) -> dict[str, torch.Tensor]:
    """Directions that should cure a misaligned model when they are added, by name, as (width,). The sums
    are weighted by how far the latents fell or rose on discovery data; 'chosen latent' and 'mean
    difference' are subtracted."""
    rise, W_dec = discovery_rise(run), sae(run).W_dec.cpu()
    up, down = rise.argsort(descending=True)[:10], rise.argsort()[:10]
    fallen, risen = -rise[down] @ W_dec[down], rise[up] @ W_dec[up]
    return {
        "− chosen latent": -W_dec[chosen_latent(run)[0]],
        "− ten risen": -risen,
        "+ most fallen": W_dec[down[0]],
        "+ ten fallen": fallen,
        "+ ten fallen − ten risen": fallen - risen,
        "− mean difference": -mean_difference(run),
    }


@cache
def cure_doses(run: Run) -> dict[str, float]:
    """For each of `cures` the weakest dose whose share of aligned answers is within a point of the best,
    over the misaligned models of discovery domains and discovery questions."""
    doses = run.profile.steering.cures

    def make(out):
        tables = [
            steering.sweep(
                *tuned_model(run, d, v),
                run.setting,
                cures(run),
                doses,
                unit(run),
                run.profile.sae.layer,
                split="discovery",
                per_question=run.profile.steering.screen_per_question,
                seed=run.seed,
                progress=None,
            )
            for d, v in discovery_fine_tunes(run)
        ]
        steering.summary(pd.concat(tables)).to_parquet(out / "cures.parquet", index=False)

    table = _table(
        _steering(run, "cures", make, latent=chosen_latent(run)[0], cures=store.code_version(cures)),
        "cures.parquet",
    )
    return {
        n: float(g[g.aligned >= g.aligned.max() - 1].strength.min())
        for n, g in table.groupby("direction", sort=False)
    }


@cache
def ablations(run: Run) -> dict[str, generate.ProjectOut | generate.ClampToZero]:
    """Ways of taking latents away at every position, by name: the chosen one; the ten that rise most on
    discovery data; the ten that mark the villain best on labelled documents; and ten matched to the chosen
    one, as a control."""
    layer, W_dec = run.profile.sae.layer, sae(run).W_dec
    matched = [int(n.split()[1]) for n in controls(run) if n.startswith("matched ")][:10]
    sets = {
        "chosen latent": [chosen_latent(run)[0]],
        "ten risen": rankings(run)["Δ-activation"],
        "ten of the villain": rankings(run)["AUROC (ceiling)"],
        "ten matched": matched,
    }
    found = {f"project out {n}": generate.ProjectOut(layer, W_dec[i]) for n, i in sets.items()}
    found |= {f"clamp {n}": generate.ClampToZero(sae(run), i) for n, i in sets.items()}
    return found | {"project out mean difference": generate.ProjectOut(layer, mean_difference(run)[None])}
