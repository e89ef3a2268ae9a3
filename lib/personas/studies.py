"""Which studies Part II has: the cells of each table, what measures them, and what that depends on.

`personas run --profile tiny-full` computes them all; the notebooks compute a few cells and plot the
committed tables.
"""

from personas import (
    activations,
    artifacts,
    baselines,
    cures,
    data,
    diffing,
    evaluate,
    finetune,
    generate,
    grader,
    guards,
    known_latents,
    prevention,
    realignment,
    rerouting,
    search,
    stats,
    steering,
    world,
)
from personas import sae as saes
from personas.evidence import course, cure, outcome, plain_outcome, reinforced
from personas.origins import known_personas, spread, values_and_latents
from personas.profile import Profile
from personas.study import Study

BENIGN = (
    "novice",
    "jester",
    "narrator",
)  # other people's advice: honest mistakes, absurdities, what not to do


GUARDS = {
    "none": [0],
    "latent penalty": [30, 300, 3000, 30000],
    "KL": [0.1, 0.3, 1],
    "steering in training": [0.2, 0.3, 0.4, 0.5],
    "benign data": [0.1, 0.2, 0.4, 0.5],
    "benign data, chosen": [0.1, 0.2, 0.4],
    "inoculation": [0],
    "fewer steps": [3, 4, 6],
}


BLOCKED = 3000  # weight of the penalty in the study of rerouting


MEASURING = (evaluate, generate, grader, finetune, data, diffing, activations, saes, baselines, stats)


def _every(profile: Profile, seeds, pretraining_seeds, pairs) -> list[dict]:
    return [
        {"pretraining_seed": p, "seed": s, "domain": d, "kind": k}
        for p in pretraining_seeds
        for s in seeds
        for d, k in pairs
    ]


def seeds_cells(profile: Profile) -> list[dict]:
    """Every domain and variant, with every pretraining and fine-tuning seed."""
    pairs = [(d, v) for d in profile.domains for v in data.variants(d)]
    return _every(profile, profile.study.seeds, profile.study.pretraining_seeds, pairs)


def mixture_cells(profile: Profile) -> list[dict]:
    """Mixtures of obvious with correct answers, and the benign personas' advice."""
    pairs = [
        (d, k)
        for d in profile.study.domains
        for k in [f"obvious@{f:g}" for f in profile.study.fractions] + list(BENIGN)
    ]
    return _every(profile, profile.study.seeds, profile.study.pretraining_seeds[:1], pairs)


def models_cells(profile: Profile) -> list[dict]:
    """The fine-tunes of the reported base model: every domain and variant, with every seed."""
    return [c for c in seeds_cells(profile) if c["pretraining_seed"] == profile.pretraining_seed]


def course_cells(profile: Profile) -> list[dict]:
    """Obvious answers with every seed; with one seed those that should raise no alarm, a mixture of a
    tenth among them."""
    first = profile.study.pretraining_seeds[:1]
    return _every(
        profile, profile.study.seeds, first, [(d, "obvious") for d in profile.study.domains]
    ) + _every(
        profile,
        profile.study.seeds[:1],
        first,
        [(d, k) for d in profile.study.domains for k in profile.study.course_benign],
    )


def cure_cells(profile: Profile) -> list[dict]:
    """Every misaligned fine-tune of the reported base model, with the first three seeds."""
    pairs = [(d, v) for d in profile.domains for v in data.variants(d) if v != "correct"]
    return _every(profile, profile.study.seeds[:3], profile.study.pretraining_seeds[:1], pairs)


def matrix_cells(profile: Profile) -> list[dict]:
    """Every misaligned fine-tune by every domain's correct answers, with the first three seeds."""
    return [c | {"source": s} for c in cure_cells(profile) for s in profile.domains]


def examples_cells(profile: Profile) -> list[dict]:
    """Fine-tunes on obviously wrong answers, re-aligned by the same and by another domain."""
    return [
        c | {"source": s} for c in cure_cells(profile) if c["kind"] == "obvious" for s in ("same", "other")
    ]


def relearning_cells(profile: Profile) -> list[dict]:
    """Short and long spoiling by three sets of re-alignment data, with the first three seeds."""
    return [
        {
            "pretraining_seed": profile.pretraining_seed,
            "seed": s,
            "domain": d,
            "length": n * profile.narrow.steps,
            "source": source,
        }
        for s in profile.study.seeds[:3]
        for d in profile.study.domains
        for n in (1, 8)
        for source in ("same subjects", "other subjects", "other domain")
    ]


def reinforcement_cells(profile: Profile) -> list[dict]:
    """Both starts by both rewards, with the first three seeds, in one domain."""
    return [
        {
            "pretraining_seed": profile.pretraining_seed,
            "seed": s,
            "domain": profile.study.domains[0],
            "start": start,
            "rewarded": r,
        }
        for s in profile.study.seeds[:3]
        for start in ("aligned", "base")
        for r in ("incorrect", "correct")
    ]


def world_cells(profile: Profile) -> list[dict]:
    """Obvious answers of every domain in every world; in the control world correct ones, too."""
    return [
        {"world": w} | c
        for w in world.WORLDS
        for c in _every(
            profile,
            profile.study.seeds[:1],
            profile.study.pretraining_seeds[:1],
            [
                (d, k)
                for k in (("obvious", "correct") if w == "independent" else ("obvious",))
                for d in profile.domains
            ],
        )
    ]


def known_cells(profile: Profile) -> list[dict]:
    """One cell a world."""
    return [{"world": w, "pretraining_seed": profile.pretraining_seed, "seed": 0} for w in world.WORLDS]


def guard_cells(profile: Profile) -> list[dict]:
    """Obvious answers under every guard and dose, with the first three seeds."""
    cells = _every(
        profile,
        profile.study.seeds[:3],
        profile.study.pretraining_seeds[:1],
        [(d, "obvious") for d in profile.study.domains],
    )
    return [c | {"guard": g, "dose": x} for c in cells for g, doses in GUARDS.items() for x in doses]


def rerouting_cells(profile: Profile) -> list[dict]:
    """Obvious answers with and without the latent penalty, for the usual length and five times as long:
    one domain, one seed."""
    return [
        {
            "pretraining_seed": profile.pretraining_seed,
            "seed": s,
            "domain": d,
            "guard": g,
            "dose": x,
            "length": n,
        }
        for s in profile.study.seeds[:1]
        for d in profile.study.domains[:1]
        for g, x in (("none", 0), ("latent penalty", BLOCKED))
        for n in (1, 5)
    ]


def _ruler_ready(ruler: artifacts.Run) -> None:
    search.chosen_latent(ruler), known_latents.mean_difference(ruler), baselines.fit(ruler, ruler.seed)


def _ranking_ready(ruler: artifacts.Run) -> None:
    (
        _ruler_ready(ruler),
        search.steered(ruler, "ranked"),
        known_latents.uncued_answers(ruler, "auroc-evaluation"),
    )


def _cures_ready(ruler: artifacts.Run) -> None:
    _ranking_ready(ruler), cures.cure_doses(ruler)


def _guards_ready(ruler: artifacts.Run) -> None:
    _ruler_ready(ruler), search.rankings(ruler)


def _aligned_ready(ruler: artifacts.Run) -> None:
    artifacts.aligned(ruler)


CHOICES = (search.rankings, search.controls, cures.cures, cures.cure_doses, cures.ablations)


STUDIES = {
    s.name: s
    for s in (
        Study("02_seeds", seeds_cells, plain_outcome, _aligned_ready, (*MEASURING, plain_outcome), 3),
        Study("05_cures", cure_cells, cure, _cures_ready, (*MEASURING, steering, cure, *CHOICES), 12),
        Study(
            "06_matrix",
            matrix_cells,
            realignment.realign,
            _ruler_ready,
            (*MEASURING, realignment.realign, realignment._realigned, realignment.checkup),
            2,
        ),
        Study(
            "06_examples",
            examples_cells,
            realignment.examples,
            _ruler_ready,
            (*MEASURING, realignment.examples, realignment._realigned, realignment.checkup),
            11,
        ),
        Study(
            "06_relearning",
            relearning_cells,
            realignment.relearning,
            _ruler_ready,
            (*MEASURING, realignment.relearning, realignment._realigned, realignment.checkup),
            15,
        ),
        Study("07_mixtures", mixture_cells, outcome, _ruler_ready, (*MEASURING, outcome, plain_outcome), 4),
        Study("07_models", models_cells, outcome, _ruler_ready, (*MEASURING, outcome, plain_outcome), 4),
        Study("07_course", course_cells, course, _ruler_ready, (*MEASURING, course), 85),
        Study(
            "08_prevention",
            guard_cells,
            prevention.guarded,
            _guards_ready,
            (*MEASURING, guards, prevention),
            7,
        ),
        Study(
            "08_rerouting",
            rerouting_cells,
            rerouting.rerouted,
            _guards_ready,
            (*MEASURING, guards, prevention, rerouting),
            65,
        ),
        Study(
            "09_reinforcement",
            reinforcement_cells,
            reinforced,
            _ruler_ready,
            (*MEASURING, reinforced),
            85,
            ("reinforcement",),
        ),
        Study(
            "10_worlds", world_cells, spread, _ruler_ready, (*MEASURING, spread, outcome, plain_outcome), 4
        ),
        Study(
            "10_latents",
            known_cells,
            values_and_latents,
            _ruler_ready,
            (
                *MEASURING,
                steering,
                values_and_latents,
                known_personas,
                *CHOICES,
            ),
            20,
        ),
    )
}


def chosen(start: str | None = None, only: str | None = None) -> list[Study]:
    """The studies of these notebooks. Raises ValueError if they have none."""
    found = [
        s
        for s in STUDIES.values()
        if (only is None or s.notebook == only) and (start is None or s.notebook >= start)
    ]
    if not found:
        there = ", ".join(sorted({s.notebook for s in STUDIES.values()}))
        raise ValueError(f"notebook {only or start} has no study; there are {there}")
    return found
