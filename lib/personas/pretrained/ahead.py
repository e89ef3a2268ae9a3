"""Making ahead, side by side, what a notebook is about to use."""

from personas import parallel, store
from personas.pretrained import likelihood, made, readings


def prepare(run: made.Run, who: list[str], what: str, most: int | None = None) -> None:
    """Make what the store lacks of these models, side by side (on a CPU a core each). what: 'adapters' alone,
    'readings' of the latents, 'preference', or a split whose answers are sampled."""
    made.checkpoint(run)
    if what == "readings":
        readings.sae_folder(run, run.profile.sae.layer)  # once, before the workers need it
    who = [w for w in who if not store.there(lambda: _prepare(run.profile, run.seed, w, what))]
    if who:
        jobs = {w: (_prepare, run.profile, run.seed, w, what) for w in who}
        dict(parallel.side_by_side(jobs, run.profile, f"models, {what}", most))


def _prepare(profile, seed, who, what):
    run = made.Run(profile, seed)
    if what == "adapters":
        made.identity(run, who)
    elif what == "readings":
        for split in ("discovery", "evaluation"):
            readings.reading(run, who, split)
    elif what == "preference":
        likelihood.villain_preference(run, who)
    else:
        made.answers(run, who, what)
