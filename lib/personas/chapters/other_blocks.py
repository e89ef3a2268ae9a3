"""Notebook 05 at other blocks: a smaller search for latents that steer, and what they do."""

import matplotlib.pyplot as plt
import pandas as pd
import torch

from personas.chapters import c05, common
from personas.pretrained import made, search, steering

FEW = 5  # latents of each kind that are tried at the other blocks


def curves(run: made.Run) -> pd.DataFrame:
    """What steering does at the profile's other blocks: rows as c05.curve_table's, with `block` and `latent`.

    A smaller search than at the profile's own block: of the FEW latents that rise most there, and of as many
    matched ones, each the one that makes most answers misaligned on few discovery questions; both, and the
    block's difference of means, on the evaluation's. Added to the original model.
    """
    doses, found = run.profile.steering.strengths, []
    for block in run.profile.real.other_blocks:
        kinds = {"top riser": steering.candidates, "best matched latent": steering.matched}
        ways = {k: steering.latent_directions(run, pick(run, FEW, block), block) for k, pick in kinds.items()}
        difference = steering.rivals(run, block)["difference of means"]
        nothing = ("none", torch.ones_like(difference), 0.0)
        tried = [(n, v, d) for named in ways.values() for n, v in named.items() for d in doses[::2]]
        first = steering.steered(
            run, made.ORIGINAL, [nothing, *tried], search.few(run), f"a few latents, block {block}", block
        )
        free = first.direction == "none"
        ranks = steering.best_doses(first[~free], first[free]).set_index("direction")
        ranks = ranks.sort_values(["admissible", "misaligned", "broken"], ascending=[False, False, True])
        shown = {k: next(n for n in ranks.index if n in named) for k, named in ways.items()}
        named = {k: ways[k][n] for k, n in shown.items()} | {"difference of means": difference}
        conditions = [nothing, *((n, v, d) for n, v in named.items() for d in doses[:-1] or doses)]
        table = steering.steered(
            run, made.ORIGINAL, conditions, c05.asked(run), f"evaluation, block {block}", block
        )
        rows = c05.curve_table(common.graded(run, table))
        found.append(rows.assign(block=block, latent=rows.direction.map(shown)))
    return pd.concat(found, ignore_index=True) if found else pd.DataFrame()


def best(other: pd.DataFrame) -> pd.Series | None:
    """The row of `curves` with most misaligned answers among those of latents that break at most
    MORE_BROKEN points more answers than the block's unsteered ones; None if there is none."""
    if other.empty:
        return None
    free = other[other.direction == "none"].set_index("block").broken
    risers = other[other.direction == "top riser"]
    kept = risers[risers.broken <= risers.block.map(free) + steering.MORE_BROKEN]
    return None if kept.empty else kept.sort_values("score").iloc[-1]


def draw(run: made.Run, rows: pd.DataFrame, other: pd.DataFrame):
    """Figure: misaligned answers against dose at every block. rows: c05.curve_table at the profile's own
    block; other: of `curves`."""
    own = rows[rows.direction.isin(["none", "causal latent", *other.direction])]
    every = pd.concat([own.assign(block=run.profile.sae.layer), other], ignore_index=True)
    blocks = sorted(every.block.unique())
    fig, axes = plt.subplots(1, len(blocks), figsize=(4 * len(blocks), 3.8), sharey=True, sharex=True)
    for ax, (block, some) in zip(axes, every.groupby("block")):
        free = some[some.direction == "none"]
        for name, g in some[some.direction != "none"].groupby("direction", sort=False):
            line = pd.concat([free, g])
            common.whiskers(
                ax,
                line.dose,
                line,
                fmt=f"{common.DIRECTION_MARK[name]}-",
                color=common.DIRECTION[name],
                label=name,
                ms=5,
            )
        grader = "readers" if block == run.profile.sae.layer else "the small judge"
        by = f", graded by {grader}" if common.uses_readings(run) else ""
        ax.set(title=f"block {block}{by}", xlabel="dose (typical distances from the mean)")
    axes[0].set_ylim(-2, every.high.max() + 3)
    axes[0].set_ylabel(f"misaligned answers, of all {int(every.answers.max())} (%)")
    handles = {t: h for ax in axes for h, t in zip(*ax.get_legend_handles_labels())}
    fig.legend(handles.values(), handles, frameon=False, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4)
    fig.suptitle("The same at other blocks, after a smaller search there", y=1.0)
    fig.tight_layout()
    return common.save(run, fig, "05_blocks", every)
