"""Studies: tables whose rows are independent runs (cells), computed side by side on the cores, each kept
in the store.

A killed study goes on where it stopped. Which studies there are is in studies.py; the tables of profile
`tiny-full` are committed under figures/data/tiny-full/.
"""

import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import dataclass

import pandas as pd

from personas import artifacts, config, figures, parallel, store, world
from personas import profile as profiles
from personas.profile import Profile

FULL = "tiny-full"
# seconds of a step of pretraining on two cores with nothing beside it: all times below are for a machine as
# fast
STEP = 0.3


class StudyError(RuntimeError):
    """A table is missing or out of date; the message says which and what to do."""


@dataclass(frozen=True)
class Study:
    """One table. cells: the settings of its rows, of which `pretraining_seed`, `seed` and `world` (if
    given: one of world.WORLDS) choose the models.

    measure(run, ruler, **other settings) gives a cell's row or rows; `ruler` is the run whose SAE and
    latent do the reading: the same base model with fine-tuning seed 0. code: the modules and functions
    that a cell's value depends on, or their hash. prepare(ruler): what many cells need, made before they
    start. seconds: of one cell on one core, in a worker that has had one before. sections: of the
    profile, which its cells depend on beside those that all do (numbers).
    """

    name: str
    cells: Callable[[Profile], list[dict]]
    measure: Callable
    prepare: Callable
    code: tuple | str
    seconds: float
    sections: tuple = ()

    @property
    def notebook(self) -> str:
        """Number of the notebook that shows it; the table's own begins with the chapter of Part I that it
        belongs to."""
        return {"07": "13", "08": "14", "09": "12", "10": "11"}.get(self.name[:2], "10")

    @property
    def version(self) -> str:
        """Hash of the code that a cell's value depends on."""
        return self.code if isinstance(self.code, str) else store.code_version(*self.code)

    def packed(self) -> "Study":
        """A copy for a process that measures a cell: modules cannot be sent there, their hash can."""
        return dataclasses.replace(self, code=self.version, cells=_nothing, prepare=_nothing)


def _nothing(_) -> list:
    return []


def runs_of(profile: Profile, cell: dict) -> tuple[artifacts.Run, artifacts.Run]:
    """(run, ruler) of a cell."""
    drawn = (
        config.World(**world.WORLDS[cell["world"]]) if cell.get("world", "own") != "own" else profile.world
    )
    mine = profile.model_copy(update={"pretraining_seed": cell["pretraining_seed"], "world": drawn})
    return artifacts.Run(mine, cell["seed"]), artifacts.Run(mine, 0)


def numbers(study: Study, profile: Profile) -> dict:
    """What of the profile a cell depends on beside the aligned model."""
    course = profile.study.model_dump(include={"course", "course_looks"})
    return (
        profile.model_dump(
            include={"domains", "narrow", "realignment", "sae", "evaluation", "steering", *study.sections}
        )
        | course
    )


def configuration(study: Study, profile: Profile) -> str:
    """Hash (16 hex digits) of the profile's numbers, the world's sentences and the study's cells: it
    stands in every row of a table."""
    models = profile.model_dump(include={"world_seed", "model", "alignment"})
    cells = [c | {"drawn": world.WORLDS[c["world"]]} if "world" in c else c for c in study.cells(profile)]
    return store.key_of(
        {
            "study": study.name,
            "cells": cells,
            "profile": numbers(study, profile) | models,
            "content": artifacts.CONTENT,
            "prior": world.PRIOR,
        }
    )


def cell_rows(study: Study, profile: Profile, cell: dict) -> list[dict]:
    """One cell's rows, from the store or measured now."""
    run, ruler = runs_of(profile, cell)
    settings = {k: v for k, v in cell.items() if k not in ("pretraining_seed", "seed", "world")}

    def make(out):
        found = study.measure(run, ruler, **settings)
        found = found if isinstance(found, list) else [found]
        if clash := set(cell) & set(found[0]):
            raise ValueError(f"a setting and a measurement are both called {clash.pop()!r}")
        (out / "rows.json").write_text(json.dumps(found))

    folder = run.make(
        f"study-{study.name}",
        "-".join(str(v) for v in settings.values()),
        {
            "cell": cell,
            "numbers": numbers(study, profile),
            "aligned": artifacts.aligned(run).name,
            "measure": study.version,
        },
        (),
        make,
    )
    return [cell | r for r in json.loads((folder / "rows.json").read_text())]


def compute(study: Study, profile: Profile, workers: int | None = None) -> pd.DataFrame:
    """The study's table under this profile; cells that the store lacks are computed side by side, one core
    each.

    Raises parallel.WorkError naming the cell that failed; the others stay in the store.
    """
    cells = study.cells(profile)
    rulers = list(dict.fromkeys(runs_of(profile, c)[1] for c in cells))
    if len(rulers) == 1:
        study.prepare(rulers[0])
    else:
        jobs = {f"base model {i}": (study.prepare, r) for i, r in enumerate(rulers, 1)}
        list(parallel.side_by_side(jobs, profile, f"study {study.name}, base models", workers))
    rows = [_kept(study, profile, c) for c in cells]
    missing = [i for i, r in enumerate(rows) if r is None]
    if missing:
        jobs = {f"cell {cells[i]}": (cell_rows, study.packed(), profile, cells[i]) for i in missing}
        where = dict(zip(jobs, missing))
        for name, found in parallel.side_by_side(jobs, profile, f"study {study.name}", workers, len(cells)):
            rows[where[name]] = found
    return pd.DataFrame([r for cell in rows for r in cell]).assign(config=configuration(study, profile))


class _Missing(Exception):
    pass


def _kept(study: Study, profile: Profile, cell: dict) -> list[dict] | None:
    """The cell's rows if the store has them."""

    def missing(*_, **__):
        raise _Missing

    try:
        return cell_rows(dataclasses.replace(study, measure=missing), profile, cell)
    except _Missing:
        return None


def plan(studies: list[Study], profile: Profile) -> str:
    """Cells and seconds of each study, and of all on this machine's cores, without and with base models
    and their SAEs."""
    cores, lines, total = os.cpu_count() or 1, [], 0.0
    for s in studies:
        n = len(s.cells(profile))
        total += n * s.seconds / cores
        lines.append(
            f"  {s.name:16s} {n:5d} cells x {s.seconds:3.0f} s = {n * s.seconds / 60:5.0f} min on one core"
        )
    models = len({runs_of(profile, c)[1] for s in studies for c in s.cells(profile)})
    return "\n".join(
        [
            f"profile {profile.name}: {len(studies)} studies, {models} base models, tables in "
            f"figures/data/{profile.name}",
            *lines,
            f"  together about {total / 60:.0f} min on {cores} cores, "
            f"{total / 60 + 14 * models / cores:.0f} with the base models if none is in the store",
            f"  (when a step of pretraining takes {STEP} s; a busy machine took twice that)",
        ]
    )


def write(studies: list[Study], profile: Profile) -> None:
    """Compute the studies in order and write figures/data/<profile>/<study>.csv for each."""
    for s in studies:
        figures.save_table(compute(s, profile), s.name, profile.name)


def committed(study: Study) -> pd.DataFrame:
    """The study's table as committed for profile tiny-full. Raises StudyError if there is none, or none of
    today's configuration."""
    path = figures.table(FULL, study.name)
    again = f"make it with: python -m personas run --profile {FULL} --only {study.notebook}"
    if not path.exists():
        raise StudyError(f"there is no {path.name} for {FULL}; {again}")
    table = pd.read_csv(path)
    if set(table.config) != {configuration(study, profiles.load(FULL))}:
        raise StudyError(f"{path.name} was made with another configuration of {FULL}; {again}")
    return table
