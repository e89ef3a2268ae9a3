"""Where notebooks keep what they make: artifacts keyed by everything that determines them.

An artifact is a folder `runs/<profile>/<stage>/<name>-<key>/`. It is written under a temporary name and
renamed when it is complete, so a killed run leaves no half artifact behind; its `manifest.json` holds the
full key and the SHA-256 of each file, which are checked on every read (once a process, unless a file's
time or size changes).
"""

import ast
import contextlib
import errno
import functools
import hashlib
import inspect
import json
import os
import shutil
import socket
import sys
import textwrap
import time
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[2]
# The clone; of an installed wheel, which has no notebooks, the folder that it is used in.
PROJECT = SOURCE if (SOURCE / "notebooks").is_dir() else Path.cwd()


def place(variable: str, default: str) -> Path:
    """The folder that an environment variable names, else this one of the project. `~` is the home folder;
    a relative path starts at the project, so that the command and its notebooks, which run in another
    folder, agree."""
    return PROJECT / Path(os.environ.get(variable, "").strip() or default).expanduser()


ROOT = place("PERSONAS_RUNS", "runs")

NO_ROOM = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENOENT,
    errno.EIO,
}


class StoreError(RuntimeError):
    """The store cannot be written; the message says where and what to do."""


class Missing(LookupError):
    """An artifact that `there` looked for and that has yet to be made."""


_looking = False


def there(call) -> bool:
    """Whether `call()` finds every artifact that it asks for; it makes none."""
    global _looking
    _looking = True
    try:
        call()
        return True
    except Missing:
        return False
    finally:
        _looking = False


@functools.cache
def code_version(*parts) -> str:
    """Hash (12 hex digits) of the code of modules or functions. Comments and docstrings do not count; any
    change to what runs does."""
    digest = hashlib.sha256()
    for part in parts:
        tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node):
                node.body = node.body[1:] or [ast.Pass()]
        digest.update(ast.dump(tree).encode())
    return digest.hexdigest()[:12]


TEXT = {".csv", ".json", ".jsonl", ".md", ".txt", ".yaml"}


def files_version(folder: Path) -> str:
    """Hash of all files below a folder (for content that is data, not code). What a desktop or an editor
    leaves there, whose name begins with a dot, does not count; nor does how lines of text end."""
    digest = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        if not any(part.startswith(".") for part in path.relative_to(folder).parts):
            data = path.read_bytes()
            digest.update(
                path.name.encode() + (data.replace(b"\r\n", b"\n") if path.suffix in TEXT else data)
            )
    return digest.hexdigest()[:12]


def key_of(key: dict) -> str:
    """Hash (16 hex digits) of a key, whatever the order of its entries."""
    return hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]


def artifact(profile: str, stage: str, name: str, key: dict, make) -> Path:
    """The folder of this artifact, made by `make(folder)` unless an intact one with the same key exists.

    What lies there truncated, altered, from another configuration or in a folder's place is put aside and
    rebuilt, with a line that says so. Where two processes make the same artifact, the first to end keeps
    it. Raises StoreError if the store cannot be written.
    """
    digest = key_of(key)
    final = ROOT / profile / stage / f"{name}-{digest}"
    if final.exists() or final.is_symlink():
        fault = _fault(final, digest)
        if fault is None:
            return final
        if _looking:
            raise Missing(final.name)
        aside = final.with_name(
            f"{final.name}.damaged.{time.time_ns()}"
        )  # graded answers may lie in it, that were paid for
        with contextlib.suppress(FileNotFoundError):  # another process has put it aside
            final.rename(aside)
        print(f"store: {stage}/{name}: {fault}; rebuilding (the old one is kept as {aside.name})")
    if _looking:
        raise Missing(final.name)
    scratch = final.with_name(f".{final.name}.{socket.gethostname()}.{os.getpid()}")
    writable()
    start = time.perf_counter()
    try:
        _clear_abandoned(final)
        scratch.mkdir(parents=True)
        make(scratch)
        files = {str(p.relative_to(scratch)): sha256(p) for p in sorted(scratch.rglob("*")) if p.is_file()}
        manifest = {
            "key": key,
            "digest": digest,
            "files": files,
            "seconds": round(time.perf_counter() - start, 1),
        }
        (scratch / "manifest.json").write_text(json.dumps(manifest, indent=1, default=str))
        if _one_of_many():
            _wait_for(final)
        else:
            _keep(scratch, final)
    except OSError as error:
        if error.errno not in NO_ROOM:  # of the network, say
            raise
        raise StoreError(
            f"cannot write {final}: {error.strerror or error}. Free some space or set PERSONAS_RUNS to a "
            "folder that you may write to."
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def _keep(scratch: Path, final: Path) -> None:
    """Give a finished artifact its name, unless another process was first."""
    try:
        scratch.rename(final)
    except OSError:
        if not (final / "manifest.json").is_file():
            raise


def _one_of_many() -> bool:
    """Whether this process makes artifacts together with others (`accelerate launch`), and is not the
    first of them."""
    distributed = sys.modules.get("torch.distributed")
    return bool(
        distributed and distributed.is_available() and distributed.is_initialized() and distributed.get_rank()
    )


def _wait_for(final: Path) -> None:
    """Under `accelerate launch` every process makes the artifact together with the others, and the first
    one keeps it."""
    while not final.exists():
        time.sleep(0.1)


def _clear_abandoned(final: Path) -> None:
    """Remove what killed runs left of this artifact (scratch folders of processes of this machine that no
    longer live, or had this one's number)."""
    for old in final.parent.glob(f".{final.name}.{socket.gethostname()}.*"):
        pid = old.name.rsplit(".", 1)[-1]
        if not (pid.isdigit() and int(pid) != os.getpid() and _lives(int(pid))):
            shutil.rmtree(old, ignore_errors=True)


def _lives(pid: int) -> bool:
    """Whether a process of this machine has that number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _fault(folder: Path, digest: str) -> str | None:
    if folder.is_symlink() or not folder.is_dir():
        return "not a folder"
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
    except (OSError, ValueError, RecursionError):
        return "no readable manifest"
    if not isinstance(manifest, dict) or not isinstance(manifest.get("files"), dict):
        return "no readable manifest"
    if manifest.get("digest") != digest:
        return "made from another configuration"
    for name, sha in manifest["files"].items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if sha256(folder / name) != sha:
            return f"{name} is truncated or altered"
    return None


_SHA: dict = {}


def sha256(path: Path) -> str:
    """SHA-256 of a file, computed again only when its size, its time of change or its inode is another."""
    found = path.stat()
    about = (found.st_size, found.st_mtime_ns, found.st_ino)
    if _SHA.get(path, (None,))[0] != about:
        with open(path, "rb") as file:
            _SHA[path] = (about, hashlib.file_digest(file, "sha256").hexdigest())
    return _SHA[path][1]


def append_lines(path: Path, rows: list[dict]) -> None:
    """Add rows to a JSONL in one write; a line that a killed process left unfinished is ended first."""
    text = "".join(json.dumps(r) + "\n" for r in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+") as out:
        if out.tell():
            out.seek(-1, os.SEEK_END)
            text = text if out.read(1) == b"\n" else "\n" + text
        out.write(text.encode())


def read_lines(path: Path) -> list[dict]:
    """The rows of a JSONL that append_lines wrote, without unfinished ones; none if there is no file."""
    rows = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def writable(folder: Path | None = None, variable: str = "PERSONAS_RUNS", *, need_gb: float = 0.5) -> None:
    """Raise StoreError at once if this folder, by default the store, cannot be written or its disk is nearly
    full (GB). variable: the environment variable that would name another one."""
    folder = folder or ROOT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise StoreError(
            f"cannot write to {folder}: {error.strerror}. Set {variable} to a folder that you may write to."
        ) from error
    free = shutil.disk_usage(folder).free / 1e9
    if free < need_gb:
        raise StoreError(
            f"only {free:.1f} GB free in {folder}, {need_gb} GB needed. Free some space or set {variable}."
        )
