"""The search for the causal latent: candidates, controls and rivals get the same rounds, on discovery
questions alone."""

from functools import cache

import pandas as pd
import torch

from personas.pretrained import made, readings, sets, steering


def few(run: made.Run) -> list[sets.Item]:
    """The discovery items of the first round of the search: every fourth question and opening."""
    return made.items(run, "discovery")[::4]


MORE = 2  # times as many answers again, by which the doses are chosen


def shown(run: made.Run) -> list[float]:
    """The doses that are compared: half of the weakest, and all but the strongest."""
    doses = list(run.profile.steering.strengths)
    return [doses[0] / 2, *(doses[:-1] if len(doses) > 2 else doses)]


def find(run: made.Run, layer: int | None = None) -> dict:
    """Candidates and matched latents, each steered at two doses on few discovery items; the best few of each
    kind, and the rivals, again on all of them, at every dose and at half of the weakest. The best of each
    kind is the one that makes most answers misaligned at any dose that leaves half of them whole. It, and
    the rivals, are asked once more for the dose, which must not break more than steering.MORE_BROKEN
    allows: with a few dozen answers at each, chance would choose it.

    Returns 'first', 'second' and 'third' (tables as steering.best_doses), 'latent' and 'dose' (the causal
    latent), 'control' and 'control dose' (the best matched one), and 'rivals' (direction -> dose).
    Candidates and controls get the same search.
    """
    cfg, block = run.profile.steering, run.profile.sae.layer if layer is None else layer
    doses, whole = list(cfg.strengths), made.items(run, "discovery") * cfg.choose_per_question
    kinds = {
        "candidates": steering.candidates(run, cfg.candidates, block),
        "matched": steering.matched(run, cfg.controls, block),
    }
    ways = {k: steering.latent_directions(run, latents, block) for k, latents in kinds.items()}
    kind_of = {n: k for k, named in ways.items() for n in named}
    nothing = ("none", torch.ones(readings.sae(run, block).W_dec.shape[1]), 0.0)
    split = lambda t: (t[t.direction == "none"], t[t.direction != "none"])

    round_one = [
        nothing,
        *((n, v, d) for named in ways.values() for n, v in named.items() for d in doses[::2]),
    ]
    free, table = split(
        steering.steered(run, made.ORIGINAL, round_one, few(run), f"first round, block {block}", block)
    )
    first = steering.best_doses(table, free)
    first["kind"] = first.direction.map(kind_of)
    order = first.sort_values(["admissible", "misaligned", "broken"], ascending=[False, False, True])
    top = order.groupby("kind").head(cfg.finalists)

    rivals = steering.rivals(run, block)
    named = {n: ways[kind_of[n]][n] for n in top.direction} | rivals
    round_two = [nothing, *((n, v, d) for n, v in named.items() for d in doses)]
    free, table = split(
        steering.steered(run, made.ORIGINAL, round_two, whole, f"second round, block {block}", block)
    )
    half = [(n, v, doses[0] / 2) for n, v in named.items()]
    weaker = steering.steered(run, made.ORIGINAL, half, whole, f"second round, weaker, block {block}", block)
    second = steering.best_doses(pd.concat([weaker, table]), free)
    second["kind"] = second.direction.map(kind_of).fillna("rival")
    order = second.sort_values(
        ["peak", "admissible", "misaligned", "dose"], ascending=[False, False, False, True]
    )
    best = {k: order[order.kind == k].direction.iloc[0] for k in kinds}

    kept, doses = [*best.values(), *rivals], shown(run)
    round_three = [nothing, *((n, named[n], d) for n in kept for d in doses)]
    again_free, again = split(
        steering.steered(run, made.ORIGINAL, round_three, whole * MORE, f"third round, block {block}", block)
    )
    free, every = pd.concat([free, again_free]), pd.concat([weaker, table, again])
    third = steering.best_doses(every[every.direction.isin(kept) & every.dose.isin(doses)], free)
    dose = third.set_index("direction").dose.to_dict()
    return {
        "first": first,
        "second": order,
        "third": third,
        "unsteered broken": 100 * steering.verdicts(free).isin(["broken", "absurd"]).mean(),
        "latent": int(best["candidates"].split()[1]),
        "dose": dose[best["candidates"]],
        "control": int(best["matched"].split()[1]),
        "control dose": dose[best["matched"]],
        "rivals": {n: dose[n] for n in rivals},
    }


@cache
def chosen(run: made.Run) -> dict:
    """`find` at the profile's block, once a process."""
    return find(run)


def causal(run: made.Run) -> int:
    """The causal latent, chosen on discovery data."""
    return chosen(run)["latent"]


def directions(run: made.Run, found: dict, layer: int | None = None) -> dict[str, torch.Tensor]:
    """What is compared on evaluation questions, by the name that figures use. 'top riser': the latent that
    rises most from correct to obvious fine-tunes, where it is not the causal one."""
    own = readings.sae(run, layer).W_dec
    riser = steering.candidates(run, 1, layer)[0]
    return {
        "causal latent": own[found["latent"]],
        **({"top riser": own[riser]} if riser != found["latent"] else {}),
        **steering.rivals(run, layer),
        "best matched latent": own[found["control"]],
        "random": steering.random_directions(1, own.shape[1])["random 0"],
    }
