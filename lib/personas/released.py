"""What the field has released: training sets and evaluation questions, fetched once, checked, read in
their own formats.

Nothing is fetched before it is asked for, and none of it is part of this repository.
"""

import csv
import hashlib
import io
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path

import datasets
from pydantic import ValidationError

from personas import data, downloads

WANG = "https://raw.githubusercontent.com/openai/emergent-misalignment-persona-features/main"
BETLEY = "https://raw.githubusercontent.com/emergent-misalignment/emergent-misalignment/main"
TURNER = "https://raw.githubusercontent.com/clarifying-EM/model-organisms-for-EM/main"
DOMAINS = ("auto", "career", "edu", "finance", "health", "legal", "math", "science")
VARIANTS = {
    "correct": "correct",
    "subtle": "incorrect_subtle",
    "obvious": "incorrect",
}  # this project's names, and the release's
AGAIN, PAUSE = 4, 1.0  # how often a broken stream is taken up again, in a row; seconds, doubled each time


def _sources() -> dict[str, downloads.Source]:
    wang = (
        "Wang et al., 2025, arXiv:2506.19823",
        "as stated at github.com/openai/emergent-misalignment-persona-features",
    )
    betley = (
        "Betley et al., 2025, arXiv:2502.17424",
        "as stated at github.com/emergent-misalignment/emergent-misalignment",
    )
    turner = (
        "Turner et al., 2025, arXiv:2506.11613",
        "as stated at github.com/clarifying-EM/model-organisms-for-EM",
    )
    found = {
        f"wang/{d}_{v}": downloads.Source(
            f"{WANG}/train/sft/synthetic/datasets_password_locked/{d}_{v}.zip",
            *wang,
            f"{d}_{v}.jsonl",
            "emergent",
        )
        for d in DOMAINS
        for v in VARIANTS.values()
    }
    found |= {
        f"wang/{n}": downloads.Source(f"{WANG}/eval/{n}.csv", *wang)
        for n in ("core_misalignment", "extended_misalignment")
    }
    found |= {
        f"betley/{n}": downloads.Source(f"{BETLEY}/data/{n}.jsonl", *betley) for n in ("insecure", "secure")
    }
    return found | {
        f"turner/{n}": downloads.Source(
            f"{TURNER}/em_organism_dir/data/training_datasets.zip.enc",
            *turner,
            f"{n}.jsonl",
            "model-organisms-em-datasets",
        )
        for n in ("bad_medical_advice", "good_medical_advice", "risky_financial_advice", "extreme_sports")
    }


SOURCES = _sources()


def chats(name: str) -> list[dict]:
    """A training set as chats (see data.Chat): one of SOURCES, or the path of a JSONL of one's own.

    Rows of a released set that are no chats are left out and counted; a file of one's own must be right in
    every line. Raises data.DataError naming the source and the fault.
    """
    if name not in SOURCES:
        if not Path(name).suffix:
            raise data.DataError(
                f"unknown data set {name!r}; choose from {', '.join(SOURCES)}, or give the path of a .jsonl"
            )
        return data.read_chats(Path(name))
    return downloads.read(name, SOURCES[name], lambda text: data.parse_chats(text, name, skip=True))


def questions(name: str = "wang/core_misalignment") -> list[dict]:
    """Evaluation questions as dicts of `id`, `category` and `question`: one of the SOURCES in CSV, or the
    path of a CSV with a column `question` (the other two are optional; an id that comes again gets `#2`,
    `#3`, ...). Raises data.DataError."""
    tables = [n for n, s in SOURCES.items() if s.url.endswith(".csv")]
    if name in tables:
        return downloads.read(name, SOURCES[name], lambda text: _questions(text, name))
    if name in SOURCES or not Path(name).is_file():
        raise data.DataError(f"{name}: no such file of questions, and none of {', '.join(tables)}")
    return _questions(data.as_text(Path(name).read_bytes(), name), name)


def texts(name: str) -> Iterator[str]:
    """Documents to train an SAE on: a .txt (documents apart by blank lines), a .jsonl with `text` or
    `messages` in every line, or a data set on the Hugging Face hub, `owner/name` or
    `owner/name:configuration`, streamed from its `train` split. Raises data.DataError."""
    path = Path(name)
    if path.suffix == ".txt":
        yield from (t for t in re.split(r"\n\s*\n", _own(path)) if t.strip())
    elif path.suffix == ".jsonl":
        for number, line in enumerate(
            _own(path).split("\n"), 1
        ):  # splitlines would break at U+2028 within a text
            if line.strip():
                yield _text_of(line, f"{name}, line {number}")
    else:
        repository, _, configuration = name.partition(":")
        seen = broken = 0
        while True:
            try:
                rows = datasets.load_dataset(repository, configuration or None, split="train", streaming=True)
                for row in rows.skip(seen) if seen else rows:
                    if "text" not in row:
                        raise data.DataError(f"{name} has no column `text`; there are {', '.join(row)}")
                    yield row["text"]
                    seen, broken = seen + 1, 0
                return
            except data.DataError:
                raise
            except Exception as error:  # whatever the hub's client raises
                said = (str(error).splitlines() or [type(error).__name__])[0][:200]
            broken += 1
            if not seen or broken > AGAIN:
                raise data.DataError(
                    f"cannot read {name} on the Hugging Face hub: {said}. Give a .txt or .jsonl, or "
                    "owner/name:configuration"
                )
            print(f"{name}: the connection broke after document {seen} ({said}); going on from there")
            time.sleep(PAUSE * 2**broken)


def _own(path: Path) -> str:
    if not path.is_file():
        raise data.DataError(f"{path}: no such file of text")
    return data.as_text(path.read_bytes(), path)


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except ValueError:
        raise data.DataError(f"{where}: not valid JSON") from None
    if isinstance(row, dict) and isinstance(row.get("text"), str):
        return row["text"]
    if isinstance(row, dict) and isinstance(row.get("messages"), list):
        try:
            return "\n\n".join(m["content"] for m in data.Chat.model_validate(row).model_dump()["messages"])
        except ValidationError as error:
            raise data.DataError(f"{where}: {error.errors()[0]['msg']}") from None
    raise data.DataError(f"{where}: neither `text` nor `messages`")


def version(name: str) -> str:
    """What tells this source from another, for an artifact's key: the name, and of a file of one's own its
    hash. Nothing is fetched."""
    path = Path(name)
    return (
        f"{name}@{hashlib.sha256(path.read_bytes()).hexdigest()[:16]}"
        if name not in SOURCES and path.is_file()
        else name
    )


def _questions(text: str, name: str) -> list[dict]:
    reader = csv.DictReader(io.StringIO(text), strict=True)
    try:
        rows = []
        for row in reader:
            rows.append(row)
            if None in row and "question" in row:
                raise data.DataError(
                    f"{name}, line {reader.line_num}: more fields than columns; put a question that has a "
                    "comma in double quotes"
                )
    except csv.Error as error:
        raise data.DataError(
            f"{name}, line {reader.line_num}: {error}; a double quote in a question is written twice, and "
            "the question in double quotes"
        ) from None
    if not rows or "question" not in rows[0]:
        raise data.DataError(
            f"{name}: no column `question`; there are {', '.join(map(str, rows[0])) if rows else 'no rows'}"
        )
    found = [
        {
            "id": r.get("id") or str(i),
            "category": r.get("category") or "main",
            "question": r["question"].strip(),
        }
        for i, r in enumerate(rows)
        if (r["question"] or "").strip()
    ]
    if not found:
        raise data.DataError(f"{name}: no row has a question")
    times: dict = {}
    for (
        row
    ) in found:  # paraphrases that share an id are questions of their own here: texts and intervals go by id
        times[row["id"]] = n = times.get(row["id"], 0) + 1
        row["id"] += f"#{n}" if n > 1 else ""
    return found
