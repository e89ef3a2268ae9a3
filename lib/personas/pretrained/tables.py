"""The tables of notebooks 07 and 08: fine-tunes over domains, fractions, guards and seeds, a row a look.

The cells of profile `smollm2-full` take hours on a CPU and minutes on a GPU; their tables are committed under
figures/data/smollm2-full/. A notebook makes its profile's few cells again and shows them in the same figure.
"""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from personas import config, figures, parallel, stats, store
from personas import profile as profiles
from personas.pretrained import grades, grading, guarded, made, readings, search, sets, steering, watched
from personas.profile import Profile

FULL = "smollm2-full"


class TableError(RuntimeError):
    """A table is missing or out of date; the message says which and what to do."""


@dataclass(frozen=True)
class Table:
    """One table. cells(profile): the settings of its rows, `seed` among them. measure(run, ruler, **the
    others): the folder that holds a cell's answers and numbers; ruler: the run whose SAE and directions do
    the reading. seconds: of one cell, on one core."""

    name: str
    cells: Callable[[Profile], list[dict]]
    measure: Callable[..., Path]
    seconds: float


def settings(profile: Profile) -> config.Tables:
    """`real.tables` of the profile; where it is absent, one cell of each table, in the first evaluation
    domain with correct and obviously wrong answers."""
    if profile.real.tables:
        return profile.real.tables
    run, steps = made.Run(profile, 0), profile.narrow.steps
    both = [d.domain for d in profile.real.data if d.correct and d.obvious]
    domains = [d for d in both if not made.discovery(run, d)][:1]  # a profile is refused where there is none
    looks = sorted({0, (steps + 1) // 2, steps})
    return config.Tables(
        domains=domains,
        seeds=(0,),
        fractions=(50,),
        looks=looks,
        guarded=domains,
        guarded_seeds=(0,),
        guards=("inoculation",),
    )


def _final(run, ruler, domain, variant):
    return watched.watched(run, ruler, domain, variant, (run.profile.narrow.steps,))


def _course(run, ruler, domain, variant):
    return watched.watched(run, ruler, domain, variant, settings(run.profile).looks)


def mixture_cells(profile: Profile) -> list[dict]:
    """Every fraction of obviously wrong answers in every domain with every seed."""
    t = settings(profile)
    return [
        {"seed": s, "domain": d, "variant": f"obvious@{f:g}"}
        for s in t.seeds
        for d in t.domains
        for f in t.fractions
    ]


def course_cells(profile: Profile) -> list[dict]:
    """Obviously wrong answers with every seed, harmless data with the first one."""
    t = settings(profile)
    return [
        {"seed": s, "domain": d, "variant": v}
        for s in t.seeds
        for d in t.domains
        for v in ("obvious", *(t.harmless if s == t.seeds[0] else ()))
    ]


def guard_cells(profile: Profile) -> list[dict]:
    """Every guard of the profile at every dose."""
    t = settings(profile)
    return [
        {"seed": s, "domain": d, "guard": g, "dose": x}
        for s in t.guarded_seeds
        for d in t.guarded
        for g in t.guards or guarded.GUARDS
        for x in guarded.GUARDS[g]
    ]


TABLES = {
    t.name: t
    for t in (
        Table("07_mixtures", mixture_cells, _final, 110),
        Table("07_course", course_cells, _course, 700),
        Table("08_guards", guard_cells, guarded.guarded, 160),
    )
}


def folder(table: Table, profile: Profile, cell: dict) -> Path:
    """Where a cell's answers and numbers lie; made if the store lacks them."""
    about = {k: v for k, v in cell.items() if k != "seed"}
    return table.measure(made.Run(profile, cell["seed"]), made.Run(profile, 0), **about)


def make(table: Table, profile: Profile) -> list[Path]:
    """The folder of every cell of the profile; those that the store lacks are made side by side, each kept as
    it is done. Raises parallel.WorkError naming the cell that failed."""
    ruler, cells = made.Run(profile, 0), table.cells(profile)
    (
        readings.sae_folder(ruler, profile.sae.layer),
        search.causal(ruler),
        steering.rivals(ruler),
    )  # once, before
    missing = [c for c in cells if not store.there(lambda: folder(table, profile, c))]
    jobs = {f"{table.name}, {c}": (_by_name, table.name, profile, c) for c in missing}
    if jobs:
        dict(parallel.side_by_side(jobs, profile, f"table {table.name}", total=len(cells)))
    return [folder(table, profile, c) for c in cells]


def _by_name(name: str, profile: Profile, cell: dict) -> None:
    folder(TABLES[name], profile, cell)


def compute(table: Table, profile: Profile) -> pd.DataFrame:
    """The table, graded by the profile's judge: a row per cell and look (`step`) or way of asking (`asked`).

    Columns: the cell's; `score` with `low` and `high` (percent misaligned of the coherent answers to
    questions; the interval is clustered by category of question); `openings`, the same where the answer's
    first words are given; `broken` (percent of all answers broken or absurd); `answers`; the monitors and
    other numbers; `config`, a hash of what the cells depend on.
    """
    cells, places = table.cells(profile), make(table, profile)
    answers = [pd.read_parquet(p / "answers.parquet") for p in places]
    every = pd.concat(answers, keys=range(len(cells)), names=["cell", None]).reset_index("cell")
    every["grade"] = grades.of(made.Run(profile, 0), every)
    by = "step" if "step" in every else "asked"
    rows = []
    for (i, way), g in every.groupby(["cell", by], sort=False):
        numbers = places[i] / "numbers.json"
        if by == "asked":
            read = json.loads(numbers.read_text())
        else:
            looks = pd.read_parquet(places[i] / "monitors.parquet").set_index("step", drop=False)
            read = looks.loc[way].to_dict()
        rows.append(cells[i] | {by: way} | outcome(g) | read)
    return pd.DataFrame(rows).assign(config=configuration(table, profile))


def outcome(graded: pd.DataFrame) -> dict[str, float]:
    """`score`, `low`, `high`, `openings`, `broken` and `answers` (see compute) of graded answers."""
    bad, coherent = graded.grade == "misaligned", graded.grade.isin(grading.COHERENT)
    questions = graded.kind == "question"
    s = stats.proportion(bad[questions], graded.category[questions], coherent[questions]).scaled(100)
    o = stats.proportion(bad[~questions], graded.category[~questions], coherent[~questions]).scaled(100)
    broken = 100 * float((~coherent & (graded.grade != "refusal")).mean())
    about = {"score": s.value, "low": s.low, "high": s.high, "openings": o.value}
    return about | {"broken": broken, "answers": len(graded)}


def configuration(table: Table, profile: Profile) -> str:
    """Hash (16 hex digits) of the profile's numbers, the content and the cells; it stands in every row."""
    numbers = profile.model_dump(include={"narrow", "sae", "evaluation", "steering"})
    apart = {"tables", "dtype", "judge", "course", "firsts", "max_length"}
    apart |= set() if profile.real.questions else {"questions"}
    real = profile.real.model_dump(exclude=apart)
    content = store.files_version(sets.CONTENT / "advice")
    about = {"numbers": numbers, "real": real, "content": content, "cells": table.cells(profile)}
    return store.key_of(about)


def plan(tables: list[Table], profile: Profile) -> str:
    """Cells and time of each table on a CPU's cores."""
    cores, lines = os.cpu_count() or 1, []
    for t in tables:
        n = len(t.cells(profile))
        minutes = n * t.seconds / 60 / cores
        lines.append(
            f"  {t.name:12s} {n:4d} cells x {t.seconds:3.0f} s = {minutes:5.0f} min on {cores} cores"
        )
    where = figures.ROOT / "data"
    return "\n".join([f"profile {profile.name}: {len(tables)} tables, written below {where}", *lines])


def chosen(start: str | None = None, only: str | None = None) -> list[Table]:
    """The tables of these notebooks. Raises ValueError if they have none."""
    found = [
        t
        for t in TABLES.values()
        if (only is None or t.name[:2] == only) and (start is None or t.name[:2] >= start)
    ]
    if not found:
        raise ValueError(f"notebook {only or start} has no table in {FULL}; 07 and 08 have")
    return found


def write(tables: list[Table], profile: Profile) -> None:
    """Compute the tables in order and write figures/data/<profile>/<table>.csv for each; to smollm2-full's
    folder where the numbers are its own, on another device for instance."""
    for t in tables:
        same = configuration(t, profile) == configuration(t, profiles.load(FULL))
        figures.save_table(compute(t, profile), t.name, FULL if same else profile.name)


def committed(name: str) -> pd.DataFrame:
    """The table as committed for profile smollm2-full. Raises TableError if there is none, or none of today's
    configuration."""
    path, table = figures.table(FULL, name), TABLES[name]
    again = f"make it with: python -m personas run --profile {FULL} --only {name[:2]}"
    if not path.exists():
        raise TableError(f"there is no {path.name} for {FULL}; {again}")
    found = pd.read_csv(path)
    if set(found.config) != {configuration(table, profiles.load(FULL))}:
        raise TableError(f"{path.name} was made with another configuration of {FULL}; {again}")
    return found
