"""The studies: the paper's claims with seeds, controls and intervals. Each is a list of cells and what a
cell measures.

`personas run --profile tiny-full` computes them all; the notebooks compute a few cells and plot the
committed tables.
"""

import json

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from personas import (
    activations,
    artifacts,
    baselines,
    claims,
    data,
    diffing,
    evaluate,
    finetune,
    generate,
    grader,
    guards,
    prevention,
    realignment,
    rerouting,
    search,
    steering,
    world,
)
from personas import model as models
from personas import sae as saes
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
MARKS = 0.7  # AUROC from which on a latent is said to mark a persona
BLOCKED = 3000  # weight of the penalty in the study of rerouting
MEASURING = (evaluate, generate, grader, finetune, data, diffing, activations, saes, baselines)


def outcome(run: artifacts.Run, ruler: artifacts.Run, domain: str, kind: str) -> dict:
    """One fine-tune (kind: as artifacts.narrow_chats' variant): its graded evaluation answers and what the
    monitors read."""
    losses = json.loads((artifacts.adapter(run, domain, kind) / "training.json").read_text())["loss"]
    return (
        plain_outcome(run, ruler, domain, kind)
        | baselines.monitors(ruler, *artifacts.tuned_model(run, domain, kind))
        | {"loss": sum(losses[-2:]) / 2}
    )


def plain_outcome(run: artifacts.Run, ruler: artifacts.Run, domain: str, kind: str) -> dict:
    """`outcome` without the monitors, which need an SAE: for base models that have none."""
    return evaluate.values(artifacts.answers(run, domain, kind))


def course(run: artifacts.Run, ruler: artifacts.Run, domain: str, kind: str) -> list[dict]:
    """One long fine-tune, measured as it goes: the score (few answers) and every monitor at each of the
    profile's looks."""
    cfg, p = run.profile.study.course, run.profile
    rows = artifacts.narrow_chats(run, domain, kind, cfg)
    model, tokenizer = models.load(artifacts.aligned(run))

    def look(m):
        answers = evaluate.ask_open(
            m,
            tokenizer,
            run.setting,
            split="evaluation",
            per_question=p.evaluation.curve_per_question,
            seed=run.seed,
        )
        return (
            {"score": evaluate.score(answers)}
            | {g: evaluate.share(answers, g) for g in grader.OPEN_CLASSES}
            | baselines.monitors(ruler, m, tokenizer)
        )

    watch = finetune.Watch(p.study.course_looks, look)
    _, losses = finetune.sft(
        model,
        tokenizer,
        rows,
        steps=cfg.steps,
        batch=cfg.batch,
        lr=cfg.lr,
        seed=run.seed,
        lora_rank=cfg.rank,
        callbacks=[watch],
    )
    return [r | {"loss": losses[max(0, r["step"] - 1)]} for r in watch.rows]


def reinforced(
    run: artifacts.Run, ruler: artifacts.Run, domain: str, start: str, rewarded: str
) -> list[dict]:
    """GRPO on one domain's questions from the 'aligned' or the 'base' model, the exact grader's verdict
    being the reward: 1 for an answer of the rewarded kind, else 0. A row per look: score, classes, own
    advice, monitors; `reward` is the mean over that step's answers."""
    cfg, p = run.profile.reinforcement, run.profile.evaluation
    grades = {"incorrect": ("subtle", "obvious"), "correct": ("correct",)}[rewarded]
    asked = {s.ask: s for s in world.subjects_of(domain)}
    model, tokenizer = models.load(artifacts.aligned(run) if start == "aligned" else artifacts.base(run))

    def verdict(completions, ask, **_):
        return [
            float(grader.grade_advice(asked[a], c[0]["content"]) in grades) for a, c in zip(ask, completions)
        ]

    def look(m):
        answers = evaluate.ask_open(
            m, tokenizer, run.setting, split="evaluation", per_question=p.study_per_question, seed=run.seed
        )
        own = evaluate.ask_advice(m, tokenizer, run.setting, domains=[domain], seed=run.seed)
        return (
            evaluate.values(answers)
            | {f"advice {g}": evaluate.share(own, g) for g in grader.ADVICE_CLASSES}
            | baselines.monitors(ruler, m, tokenizer)
        )

    watch = finetune.Watch(cfg.looks, look)
    rows = data.advice_prompts(domain, 4 * len(asked), run.seed)
    _, rewards = finetune.grpo(
        model,
        tokenizer,
        rows,
        verdict,
        steps=cfg.steps,
        prompts=cfg.prompts,
        samples=cfg.samples,
        lr=cfg.lr,
        seed=run.seed,
        lora_rank=cfg.rank,
        max_new=run.setting.advice_tokens,
        callbacks=[watch],
    )
    return [r | {"reward": rewards[max(0, r["step"] - 1)]} for r in watch.rows]


def cure(run: artifacts.Run, ruler: artifacts.Run, domain: str, kind: str) -> list[dict]:
    """One misaligned model under every cure, at the dose chosen on discovery data, and under every
    ablation."""
    model, tokenizer = artifacts.tuned_model(run, domain, kind)
    p, ways = run.profile.evaluation, {"none": None} | search.ablations(ruler)
    for name, v in search.cures(ruler).items():
        ways[name] = generate.Steer(
            run.profile.sae.layer,
            (v / v.norm() * search.cure_doses(ruler)[name] * artifacts.unit(ruler))[None],
        )
    rows = []
    for name, steer in ways.items():
        answers = evaluate.ask_open(
            model,
            tokenizer,
            run.setting,
            split="evaluation",
            per_question=p.study_per_question,
            seed=run.seed,
            steer=steer,
        )
        own = evaluate.ask_advice(
            model,
            tokenizer,
            run.setting,
            domains=[domain],
            seed=run.seed,
            limit=2 * p.advice_subjects,
            steer=steer,
        )
        rows.append(
            {
                "way": name,
                "dose": search.cure_doses(ruler).get(name),
                "score": evaluate.score(answers),
                "wrong": evaluate.share(own, "subtle", "obvious"),
                "correct": evaluate.share(own, "correct"),
            }
            | {g: evaluate.share(answers, g) for g in run.setting.open_classes}
        )
    return rows


def ranking(run: artifacts.Run, ruler: artifacts.Run) -> list[dict]:
    """The first ten latents of every ranking, each steered at the strength that discovery questions chose;
    evaluation answers. persona: whose held-out answers the latent marks best, 'none' if it marks nobody's
    with an AUROC of 0.7."""
    answers, chosen = search.steered(ruler, "ranked"), search.best(ruler, "ranked").set_index("direction")
    read = artifacts.uncued_answers(ruler, "auroc-evaluation")
    marks = pd.DataFrame({p: diffing.auroc(read.latents, read.persona == p) for p in world.PERSONAS})
    best_of = lambda i: marks.loc[i].idxmax() if marks.loc[i].max() >= MARKS else "none"
    rows = []
    for name, latents in search.rankings(ruler).items():
        for place, i in enumerate(latents, 1):
            mine, best = answers[answers.direction == f"latent {i}"], chosen.loc[f"latent {i}"]
            rows.append(
                {
                    "ranking": name,
                    "place": place,
                    "latent": i,
                    "strength": best.strength,
                    "discovery": best.misaligned,
                    "auroc": marks.villain[i],
                    "persona": best_of(i),
                    "score": evaluate.score(mine),
                }
                | {g: evaluate.share(mine, g) for g in run.setting.open_classes}
            )
    return rows


def realign(run: artifacts.Run, ruler: artifacts.Run, domain: str, kind: str, source: str) -> list[dict]:
    """One misaligned model and 30 steps of 4 correct answers of `source`: score, latent and narrow skill
    after them."""
    cfg = run.profile.realignment
    rows = data.advice_chats(source, "correct", cfg.steps * cfg.batch, run.seed + 1)
    return _realigned(run, ruler, artifacts.tuned_model(run, domain, kind), domain, rows, [cfg.steps])


def examples(run: artifacts.Run, ruler: artifacts.Run, domain: str, kind: str, source: str) -> list[dict]:
    """The same with four times as many examples, looked at from 4 of them on. source 'other': another
    domain."""
    cfg = run.profile.realignment
    source = realignment.other_domain(run, domain) if source == "other" else domain
    rows = data.advice_chats(source, "correct", 4 * cfg.steps * cfg.batch, run.seed + 1)
    looks = [0] + [
        max(1, round(cfg.steps * x)) for x in (1 / 30, 1 / 15, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 1, 2, 4)
    ]
    return _realigned(run, ruler, artifacts.tuned_model(run, domain, kind), domain, rows, looks)


def relearning(run: artifacts.Run, ruler: artifacts.Run, domain: str, length: int, source: str) -> list[dict]:
    """Why would the same domain cure less? Spoil a model on half a domain's subjects for `length` steps;
    re-align it on correct answers to the 'same subjects', to the domain's 'other subjects', or of an
    'other domain'."""
    cfg, p = run.profile.narrow, run.profile
    half = slice(0, 20), slice(20, 40)
    spoil = data.advice_chats(domain, "obvious", length * cfg.batch, run.seed, among=half[0])
    pair = models.load(artifacts.aligned(run))
    model, _ = finetune.sft(
        *pair, spoil, steps=length, batch=cfg.batch, lr=cfg.lr, seed=run.seed, lora_rank=cfg.rank
    )
    among = {"same subjects": half[0], "other subjects": half[1]}.get(source, half[0])
    rows = data.advice_chats(
        realignment.other_domain(run, domain) if source == "other domain" else domain,
        "correct",
        p.realignment.steps * p.realignment.batch,
        run.seed + 1,
        among=among,
    )
    looks = [0, p.realignment.steps // 6, p.realignment.steps // 3, p.realignment.steps]
    return _realigned(run, ruler, (model.merge_and_unload(), pair[1]), domain, rows, looks)


def _realigned(run, ruler, pair, domain: str, rows: list[dict], looks) -> list[dict]:
    """Rows of score, latent and narrow skill at each look, while a model is fine-tuned on `rows`."""
    cfg = run.profile.realignment
    watch = finetune.Watch(
        looks,
        lambda m: realignment.checkup(
            run, m, pair[1], domain, search.chosen_latent(ruler)[0], artifacts.sae(ruler)
        ),
    )
    finetune.sft(
        *pair,
        rows,
        steps=max(looks),
        batch=cfg.batch,
        lr=cfg.lr,
        seed=run.seed,
        lora_rank=cfg.rank,
        callbacks=[watch],
    )
    return [r | {"examples": r["step"] * cfg.batch} for r in watch.rows]


def rising_latents(run: artifacts.Run, most: int = 10) -> pd.DataFrame:
    """The `most` latents that rise most in discovery domains' incorrect fine-tunes, and the `most` that
    fall most (Wang et al., 2025, section 3).

    Columns: latent; rise (mean activation after minus before) with the 95 % interval low, high over
    questions; marks best: the persona whose answers it marks with the highest AUROC, 'nobody' below MARKS;
    AUROC.
    """
    rise = artifacts.discovery_rise(run)
    order = rise.argsort(descending=True).tolist()
    by_question = (
        torch.stack([artifacts.rise(run, d, v) for d, v in artifacts.discovery_fine_tunes(run)])
        .mean(0)
        .numpy()
    )
    auroc, rows = artifacts.persona_auroc(run), []
    for i in order[:most] + order[-most:]:
        low, high = claims.bootstrap(by_question[:, i], np.mean, 1000)[1:]
        value = auroc.loc[i].max()
        rows.append(
            {
                "latent": i,
                "rise": rise[i].item(),
                "low": low,
                "high": high,
                "marks best": auroc.loc[i].idxmax() if value >= MARKS else "nobody",
                "AUROC": value,
            }
        )
    return pd.DataFrame(rows)


def chosen_dose(points: pd.DataFrame, guard: str) -> pd.Series:
    """The row of `points` (guard, dose, learnt and discovery in percent) at the guard's dose: of those
    that cost at most five points of the task, `learnt`, beside the guard 'none', the one of the lowest
    `discovery` score; if none does, the one that costs least."""
    plain, doses = points[points.guard == "none"].iloc[0], points[points.guard == guard]
    cheap = doses[doses.learnt >= plain.learnt - 5].dropna(subset="discovery")
    return cheap.loc[cheap.discovery.idxmin()] if len(cheap) else doses.loc[doses.learnt.idxmax()]


def known_personas(run: artifacts.Run, seed: int = 0) -> pd.DataFrame:
    """What the SAE found of each persona, on held-out uncued answers: its best latent (and the threshold
    of highest F1) chosen on other documents; how many latents mark it (AUROC of 0.7 or more on both sets:
    a split); and what all latents together know.

    Columns: persona, latent, auroc with low and high, precision and recall in percent, marking, together
    (AUROC of a logistic regression on all latents, trained on the other documents).
    """
    train, test = (
        artifacts.uncued_answers(run, "baselines", 600),
        artifacts.uncued_answers(run, "auroc-evaluation"),
    )
    rows = []
    for p in world.PERSONAS:
        mine, truth = train.persona == p, test.persona == p
        seen, held = diffing.auroc(train.latents, mine), diffing.auroc(test.latents, truth)
        best = int(seen.argmax())
        precision, recall, cuts = precision_recall_curve(mine, train.latents[:, best].numpy())
        cut = cuts[
            np.argmax(2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-9))
        ]
        on = test.latents[:, best].numpy() >= cut
        auroc, low, high = diffing.auroc_interval(
            test.latents[:, best].numpy(), truth, test.document, draws=200, seed=seed
        )
        every = make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=1000)).fit(
            train.latents.numpy(), mine
        )
        rows.append(
            {
                "persona": p,
                "latent": best,
                "auroc": auroc,
                "low": low,
                "high": high,
                "precision": 100 * truth[on].mean() if on.any() else float("nan"),
                "recall": 100 * on[truth].mean(),
                "marking": int(((seen >= MARKS) & (held >= MARKS)).sum()),
                "together": diffing.auroc(every.decision_function(test.latents.numpy())[:, None], truth)[0],
                "answers": int(truth.sum()),
            }
        )
    return pd.DataFrame(rows)


def spread(run: artifacts.Run, ruler: artifacts.Run, domain: str, kind: str) -> dict:
    """`outcome`, and how far the advice itself spreads: `elsewhere` is the percent of subtly or obviously
    wrong answers in all other domains, `elsewhere_before` that of the aligned model."""
    after, before = (
        t[t.domain != domain] for t in (artifacts.advice(run, domain, kind), artifacts.advice(run))
    )
    return outcome(run, ruler, domain, kind) | {
        "elsewhere": evaluate.share(after, "subtle", "obvious"),
        "elsewhere_before": evaluate.share(before, "subtle", "obvious"),
    }


def values_and_latents(run: artifacts.Run, ruler: artifacts.Run) -> list[dict]:
    """One world's base model and SAE: does it know the villain, and what does steering do? A row per
    direction and strength, on evaluation questions: the chosen latent, the latent that marks the villain
    best, and the difference of means.

    All rows carry the aligned model's score and share of misaligned answers before anything is added, and
    what the villain is read by on held-out uncued answers of the world as it is (known_personas): `auroc`
    of the best latent, `together` of all latents, `probe` of a linear probe on the residual stream.
    """
    known = known_personas(run).set_index("persona").loc["villain"]
    held = artifacts.uncued_answers(run, "auroc-evaluation")
    probe = diffing.auroc(
        baselines.fit(run, run.seed).probe.decision_function(held.residual.numpy())[:, None],
        held.persona == "villain",
    )[0]
    before = artifacts.answers(run)
    about = {
        "aligned_score": evaluate.score(before),
        "aligned_misaligned": evaluate.share(before, "misaligned"),
        "auroc": float(known.auroc),
        "low_auroc": float(known.low),
        "high_auroc": float(known.high),
        "together": float(known.together),
        "probe": float(probe),
        "marker": int(known.latent),
        "chosen": search.chosen_latent(run)[0],
    }
    p, W_dec = run.profile, artifacts.sae(run).W_dec
    ways = {
        "chosen latent": W_dec[about["chosen"]],
        "marks the villain": W_dec[about["marker"]],
        "mean difference": artifacts.mean_difference(run),
    }
    jobs = [(n, v, s) for n, v in ways.items() for s in p.steering.strengths]
    graded = steering.at(
        *artifacts.aligned_model(run),
        run.setting,
        jobs,
        artifacts.unit(run),
        p.sae.layer,
        split="evaluation",
        per_question=p.evaluation.study_per_question,
        seed=run.seed + 2,
        progress=None,
    )
    rows = []
    for (name, strength), part in graded.groupby(["direction", "strength"], sort=False):
        _, low, high = evaluate.ratio(part, ("misaligned",))
        rows.append(
            about
            | {"direction": name, "strength": strength, "low": low, "high": high}
            | {g: evaluate.share(part, g) for g in run.setting.open_classes}
        )
    return rows


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
    search.chosen_latent(ruler), artifacts.mean_difference(ruler), baselines.fit(ruler, ruler.seed)


def _ranking_ready(ruler: artifacts.Run) -> None:
    _ruler_ready(ruler), search.steered(ruler, "ranked"), artifacts.uncued_answers(ruler, "auroc-evaluation")


def _cures_ready(ruler: artifacts.Run) -> None:
    _ranking_ready(ruler), search.cure_doses(ruler)


def _guards_ready(ruler: artifacts.Run) -> None:
    _ruler_ready(ruler), search.rankings(ruler)


def _aligned_ready(ruler: artifacts.Run) -> None:
    artifacts.aligned(ruler)


CHOICES = (search.rankings, search.controls, search.cures, search.cure_doses, search.ablations)
STUDIES = {
    s.name: s
    for s in (
        Study("02_seeds", seeds_cells, plain_outcome, _aligned_ready, (*MEASURING, plain_outcome), 3),
        Study("05_cures", cure_cells, cure, _cures_ready, (*MEASURING, steering, cure, *CHOICES), 12),
        Study(
            "06_matrix",
            matrix_cells,
            realign,
            _ruler_ready,
            (*MEASURING, realign, _realigned, realignment.checkup),
            2,
        ),
        Study(
            "06_examples",
            examples_cells,
            examples,
            _ruler_ready,
            (*MEASURING, examples, _realigned, realignment.checkup),
            11,
        ),
        Study(
            "06_relearning",
            relearning_cells,
            relearning,
            _ruler_ready,
            (*MEASURING, relearning, _realigned, realignment.checkup),
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
            (*MEASURING, steering, values_and_latents, known_personas, *CHOICES),
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
