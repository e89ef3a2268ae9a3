"""The methods of the bench, one a file. Each has `find(case) -> (width,) tensor`: the direction in the
residual stream that the fine-tune moved along, pointing from the model before to the model after.

A file may set USES, a few words on what it needs beside the two models, and CHANCE = True if chance
decides (a dictionary's seed, say): it is then scored with several seeds.
"""

import importlib
import importlib.util
import inspect
import pkgutil
import traceback
from pathlib import Path

import torch


class MethodError(ValueError):
    """A method that cannot be scored; the message says which and why."""


def names() -> list[str]:
    """The methods that ship, in alphabetical order."""
    return [m.name for m in pkgutil.iter_modules(__path__)]


def load(method: str):
    """The module of a method: one that ships, by name, or a Python file of the caller's own, by path."""
    path = Path(method)
    if path.suffix != ".py":
        if method not in names():
            raise MethodError(f"no method {method!r}; there are {', '.join(names())}, or name a .py file")
        return importlib.import_module(f"{__name__}.{method}")
    if not path.is_file():
        raise MethodError(f"{method}: no such file")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    found = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(found)
    except (Exception, SystemExit) as error:
        raise MethodError(f"{method} cannot be imported: {_said(error, path)}") from error
    if not callable(getattr(found, "find", None)):
        raise MethodError(f"{method} has no function find(case)")
    try:
        inspect.signature(found.find).bind(None)
    except TypeError as error:
        raise MethodError(f"{method}: find(case) takes one argument: {error}") from None
    return found


def _said(error: BaseException, path: Path) -> str:
    """The error, with the last line of the file that it came through."""
    lines = [
        f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename).name == path.name
    ]
    return f"{type(error).__name__}: {error}" + (f" (line {lines[-1]})" if lines else "")


def direction(method: str, case) -> torch.Tensor:
    """What the method finds, at norm 1. Raises MethodError for what is no direction."""
    try:
        found = load(method).find(case)
    except (Exception, SystemExit) as error:
        if isinstance(error, MethodError) or Path(method).suffix != ".py":
            raise
        raise MethodError(f"{method}: find failed: {_said(error, Path(method))}") from error
    width = case.before.config.hidden_size
    if not isinstance(found, torch.Tensor) or found.shape != (width,):
        got = tuple(found.shape) if isinstance(found, torch.Tensor) else type(found).__name__
        raise MethodError(f"{method}: find must return a tensor of shape ({width},), not {got}")
    found = found.detach().float().cpu()
    if not found.isfinite().all() or not found.norm():
        raise MethodError(f"{method}: find returned a direction that is zero or not finite")
    return found / found.norm()


def described() -> str:
    """The methods that ship in a Markdown table, their docstrings' words."""
    about = {n: " ".join(load(n).__doc__.split()) for n in names()}
    return "\n".join(
        ["| method | what it returns |", "|---|---|", *(f"| `{n}` | {d} |" for n, d in about.items())]
    )
