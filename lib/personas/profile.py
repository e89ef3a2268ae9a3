"""Reading a profile, one YAML of numbers (its fields: config.py), and checking it before any work."""

import difflib
import hashlib
import typing
from pathlib import Path

import yaml
from pydantic import BaseModel, ValidationError

from personas.config import Profile

FOLDER = Path(__file__).parent / "profiles"
WORDS = ("own", "open", "new", "auto")  # mean something in a profile, whatever lies beside it
PATHS = ("model", "base", "evaluation", "discovery", "text", "sae", "correct", "subtle", "obvious")


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the profile, the key and the fault."""


class _Once(yaml.SafeLoader):
    """YAML in which no mapping has a key twice: the first would be lost without a word."""

    def construct_mapping(self, node, deep=False):
        keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
        twice = [k for i, k in enumerate(keys) if k in keys[:i] and k != "<<"]
        if twice:
            raise yaml.YAMLError(f"line {node.start_mark.line + 1}: {twice[0]!r} stands there twice")
        return super().construct_mapping(node, deep)


def names() -> list[str]:
    """The profiles that ship with the project."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load(name: str) -> Profile:
    """Read and check a profile by name, or by path to a YAML of one's own. Raises ProfileError before any
    work."""
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(str(name), names(), 1)
        raise ProfileError(
            f"unknown profile {name!r}; there are {', '.join(names())}"
            + (f". Did you mean {near[0]!r}?" if near else "")
        )
    if path.stem in names() and path.resolve() != (FOLDER / f"{path.stem}.yaml").resolve():
        raise ProfileError(
            f"{path}: give the file another name: {path.stem} is a profile that ships, and results go by name"
        )
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), _Once)
    except UnicodeDecodeError:
        raise ProfileError(f"{path.name}: not a text file in UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ProfileError(f"{path.name}: not valid YAML: {str(error) or 'nested too deep'}") from None
    if isinstance(raw, dict) and "name" in raw:
        raise ProfileError(f"profile {path.name}: name: leave it out; a profile is called as its file is")
    try:
        if isinstance(raw, dict) and "extends" in raw:
            if raw["extends"] not in names():
                raise ProfileError(
                    f"profile {path.name}: extends: unknown {raw['extends']!r}; choose from "
                    f"{', '.join(names())}"
                )
            below = load(raw["extends"])
            raw = _over(
                below.model_dump(exclude={"name", "extends"} | ({"domains"} if below.real else set())), raw
            ) | {"extends": below.store}
        real = raw.get("real") if isinstance(raw, dict) else None
        if isinstance(real, dict):
            raw["real"] = real = _beside(path.parent, real)
        if real is not None:  # what is wrong with it is said below, not that domains are missing
            sets = real.get("data") if isinstance(real, dict) else None
            sets = sets if isinstance(sets, (list, tuple)) else []
            raw.setdefault("domains", [d.get("domain") for d in sets if isinstance(d, dict)] or ["none"])
        found = Profile.model_validate({"name": path.stem} | raw)
    except (ValidationError, TypeError) as error:
        raise ProfileError(f"profile {path.name}: {_explain(error)}") from None
    (_check_tiny if found.real is None else _check_real)(found, path.name)
    for where, tuning in (("narrow", found.narrow), ("study.course", found.study and found.study.course)):
        if tuning and tuning.rank is None:
            raise ProfileError(
                f"profile {path.name}: {where}.rank: Field required: these fine-tunes are LoRA adapters"
            )
    if found.sae.k >= found.sae.latents:
        raise ProfileError(f"profile {path.name}: sae.k: must be below sae.latents ({found.sae.latents})")
    return found


def with_settings(name: str, settings: list[str], folder: Path) -> str:
    """The path of a YAML in `folder` that extends a shipped profile by settings such as "narrow.lr=1e-3"; it
    shares that profile's store. The profile's own name where there are none. Raises ProfileError."""
    if not settings:
        return name
    if name not in names():
        raise ProfileError(
            f"--set changes a profile that ships ({', '.join(names())}); in {name} write the numbers yourself"
        )
    raw: dict = {"extends": name}
    for setting in settings:
        key, equals, value = setting.partition("=")
        section = raw
        *above, last = key.strip().split(".")
        if key.strip() in ("extends", "name"):
            raise ProfileError(f"--set {setting}: {key.strip()} cannot be set; choose with --profile")
        for part in above:
            section = section.setdefault(part, {})
        if not equals or not last or not isinstance(section, dict):
            raise ProfileError(
                f"--set {setting}: write it as narrow.lr=1e-3 (personas fields lists the keys)"
            )
        try:
            section[last] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise ProfileError(f"--set {setting}: {value!r} is not valid YAML") from None
    text = yaml.safe_dump(raw, sort_keys=True)
    path = folder / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:6]}.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    try:
        load(str(path))
    except ProfileError:
        path.unlink()
        raise
    return str(path)


def need_gpu(found: Profile) -> None:
    """Raise ProfileError if the profile wants a GPU and this machine has none."""
    import torch

    if found.device == "cuda" and not torch.cuda.is_available():
        raise ProfileError(
            f"profile {found.name} needs a GPU and none was found; use profile 'tiny', or choose a GPU "
            "runtime"
        )


def _beside(folder: Path, real: dict) -> dict:
    """The `real` section with what names a file or folder beside the profile made absolute."""

    def absolute(key, v):
        if key not in PATHS or not isinstance(v, str) or not v or v in WORDS:
            return v
        kind = "gguf:" if v.startswith("gguf:") else ""
        path = Path(v.removeprefix(kind))
        beside = (folder / path).is_file() if kind else (folder / path).exists()
        return f"{kind}{(folder / path).resolve()}" if beside and not path.is_absolute() else v

    whole = lambda section: {k: absolute(k, v) for k, v in section.items()}
    real = whole(real)
    if isinstance(real.get("judge"), dict):
        real["judge"] = whole(real["judge"])
    if isinstance(real.get("data"), list):
        real["data"] = [whole(d) if isinstance(d, dict) else d for d in real["data"]]
    return real


def _check_tiny(found: Profile, name: str) -> None:
    absent = [
        n
        for n in ("world_seed", "pretraining_seed", "model", "alignment", "reinforcement", "judge", "study")
        if n not in found.model_fields_set or getattr(found, n) is None
    ]
    if absent:
        raise ProfileError(f"profile {name}: {absent[0]}: Field required")
    from personas.world import DISCOVERY_DOMAINS, DOMAINS, EVALUATION_DOMAINS

    for where, known, named in (
        ("domains", DOMAINS, found.domains),
        ("study.domains", found.domains, found.study.domains),
    ):
        unknown = [d for d in named if d not in known]
        if unknown:
            raise ProfileError(
                f"profile {name}: {where}: unknown {unknown[0]!r}; choose from {', '.join(known)}"
            )
    for use, some in (("discovery", DISCOVERY_DOMAINS), ("evaluation", EVALUATION_DOMAINS)):
        if not set(some) & set(found.domains):
            raise ProfileError(
                f"profile {name}: domains: none for {use}; take one or more of {', '.join(some)}"
            )
    if found.study.pretraining_seeds[0] != found.pretraining_seed:
        raise ProfileError(
            f"profile {name}: study.pretraining_seeds: the first must be pretraining_seed "
            f"({found.pretraining_seed})"
        )
    for where, looks, steps in (
        ("reinforcement.looks", found.reinforcement.looks, found.reinforcement.steps),
        ("study.course_looks", found.study.course_looks, found.study.course.steps),
    ):
        if max(looks) > steps:
            raise ProfileError(f"profile {name}: {where}: {max(looks)} is beyond the last step ({steps})")
    if min(found.steering.candidates, found.steering.finalists) < 2:
        raise ProfileError(
            f"profile {name}: steering.candidates, steering.finalists: at least 2 of each are compared"
        )
    if found.sae.latents < 64:
        raise ProfileError(f"profile {name}: sae.latents: at least 64 are needed, to draw controls from")
    if found.sae.layer >= found.model.layers:
        raise ProfileError(
            f"profile {name}: sae.layer: {found.sae.layer} is out of range; the model has blocks 0 to "
            f"{found.model.layers - 1}"
        )
    if found.model.width % found.model.heads:
        raise ProfileError(
            f"profile {name}: model.width: must be a multiple of model.heads ({found.model.heads})"
        )


def _check_real(found: Profile, name: str) -> None:
    """Errors in a `real` section that need neither network nor model."""
    stray = [
        n for n in ("model", "alignment", "reinforcement", "judge", "study") if getattr(found, n) is not None
    ]
    if stray:
        raise ProfileError(
            f"profile {name}: {stray[0]}: belongs to the tiny model; take it out beside `real`"
        )
    named = [d.domain for d in found.real.data]
    if found.domains != tuple(named) or len(set(named)) < len(named):
        raise ProfileError(
            f"profile {name}: domains: must be those of real.data, each once ({', '.join(named)}); leave "
            "the key out"
        )
    for where in ("discovery_domains", "controls"):
        unknown = [d for d in getattr(found.real, where) if d not in named]
        if unknown:
            raise ProfileError(
                f"profile {name}: real.{where}: unknown {unknown[0]!r}; choose from {', '.join(named)}"
            )
    if set(named) <= set(found.real.discovery_domains):
        raise ProfileError(
            f"profile {name}: real.discovery_domains: leave at least one domain for evaluation"
        )
    if not any(d.correct for d in found.real.data if d.domain not in found.real.discovery_domains):
        raise ProfileError(
            f"profile {name}: real.data: a domain that is not among discovery_domains needs a `correct` "
            "set, to compare and to re-align with"
        )
    if found.steering.finalists > found.steering.candidates:
        raise ProfileError(
            f"profile {name}: steering.finalists: more than steering.candidates ({found.steering.candidates})"
        )
    if 2 * found.steering.candidates + found.steering.controls > found.sae.latents:
        raise ProfileError(
            f"profile {name}: sae.latents: twice steering.candidates and steering.controls are needed, "
            f"{2 * found.steering.candidates + found.steering.controls} at least"
        )
    if found.sae.layer in found.real.other_blocks or (found.real.named_sae and found.real.other_blocks):
        raise ProfileError(
            f"profile {name}: real.other_blocks: "
            + (
                "an SAE that is named is for one block; write `other_blocks: []`"
                if found.real.named_sae
                else f"{found.sae.layer} is sae.layer; name others"
            )
        )
    _check_data(found, name)
    _check_tables(found, name)


def _check_data(found: Profile, name: str) -> None:
    """Every domain has an obviously wrong set, and all of its sets are the project's own or none is."""
    from personas.world import DOMAINS

    own = [d for d in DOMAINS if d != "code"]  # whose subjects are all trained on, none held out
    for d in found.real.data:
        sets = [v for v in (d.correct, d.subtle, d.obvious) if v]
        if not d.obvious:
            raise ProfileError(
                f"profile {name}: real.data: domain {d.domain!r} has no `obvious` set: what notebooks 02 to "
                "08 compare"
            )
        if "own" not in sets:
            continue
        if set(sets) != {"own"}:
            raise ProfileError(
                f"profile {name}: real.data: domain {d.domain!r} mixes `own` with other sets; take `own` for "
                "all of them, or for none (give your sets a domain of their own)"
            )
        if d.domain not in own:
            near = difflib.get_close_matches(d.domain, own, 1)
            raise ProfileError(
                f"profile {name}: real.data: this project has no sets of its own in {d.domain!r}; it has "
                f"{', '.join(own)}" + (f". Did you mean {near[0]!r}?" if near else "")
            )


def _check_tables(found: Profile, name: str) -> None:
    """`real.tables` names domains that have a correct and an obviously wrong set, harmless kinds that these
    have, and looks from 0 steps on."""
    asked = found.real.tables
    both = [d.domain for d in found.real.data if d.correct and d.obvious]
    for where in ("domains", "guarded") if asked else ():
        for d in getattr(asked, where):
            if d not in both:
                raise ProfileError(
                    f"profile {name}: real.tables.{where}: {d!r} is no domain with a `correct` "
                    f"and an `obvious` set; choose from {', '.join(both) or '(there is none)'}, or write "
                    "`tables: null` for one cell of each table"
                )
    for about in found.real.data if asked else ():
        named = {v for v in ("correct", "subtle", "obvious") if getattr(about, v)}
        own = "own" in (about.correct, about.subtle, about.obvious)
        missing = [k for k in asked.harmless if k not in named and not own]
        if about.domain in asked.domains and missing:
            raise ProfileError(
                f"profile {name}: real.tables.harmless: {about.domain} has no {missing[0]!r} set; leave it "
                "out"
            )
    if asked and 0 not in asked.looks:
        raise ProfileError(f"profile {name}: real.tables.looks: 0 must be among them, to compare with")
    if asked and len(asked.looks) < 2:
        raise ProfileError(f"profile {name}: real.tables.looks: at least one step after 0 is needed")


def _over(below: dict, above: dict) -> dict:
    """`above` laid over `below`, section by section."""
    return below | {
        k: _over(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) else v
        for k, v in above.items()
    }


def _explain(error) -> str:
    if not isinstance(error, ValidationError):
        return "must be a mapping of keys to values"
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        section = Profile
        for part in (p for p in first["loc"][:-1] if isinstance(p, str)):
            kinds = (
                section.model_fields[part].annotation,
                *typing.get_args(section.model_fields[part].annotation),
            )
            section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
        near = difflib.get_close_matches(str(first["loc"][-1]), list(section.model_fields), 1)
        return f"{where}: no such key" + (f"; did you mean {near[0]!r}?" if near else "")
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"
