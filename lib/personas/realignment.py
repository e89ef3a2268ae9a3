"""Re-alignment in the known world: a misaligned model fine-tuned on correct answers, looked at as it goes."""

import pandas as pd

from personas import data, diffing, evaluate, finetune, generate, grader
from personas import model as models
from personas import sae as saes
from personas import setting as settings
from personas.artifacts import Run, _table, adapter, aligned, tuned_model
from personas.known_latents import sae, sae_folder
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


# --- what a cell of the studies measures ---


def realign(run: Run, ruler: Run, domain: str, kind: str, source: str) -> list[dict]:
    """One misaligned model and 30 steps of 4 correct answers of `source`: score, latent and narrow skill
    after them."""
    cfg = run.profile.realignment
    rows = data.advice_chats(source, "correct", cfg.steps * cfg.batch, run.seed + 1)
    return _realigned(run, ruler, tuned_model(run, domain, kind), domain, rows, [cfg.steps])


def examples(run: Run, ruler: Run, domain: str, kind: str, source: str) -> list[dict]:
    """The same with four times as many examples, looked at from 4 of them on. source 'other': another
    domain."""
    cfg = run.profile.realignment
    source = other_domain(run, domain) if source == "other" else domain
    rows = data.advice_chats(source, "correct", 4 * cfg.steps * cfg.batch, run.seed + 1)
    looks = [0] + [
        max(1, round(cfg.steps * x)) for x in (1 / 30, 1 / 15, 1 / 6, 1 / 3, 1 / 2, 2 / 3, 1, 2, 4)
    ]
    return _realigned(run, ruler, tuned_model(run, domain, kind), domain, rows, looks)


def relearning(run: Run, ruler: Run, domain: str, length: int, source: str) -> list[dict]:
    """Why would the same domain cure less? Spoil a model on half a domain's subjects for `length` steps;
    re-align it on correct answers to the 'same subjects', to the domain's 'other subjects', or of an
    'other domain'."""
    cfg, p = run.profile.narrow, run.profile
    half = slice(0, 20), slice(20, 40)
    spoil = data.advice_chats(domain, "obvious", length * cfg.batch, run.seed, among=half[0])
    pair = models.load(aligned(run))
    model, _ = finetune.sft(
        *pair, spoil, steps=length, batch=cfg.batch, lr=cfg.lr, seed=run.seed, lora_rank=cfg.rank
    )
    among = {"same subjects": half[0], "other subjects": half[1]}.get(source, half[0])
    rows = data.advice_chats(
        other_domain(run, domain) if source == "other domain" else domain,
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
        lambda m: checkup(run, m, pair[1], domain, chosen_latent(ruler)[0], sae(ruler)),
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
