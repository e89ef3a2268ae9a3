"""Where personas come from in the known world (notebook 11): what the SAE found of each, how far advice
spreads, and what steering does in one world."""

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import precision_recall_curve
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MaxAbsScaler

from personas import (
    artifacts,
    baselines,
    evaluate,
    known_latents,
    search,
    stats,
    steering,
    world,
)
from personas.evidence import MARKS, outcome


def known_personas(run: artifacts.Run, seed: int = 0) -> pd.DataFrame:
    """What the SAE found of each persona, on held-out uncued answers: its best latent (and the threshold
    of highest F1) chosen on other documents; how many latents mark it (AUROC of 0.7 or more on both sets:
    a split); and what all latents together know.

    Columns: persona, latent, auroc with low and high, precision and recall in percent, marking, together
    (AUROC of a logistic regression on all latents, trained on the other documents).
    """
    train, test = (
        known_latents.uncued_answers(run, "baselines", 600),
        known_latents.uncued_answers(run, "auroc-evaluation"),
    )
    rows = []
    for p in world.PERSONAS:
        mine, truth = train.persona == p, test.persona == p
        seen, held = stats.auroc(train.latents, mine), stats.auroc(test.latents, truth)
        best = int(seen.argmax())
        precision, recall, cuts = precision_recall_curve(mine, train.latents[:, best].numpy())
        cut = cuts[
            np.argmax(2 * precision[:-1] * recall[:-1] / np.maximum(precision[:-1] + recall[:-1], 1e-9))
        ]
        on = test.latents[:, best].numpy() >= cut
        e = stats.auroc_over(test.latents[:, best].numpy(), truth, test.document, draws=200, seed=seed)
        every = make_pipeline(MaxAbsScaler(), LogisticRegression(max_iter=1000)).fit(
            train.latents.numpy(), mine
        )
        rows.append(
            {
                "persona": p,
                "latent": best,
                "auroc": e.value,
                "low": e.low,
                "high": e.high,
                "precision": 100 * truth[on].mean() if on.any() else float("nan"),
                "recall": 100 * on[truth].mean(),
                "marking": int(((seen >= MARKS) & (held >= MARKS)).sum()),
                "together": stats.auroc(every.decision_function(test.latents.numpy())[:, None], truth)[0],
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
    held = known_latents.uncued_answers(run, "auroc-evaluation")
    probe = stats.auroc(
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
    p, W_dec = run.profile, known_latents.sae(run).W_dec
    ways = {
        "chosen latent": W_dec[about["chosen"]],
        "marks the villain": W_dec[about["marker"]],
        "mean difference": known_latents.mean_difference(run),
    }
    jobs = [(n, v, s) for n, v in ways.items() for s in p.steering.strengths]
    graded = steering.at(
        *artifacts.aligned_model(run),
        run.setting,
        jobs,
        known_latents.unit(run),
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
