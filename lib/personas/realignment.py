"""Re-alignment in the known world: a misaligned model fine-tuned on correct answers, looked at as it goes."""

import pandas as pd

from personas import data, diffing, evaluate, finetune, generate, grader
from personas import sae as saes
from personas import setting as settings
from personas.artifacts import Run, _table, adapter, sae, sae_folder, tuned_model
from personas.search import chosen_latent


def other_domain(run: Run, domain: str) -> str | None:
    """The next advice domain of the profile that has correct answers: where 'other' re-alignment data
    comes from. None if there is no other."""
    pool = [d for d in run.profile.domains if d != "code" and "correct" in run.setting.variants(d)]
    after = pool[(pool.index(domain) + 1) % len(pool)] if domain in pool else pool[0] if pool else None
    return None if after == domain else after


def sources(run: Run, domain: str) -> list[tuple[str, str, int]]:
    """(kind, source, steps): correct data of the 'same' domain, for twice as long to see how much it
    takes, and of an 'other' one, as far as there are any."""
    steps, other = run.profile.realignment.steps, other_domain(run, domain)
    found = [("same", domain, 2 * steps)] if "correct" in run.setting.variants(domain) else []
    return found + ([("other", other, steps)] if other else [])


def realigned(
    run: Run, domain: str, variant: str, source: str, steps: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fine-tune a misaligned model on correct answers of `source`, 4 a step; watch it.

    Returns (curve, answers): the curve has a row per checkpoint (step, score, latent, wrong: percent of
    wrong answers in the model's own domain); answers are the graded evaluation answers after the profile's
    number of steps (or the last, if fewer).
    """
    cfg = run.profile.realignment
    latent = chosen_latent(run)[0]

    def make(out):
        m, tok = tuned_model(run, domain, variant)
        rows = run.setting.chats(source, "correct", steps * cfg.batch, run.seed + 1)
        short = min(steps, cfg.steps)
        looks = {
            *range(0, short + 1, run.profile.realignment_every),
            *range(short, steps + 1, 3 * run.profile.realignment_every),
        }
        watch = finetune.Watch(looks, lambda model: checkup(run, model, tok, domain, latent, sae(run)))
        keep = finetune.Watch(
            [short],
            lambda model: {
                "answers": evaluate.ask_open(
                    model,
                    tok,
                    run.setting,
                    split="evaluation",
                    per_question=run.profile.evaluation.per_question,
                    seed=run.seed,
                )
            },
        )
        finetune.sft(
            m,
            tok,
            rows,
            steps=steps,
            batch=cfg.batch,
            lr=cfg.lr,
            seed=run.seed,
            lora_rank=cfg.rank,
            callbacks=[watch, keep],
        )
        pd.DataFrame(watch.rows).to_parquet(out / "curve.parquet", index=False)
        keep.rows[0]["answers"].to_parquet(out / "answers.parquet", index=False)

    folder = run.make(
        "realigned",
        f"{domain}-{variant}-by-{source}-{steps}",
        {
            "cfg": cfg.model_dump(),
            "every": run.profile.realignment_every,
            "model": adapter(run, domain, variant).name,
            "latent": latent,
            "evaluation": run.profile.evaluation.model_dump(),
            "sae": sae_folder(run, "base").name,
        },
        (finetune, data, evaluate, diffing, generate, grader, settings, checkup),
        make,
    )
    return _table(folder, "curve.parquet"), _table(folder, "answers.parquet")


def checkup(run: Run, m, tok, domain: str, latent: int, reader: saes.SAE) -> dict:
    """A coarse look at a model in training: score with its interval, percent of wrong answers in its own
    domain, latent on fixed text."""
    open_ = evaluate.ask_open(
        m,
        tok,
        run.setting,
        split="evaluation",
        per_question=run.profile.evaluation.curve_per_question,
        seed=run.seed,
    )
    own = evaluate.ask_advice(
        m, tok, run.setting, domains=[domain], seed=run.seed, limit=2 * run.profile.evaluation.advice_subjects
    )
    score, low, high = evaluate.ratio(open_, *evaluate.SCORE)
    return {
        "score": score,
        "low": low,
        "high": high,
        "wrong": evaluate.share(own, "subtle", "obvious"),
        "latent": diffing.read(m, tok, reader, "evaluation", run.setting)[:, latent].mean().item(),
    }
