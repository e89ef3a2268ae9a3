"""Executing the notebooks in order with papermill, and printing the table of claims."""

import importlib
import json
import os
import pkgutil
import platform
import re
import time
from pathlib import Path

import pandas as pd
import papermill
from jupyter_client.kernelspec import NoSuchKernel
from nbclient.exceptions import DeadKernelError

import personas
from personas import artifacts, claims, figures, progress, store, world
from personas import profile as profiles
from personas.chapters import common
from personas.pretrained import sets, tables
from personas.profile import Profile

NOTEBOOKS = store.PROJECT / "notebooks"
# What a first run of each notebook should take on two CPU cores on a good day, in seconds, when every earlier
# one has run: Part I on profile smollm2, Part II on profile tiny (there estimated from a bad day's).
EXPECTED = {
    "01": 40,
    "02": 1260,
    "03": 1075,
    "04": 65,
    "05": 565,
    "06": 490,
    "07": 295,
    "08": 305,
    "09": 45,
    "10": 535,
    "11": 15,
    "12": 70,
    "13": 120,
    "14": 80,
    "15": 180,
}
READ_BY_PART_ONE = (
    "activations",
    "chapters",
    "claims",
    "data",
    "diffing",
    "finetune",
    "generate",
    "guards",
    "kv_cache",
    "model",
    "pretrained",
    "sae",
    "sae_files",
    "stats",
    "world",
)
PART_ONE = (
    "01",
    "02",
    "03",
    "04",
    "05",
    "06",
    "07",
    "08",
)  # on a pretrained model; the others are on the world whose truth is known


class RunError(RuntimeError):
    """A notebook failed; the message names it, the error and where its copy lies."""


def checked(source: str, seed: int) -> Profile:
    """The profile, with all that it names checked before any work. Raises the error of whatever does not
    serve."""
    found = profiles.load(source)
    opened = common.open_run if found.real else artifacts.open_run
    return opened(source, seed).profile


def chosen(start: str | None = None, only: str | None = None, profile: Profile | None = None) -> list[Path]:
    """The notebooks to run, in order: Part I's with a pretrained model, else Part II's. Raises ValueError
    for a number that does not serve."""
    every = sorted(NOTEBOOKS.glob("[0-9][0-9]_*.ipynb"))
    if not every:
        raise ValueError(f"there are no notebooks in {NOTEBOOKS}; run this from a clone of the repository")
    first = bool(profile and profile.real)
    books = [b for b in every if (b.name[:2] in PART_ONE) == first]
    numbers = [b.name[:2] for b in books]
    for wanted in (start, only):
        if wanted is not None and wanted not in [b.name[:2] for b in every]:
            raise ValueError(f"no notebook {wanted!r}; there are {', '.join(b.name[:2] for b in every)}")
        if wanted is not None and wanted not in numbers:
            where = (
                "a pretrained model (profile smollm2)"
                if wanted in PART_ONE
                else "the world whose truth is known (profile tiny)"
            )
            raise ValueError(
                f"notebook {wanted} is about {where}; "
                f"{f'profile {profile.name}' if profile else 'Part II'} has {', '.join(numbers)}"
            )
    found = [
        b for b in books if (only is None or b.name[:2] == only) and (start is None or b.name[:2] >= start)
    ]
    if not found:
        raise ValueError(f"nothing to run from notebook {start} with only {only}")
    return found


def plan(profile: Profile, books: list[Path]) -> str:
    """What would run and about how long: the last run's times in this store, else the expected ones."""
    times = last_times(profile.name)
    lines = [f"profile {profile.name}: {len(books)} notebooks, results in {store.ROOT / profile.name}"]
    total = 0.0
    for book in books:
        number = book.name[:2]
        seconds, source = (
            (times[number], "last run here")
            if number in times
            else (EXPECTED.get(number, float("nan")), "first run, two cores")
        )
        if profile.name not in ("tiny", "smollm2") and number not in times:
            seconds, source = float("nan"), "not run yet"
        total += seconds
        lines.append(f"  {book.name:32s} {seconds:6.0f} s  ({source})")
    return "\n".join(lines + [f"  {'together':32s} {total:6.0f} s"])


def last_times(profile: str) -> dict:
    """Notebook number -> seconds that its last run in this store took."""
    path = store.ROOT / profile / "times.json"
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):  # none yet, or cut short: only the plan reads it
        return {}


def run(profile: Profile, books: list[Path], source: str, seed: int = 0, save_in_place: bool = False) -> None:
    """Execute notebooks with the profile that was loaded from `source` (a name or a path); executed copies
    go to runs/<profile>/notebooks/, or back in place with `save_in_place`.

    Raises RunError at the first notebook that fails. What was made stays in the store: run again to go on
    from there.
    """
    store.writable(need_gb=1.0)
    store.writable(figures.ROOT, "PERSONAS_FIGURES")
    done = store.ROOT / profile.name / "notebooks"
    done.mkdir(parents=True, exist_ok=True)
    for book in (bar := progress.Bar(books, desc=f"profile {profile.name}", unit="notebook")):
        bar.set_postfix_str(book.stem)
        start = time.perf_counter()
        out = done / book.name
        try:
            papermill.execute_notebook(
                str(book),
                str(out),
                parameters={"profile": source, "seed": seed},
                cwd=str(NOTEBOOKS),
                progress_bar=False,
                kernel_name="python3",
                extra_arguments=["--IPKernelApp.log_level=40"],
            )  # no warning about TCP
        except papermill.PapermillExecutionError as error:
            raise RunError(
                f"{book.name} failed: {error.ename}: {error.evalue}\nIts copy, up to the error: {out}"
            ) from None
        except DeadKernelError:
            raise RunError(
                f"{book.name}: its kernel died, most often for want of memory; what was made is kept. Close "
                "other programs and run again: it goes on from there"
            ) from None
        except NoSuchKernel:
            raise RunError(
                "Jupyter has no kernel called python3: make one with "
                "`python -m ipykernel install --sys-prefix --name python3`"
            ) from None
        except OSError as error:
            if error.errno not in store.NO_ROOM:
                raise
            raise RunError(
                f"{book.name}: cannot write {out.parent}: {error.strerror}. Free some space and run again: "
                "it goes on from there"
            ) from None
        if save_in_place:
            book.write_text(out.read_text())
            clean(book)
            if book.name[:2] in PART_ONE:
                sign(book, profile)
            keep_claims(profile.name)
        times = last_times(profile.name) | {book.name[:2]: round(time.perf_counter() - start, 1)}
        scratch = store.ROOT / profile.name / f"times.{os.getpid()}"
        scratch.write_text(json.dumps(times))
        scratch.rename(scratch.with_name("times.json"))
    keep_claims(profile.name)
    if profile.name == "tiny" and any(book.name.startswith("15") for book in books):
        keep_claims("bench")  # notebook 15 has a profile, and a table, of its own


def keep_claims(profile: str) -> None:
    """Write what notebooks recorded in this store to figures/data/<profile>/claims.csv, unless that table
    has notebooks that the store lacks: one notebook's claims do not replace all notebooks'."""
    rows = [
        {k: v for k, v in r.items() if k != "target"}
        | {"op": r["target"]["op"], "target": r["target"]["value"]}
        for r in claims.read(profile)
    ]
    kept = figures.ROOT / "data" / profile / "claims.csv"
    if rows and (
        not kept.exists() or set(pd.read_csv(kept, dtype=str).notebook) <= {r["notebook"] for r in rows}
    ):
        figures.save_table(pd.DataFrame(rows), "claims", profile)


def clean(path: Path) -> None:
    """Drop what differs between two runs of the same notebook: timings, counts of execution by papermill,
    machine paths, addresses in memory, progress bars and their state, the random names that pandas gives to
    styled tables, where printed text was cut in two."""
    book = json.loads(path.read_text())
    for name in ("papermill", "widgets"):
        book["metadata"].pop(name, None)
    book["cells"] = [c for c in book["cells"] if "injected-parameters" not in c["metadata"].get("tags", [])]
    for cell in book["cells"]:
        for name in ("papermill", "execution"):
            cell["metadata"].pop(name, None)
        if cell["cell_type"] == "code":
            bar = "application/vnd.jupyter.widget-view+json"
            cell["outputs"] = _joined(
                [o for o in cell["outputs"] if o.get("name") != "stderr" and bar not in o.get("data", {})]
            )
    text = json.dumps(book, indent=1, ensure_ascii=False)
    text = re.sub(r"(<[\w.]+) (?:object )?at 0x[0-9a-f]+>", r"\1>", text)
    for i, name in enumerate(dict.fromkeys(re.findall(r"\bT_[0-9a-f]{5}(?=_|\b)", text))):
        text = text.replace(name, f"T_table{i}")
    path.write_text(text + "\n")


def _joined(outputs: list[dict]) -> list[dict]:
    """The same, with printed text in one piece where it came in several."""
    found: list[dict] = []
    for o in outputs:
        if found and o["output_type"] == found[-1]["output_type"] == "stream":
            both = "".join(found[-1]["text"]) + "".join(o["text"])
            found[-1] = o | {"text": both.splitlines(keepends=True)}
        else:
            found.append(o)
    return found


def made_by(book: Path, profile: Profile) -> str:
    """Hash of what determines a notebook's outputs: its code cells, the profile, the library's code
    (comments and docstrings aside) and its content, the readings among it, and the kept tables."""
    cells = [
        "".join(c["source"])
        for c in json.loads(book.read_text(encoding="utf-8"))["cells"]
        if c["cell_type"] == "code"
    ]
    library = [
        m
        for m in sorted(pkgutil.walk_packages(personas.__path__, "personas."), key=lambda m: m.name)
        if m.name.split(".")[1] in READ_BY_PART_ONE and not m.ispkg
    ]
    code = store.code_version(*(importlib.import_module(m.name) for m in library))
    about = {"cells": cells, "profile": profile.model_dump(), "code": code}
    about["content"] = [store.files_version(folder) for folder in (sets.CONTENT, world.CONTENT)]
    if book.name[:2] in ("03", "05", "07", "08"):  # they show the kept tables
        about["tables"] = store.files_version(NOTEBOOKS.parent / "figures" / "data" / tables.FULL)
    return store.key_of(about)


def python() -> str:
    """This Python's version, "3.11" for instance."""
    return platform.python_version().rpartition(".")[0]


def sign(book: Path, profile: Profile) -> None:
    """Write `made_by` into a notebook's metadata, so that a test can tell when its outputs are stale, and
    the Python that it is true for: another one's syntax trees hash differently."""
    found = json.loads(book.read_text(encoding="utf-8"))
    found["metadata"]["personas"] = {
        "profile": profile.name,
        "made_by": made_by(book, profile),
        "python": python(),
    }
    book.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def print_claims(profile: str) -> None:
    """The table of claims of the last run, as plain text."""
    rows = [r for r in claims.read(profile) if "tables" not in r]
    others = len(claims.read(profile)) - len(rows)
    if rows:
        print(claims.table(rows).to_string(index=False))
        counts = {h: sum(r["holds"] == h for r in rows) for h in ("yes", "unclear", "no")}
        print(f"\n{len(rows)} claims: " + ", ".join(f"{n} {h}" for h, n in counts.items()))
    if not rows and not others:
        print(f"no claims of profile {profile} yet: python -m personas run --profile {profile}")
    if others:
        print(
            f"{others} more rest on kept tables (of tiny-full and bench), which this run did not make; the "
            "notebooks show them, and figures/data/tiny/claims.csv has those of tiny-full"
        )
