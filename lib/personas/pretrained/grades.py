"""Grades of sampled answers by the profile's judge, each text graded once and kept in the store."""

import pandas as pd

from personas import endpoint, local_model, store
from personas import model as models
from personas.pretrained import grading, made


def of(run: made.Run, table: pd.DataFrame) -> list[str]:
    """A class (grading.CLASSES) for each answer of a table with `prompt` and `answer`, by the profile's
    judge; kept by the texts graded. The small judge does not grade again what is among the readings."""
    texts, cfg = list(zip(table.prompt, table.answer)), run.profile.real.judge
    known = grading.judged() if cfg.model == "own" else {}
    fresh = list(dict.fromkeys(t for t in texts if t not in known)) if known else texts

    def make(out):
        prompts, said = [p for p, _ in fresh], [a for _, a in fresh]
        found = (
            grading.grade(prompts, said)
            if cfg.model == "own"
            else grading.grade_by(judge(run), prompts, said, cfg.scale)
        )
        pd.DataFrame({"grade": found}).to_parquet(out / "grades.parquet", index=False)

    if fresh:
        who = grading.version() if cfg.model == "own" else cfg.model_dump(exclude={"url", "key", "price"})
        key = {"judge": who, "texts": store.key_of({"texts": fresh})}
        folder = run.keep("grades", key["texts"], key, (grading,), make)
        given = pd.read_parquet(folder / "grades.parquet").grade
        if not known:
            return given.tolist()
        known = known | dict(zip(fresh, given))
    return [known[t] for t in texts]


def judge(run: made.Run):
    """The endpoint or local model that the profile names as its judge."""
    cfg = run.profile.real.judge
    if cfg.url:
        return endpoint.Endpoint(
            cfg.url, cfg.model, store.ROOT / run.profile.store / "judged.jsonl", key=cfg.key, price=cfg.price
        )
    dtype = models.best_dtype(run.profile.device)
    return local_model.Local(*models.load(cfg.model, run.profile.device, dtype, cfg.four_bit), batch=64)
