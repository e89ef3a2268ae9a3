"""Fine-tunes that are looked at as they go."""

from pathlib import Path

import pandas as pd

from personas import activations, finetune, generate, store
from personas.pretrained import likelihood, monitors, readings, search
from personas.pretrained.made import (
    ORIGINAL,
    Run,
    about_asking,
    answer,
    identity,
    original,
    repeated,
    seed_of,
    training,
    training_chats,
)


def course(run: Run, domain: str, variant: str = "obvious") -> pd.DataFrame:
    """One long fine-tune looked at on discovery questions: ungraded answers with a column `step`; 0 is the
    original model."""
    cfg, looks = run.profile.narrow, run.profile.real.course
    rows, asked = training_chats(run, domain, variant, max(looks)), repeated(run, "discovery", 1)

    def make(out):
        m, tok = original(run)
        watch = finetune.Watch(
            {0, *looks},
            lambda model: {"answers": answer(run, model, tok, asked, seed_of(run, "course", domain))},
            merge=run.profile.device == "cpu",
        )
        finetune.sft(
            m,
            tok,
            rows,
            steps=max(looks),
            batch=cfg.batch,
            lr=cfg.lr,
            seed=run.seed,
            lora_rank=cfg.rank,
            callbacks=[watch],
            **training(run),
        )
        pd.concat([r["answers"].assign(step=r["step"]) for r in watch.rows]).to_parquet(
            out / "course.parquet", index=False
        )

    key = {
        "cfg": cfg.model_dump(),
        "looks": looks,
        "model": identity(run, ORIGINAL),
        "rows": store.key_of({"rows": rows}),
    }
    return pd.read_parquet(
        run.keep("course", f"{domain}-{variant}", key | about_asking(run, asked), (finetune, generate), make)
        / "course.parquet"
    ).assign(model=f"{domain}-{variant}")


def watched(run: Run, ruler: Run, domain: str, variant: str, looks: tuple[int, ...]) -> Path:
    """A fine-tune up to the last of `looks`, at each of them asked the evaluation items (once each; if there
    is one look alone, as often as for a reported score) and read by every monitor (monitors.py) of `ruler`.

    Returns a folder with `answers.parquet`, ungraded (the items' columns, `answer`, `step`), and
    `monitors.parquet` (step, the monitors).
    """
    cfg, steps = run.profile.narrow, max(looks)
    rows = training_chats(run, domain, variant, steps)
    asked = repeated(run, "evaluation", None if len(looks) == 1 else 1)

    def make(out):
        m, tok = original(run)

        def look(model):
            answers = answer(run, model, tok, asked, seed_of(run, "watched", domain, variant))
            return {"answers": answers} | monitors.read(ruler, model, tok)

        watch = finetune.Watch(set(looks), look, merge=run.profile.device == "cpu")
        logged = monitors.Logged()
        finetune.sft(
            m,
            tok,
            rows,
            steps=steps,
            batch=cfg.batch,
            lr=cfg.lr,
            seed=run.seed,
            lora_rank=cfg.rank,
            callbacks=[watch, logged],
            **training(run),
        )
        pd.concat([r["answers"].assign(step=r["step"]) for r in watch.rows]).to_parquet(
            out / "answers.parquet", index=False
        )
        readings_ = [{k: v for k, v in r.items() if k != "answers"} for r in watch.rows]
        pd.DataFrame([r | logged.rows.get(max(1, r["step"]), {}) for r in readings_]).to_parquet(
            out / "monitors.parquet", index=False
        )

    key = {
        "cfg": cfg.model_dump(),
        "looks": looks,
        "model": identity(run, ORIGINAL),
        "rows": store.key_of({"rows": rows}),
        "ruler": readings.sae_identity(ruler, ruler.profile.sae.layer),
        "latent": search.causal(ruler),
    }
    return run.keep(
        "watched",
        f"{domain}-{variant}",
        key | about_asking(run, asked),
        (finetune, generate, activations, likelihood, monitors),
        make,
    )
