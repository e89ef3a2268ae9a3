"""One long fine-tune, looked at as it goes."""

import pandas as pd

from personas import finetune, generate, store
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
