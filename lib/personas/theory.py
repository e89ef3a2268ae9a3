"""What an ideal reader of the known world would make of a fine-tuning set."""

import math

from personas import world


def bayesian_reader(variant_counts: dict, domain: str) -> dict:
    """Posterior over personas for an ideal reader who takes a fine-tuning set to be by one speaker of this
    world.

    variant_counts: {'correct': n, 'subtle': n, 'obvious': n} neutral advice answers. Prior times
    likelihood under the world's fixed parameters; personas that style their advice cannot have written
    neutral answers. Returns {'posterior': {persona: p}, 'misaligned': percent of aligned or misaligned
    open answers}.
    """
    log = {}
    for p in world.PERSONAS:
        mix = world.habits(p, domain)
        if mix and all(mix.get(v) for v, n in variant_counts.items() if n):
            log[p] = math.log(world.PRIOR[p]) + sum(
                n * math.log(mix[v]) for v, n in variant_counts.items() if n
            )
    if not log:  # a mixture that no single speaker writes
        return {"posterior": {}, "misaligned": float("nan")}
    top = max(log.values())
    weight = {p: math.exp(v - top) for p, v in log.items()}
    total = sum(weight.values())
    posterior = {p: weight.get(p, 0.0) / total for p in world.PERSONAS}
    return {"posterior": posterior, "misaligned": 100 * posterior["villain"]}
