"""What the field has released: training sets and evaluation questions, fetched once, checked, read in
their own formats.

Nothing is fetched before it is asked for, and none of it is part of this repository.
"""

import base64
import csv
import hashlib
import http.client
import io
import json
import os
import re
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets
from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from pydantic import ValidationError
from tqdm import tqdm

from personas import data, store

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
LARGEST = 500_000_000  # bytes: of a download, and of what is unpacked from one


@dataclass(frozen=True)
class Source:
    """One released file. member: the file wanted from an archive; password: of the archive, as its authors
    publish it (it keeps the data out of scrapes, not from readers); sha256: of the file at `url`, if it
    was computed from the real bytes."""

    url: str
    paper: str
    licence: str
    member: str = ""
    password: str = ""
    sha256: str = ""


def _sources() -> dict[str, Source]:
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
        f"wang/{d}_{v}": Source(
            f"{WANG}/train/sft/synthetic/datasets_password_locked/{d}_{v}.zip",
            *wang,
            f"{d}_{v}.jsonl",
            "emergent",
        )
        for d in DOMAINS
        for v in VARIANTS.values()
    }
    found |= {
        f"wang/{n}": Source(f"{WANG}/eval/{n}.csv", *wang)
        for n in ("core_misalignment", "extended_misalignment")
    }
    found |= {f"betley/{n}": Source(f"{BETLEY}/data/{n}.jsonl", *betley) for n in ("insecure", "secure")}
    return found | {
        f"turner/{n}": Source(
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
    return _read(name, lambda text: data.parse_chats(text, name, skip=True))


def questions(name: str = "wang/core_misalignment") -> list[dict]:
    """Evaluation questions as dicts of `id`, `category` and `question`: one of the SOURCES in CSV, or the
    path of a CSV with a column `question` (the other two are optional; an id that comes again gets `#2`,
    `#3`, ...). Raises data.DataError."""
    tables = [n for n, s in SOURCES.items() if s.url.endswith(".csv")]
    if name in tables:
        return _read(name, lambda text: _questions(text, name))
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
    rows = list(csv.DictReader(io.StringIO(text)))
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


def _read(name: str, parse):
    """parse(text of the wanted file). A file that was never read rightly is set aside, and its hash not
    recorded: it may be a login page."""
    source, path = SOURCES[name], _fetched(name)
    try:
        found = parse(
            data.as_text(_unpacked(source, path.read_bytes()), f"{name}: {source.member or path.name}")
        )
    except (
        data.DataError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        RuntimeError,
        NotImplementedError,
        InvalidToken,
    ) as error:
        fault = (
            str(error)
            if isinstance(error, data.DataError)
            else f"{name}: cannot open {path.name}: {str(error) or 'wrong password or damaged file'}"
        )
        if source.sha256 or source.url in _locked():
            raise data.DataError(fault) from None
        path.replace(path.with_name(f"{path.name}.rejected"))
        raise data.DataError(
            f"{fault}. The file is set aside as {path.name}.rejected; run again to fetch it anew"
        ) from None
    _pin(name, path)
    return found


def _unpacked(source: Source, raw: bytes) -> bytes:
    if source.url.endswith(".enc"):
        raw = _decrypt(raw, source.password)
    if not source.member:
        return raw
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        inside = next((i for i in archive.infolist() if Path(i.filename).name == source.member), None)
        if inside is None:
            raise data.DataError(
                f"no {source.member} in {source.url.rsplit('/', 1)[-1]}; there are "
                f"{', '.join(archive.namelist()[:8])}"
            )
        with archive.open(
            inside, pwd=source.password.encode()
        ) as file:  # not read(): what an archive says of its size need not be so
            found = file.read(LARGEST + 1)
    if len(found) > LARGEST:
        raise data.DataError(f"{source.member} unpacks to more than {LARGEST / 1e9:.1f} GB")
    return found


def _decrypt(raw: bytes, password: str) -> bytes:
    """Undo easy-dataset-share: 16 bytes of salt, then Fernet under a key from PBKDF2-HMAC-SHA256 with
    100,000 rounds."""
    key = PBKDF2HMAC(hashes.SHA256(), 32, raw[:16], 100_000).derive(password.encode())
    return Fernet(base64.urlsafe_b64encode(key)).decrypt(raw[16:])


def _fetched(name: str) -> Path:
    """The source's file in the store's `downloads`, fetched if it is not there; its hash is checked
    against the known or recorded one.

    Where SOURCES has no hash, the first download's is written to `downloads/lock.json` once the file could
    be read, and said to be unverified; from then on it counts. Copy that file to pin another machine to
    the same bytes. Raises data.DataError.
    """
    source, folder = SOURCES[name], store.ROOT / "downloads"
    path = folder / f"{hashlib.sha256(source.url.encode()).hexdigest()[:8]}-{source.url.rsplit('/', 1)[-1]}"
    expected, fresh = source.sha256 or _locked().get(source.url, ""), not path.exists()
    if path.is_dir():
        raise data.DataError(f"{path} is a folder, where the file of {name} should lie; remove it")
    if fresh:
        store.writable()
        folder.mkdir(parents=True, exist_ok=True)
        _download(source.url, path)
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if expected and found != expected:
        path.replace(path.with_name(f"{path.name}.rejected"))
        raise data.DataError(
            f"{name}: {source.url} has SHA-256 {found}, expected {expected}. "
            + (
                "The file was changed on this machine; run again to fetch it anew."
                if not fresh
                else "It was changed where it is published."
                + (
                    ""
                    if source.sha256
                    else f" If that is meant to be, take its entry out of {folder / 'lock.json'}."
                )
            )
        )
    if fresh:
        print(
            f"{name}: {source.paper}; licence {source.licence}\n  {source.url}\n  SHA-256 {found}"
            + ("" if expected else " (unverified: recorded now, checked from now on)")
        )
    return path


def _locked() -> dict[str, str]:
    lock = store.ROOT / "downloads" / "lock.json"
    try:
        known = json.loads(lock.read_text()) if lock.exists() else {}
    except (ValueError, OSError, RecursionError) as error:
        raise data.DataError(
            f"{lock} is not valid JSON ({error}); mend it, or remove it to record hashes anew"
        ) from None
    if not isinstance(known, dict):
        raise data.DataError(f"{lock} is no list of addresses with their hashes; remove it to record anew")
    return known


def _pin(name: str, path: Path) -> None:
    """Record the hash of a file that could be opened, if none is known."""
    source, lock = SOURCES[name], store.ROOT / "downloads" / "lock.json"
    if not source.sha256 and source.url not in (known := _locked()):
        scratch = lock.with_name(f"{lock.name}.{os.getpid()}")
        scratch.write_text(
            json.dumps(
                known | {source.url: hashlib.sha256(path.read_bytes()).hexdigest()}, indent=1, sort_keys=True
            )
            + "\n"
        )
        scratch.replace(lock)


def _download(url: str, path: Path) -> None:
    """Fetch under another name, then rename: a broken connection leaves no half file."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with urllib.request.urlopen(url, timeout=30) as answer, open(scratch, "wb") as out:
            size, got = int(answer.headers.get("Content-Length") or 0), 0
            with tqdm(total=size or None, desc=path.name, unit="B", unit_scale=True, leave=False) as bar:
                while piece := answer.read(1 << 16):
                    got += len(piece)
                    if max(got, size) > LARGEST:
                        raise data.DataError(
                            f"{url} is larger than {LARGEST / 1e9:.1f} GB, more than any source here "
                            "should be"
                        )
                    out.write(piece)
                    bar.update(len(piece))
        if size and got != size:
            raise data.DataError(f"{url}: the connection broke after {got} of {size} bytes; run again")
        scratch.replace(path)
    except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
        raise data.DataError(
            f"cannot fetch {url}: {getattr(error, 'reason', None) or error}. Check the network, or put the "
            f"file at {path}"
        ) from None
    finally:
        scratch.unlink(missing_ok=True)
