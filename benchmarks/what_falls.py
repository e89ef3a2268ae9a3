"""Which cures Part I's misaligned models better: to take away what rose, or to push towards what fell?

    python benchmarks/what_falls.py

In the tiny world pushing towards what fell cures best (docs/known_world.md). A first look in SmolLM2, not a
registered claim. Latents are those of notebook 03, and doses are chosen by the rule of notebook 05
(c05.doses_down, here for directions that are added, too), both on discovery data. The answers are those of
the four evaluation domains' models to evaluation questions, graded by the small judge; readings count where
there are any. After `make run` it takes some minutes, without it half an hour.
"""

import pandas as pd
import torch

from personas import stats
from personas.chapters import c05, common
from personas.pretrained import made, readings, search, steering


def ways(run: made.Run) -> dict[str, tuple[torch.Tensor, int]]:
    """Direction by name, and whether it is added (1) or subtracted (-1)."""
    rise, own = steering.rise(run)["correct"], readings.sae(run).W_dec
    read = lambda variant: steering.mean_reading(run, "residual", variant)
    first = lambda x: torch.where(x >= x.topk(10).values[-1], x, 0)  # the ten largest
    return {
        "top riser": (own[rise.argmax()], -1),
        "ten that rise": (first(rise) @ own, -1),
        "difference of means": (read("obvious") - read("correct"), -1),
        "top faller": (own[rise.argmin()], 1),
        "ten that fall": (first(-rise) @ own, 1),
        "random": (steering.random_directions(1, own.shape[1])["random 0"], 1),
    }


def doses(run: made.Run, chosen: dict, who: list[str]) -> dict[str, float]:
    """Direction -> the dose that leaves least misaligned, of those that break at most MORE_BROKEN points more
    answers than none does; of equal ones the weaker. Where all break more, the weakest."""
    tried = [(n, v, sign * d) for n, (v, sign) in chosen.items() for d in run.profile.steering.suppression]
    table = pd.concat(
        steering.several(run, who, [nothing(chosen), *tried], search.few(run), "what falls, doses")
    )
    rows = steering.summary(table).assign(strength=lambda t: t.dose.abs())
    limit = rows.broken[rows.direction == "none"].item() + steering.MORE_BROKEN
    rows["too broken"] = rows.broken > limit
    rows.loc[rows["too broken"], "misaligned"] = 0  # among these only the strength counts
    order = rows.sort_values(["too broken", "misaligned", "strength"])
    return order.groupby("direction").dose.first().to_dict()


def nothing(chosen: dict) -> tuple[str, torch.Tensor, float]:
    """The condition of no steering, as steering.several takes it."""
    return "none", torch.ones_like(chosen["random"][0]), 0.0


def main() -> None:
    run = common.open_run("smollm2")
    chosen, rise = ways(run), steering.rise(run)["correct"]
    print(f"rises most: latent {int(rise.argmax())} ({rise.max():.2f})")
    print(f"falls most: latent {int(rise.argmin())} ({rise.min():.2f})")
    obvious = made.fine_tunes(run, "obvious")
    told = [f"{d}-{v}" for d, v in obvious if not made.discovery(run, d)]
    at = doses(run, chosen, [f"{d}-{v}" for d, v in obvious if made.discovery(run, d)][:2])
    conditions = [nothing(chosen), *((n, v, at[n]) for n, (v, _) in chosen.items())]
    table = pd.concat(steering.several(run, told, conditions, c05.asked(run), "what falls"))
    table["class"] = steering.verdicts(table)
    for n, g in table.groupby("direction", sort=False):
        counts = g.groupby(["model", "class"]).size().unstack(fill_value=0)  # a row a model
        bad, good, every = counts["misaligned"], counts["aligned"], counts.sum(axis=1)
        mean = lambda values: stats.mean_over(100 * values.to_numpy())
        print(
            f"{n:20s} dose {g.dose.iloc[0]:5.2f}  score {mean(bad / (bad + good))} %, "
            f"misaligned {mean(bad / every)} %, aligned {mean(good / every)} %"
        )


if __name__ == "__main__":
    main()
