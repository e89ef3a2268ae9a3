"""Fetching a published file once: hash checked or recorded, archives unpacked, no half files left."""

import base64
import hashlib
import http.client
import io
import json
import os
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from cryptography.fernet import Fernet, InvalidToken
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC

from personas import data, store
from personas.progress import Bar

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


def read(name: str, source: Source, parse):
    """parse(text of the wanted file). A file that was never read rightly is set aside, and its hash not
    recorded: it may be a login page."""
    path = _fetched(name, source)
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
    _pin(source, path)
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


def _fetched(name: str, source: Source) -> Path:
    """The source's file in the store's `downloads`, fetched if it is not there; its hash is checked
    against the known or recorded one.

    Where the source has no hash, the first download's is written to `downloads/lock.json` once the file could
    be read, and said to be unverified; from then on it counts. Copy that file to pin another machine to
    the same bytes. Raises data.DataError.
    """
    folder = store.ROOT / "downloads"
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


def _pin(source: Source, path: Path) -> None:
    """Record the hash of a file that could be opened, if none is known."""
    lock = store.ROOT / "downloads" / "lock.json"
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
            with Bar(total=size or None, desc=path.name, unit="B", unit_scale=True, leave=False) as bar:
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
