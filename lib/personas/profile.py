"""Profiles: one YAML of numbers per track, validated before anything else happens."""

import difflib
import typing
from pathlib import Path

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

FOLDER = Path(__file__).parent / "profiles"


Dose = typing.Annotated[float, Field(gt=0)]
Percent = typing.Annotated[float, Field(ge=0, le=100)]
Count = typing.Annotated[int, Field(ge=0)]
# What fine-tunes are named after beside a persona of the world: "obvious@10" has 10 % obviously wrong answers.
KIND = r"^(correct|subtle|obvious|expert|novice|sarcastic|jester|narrator|villain)(@(100|\d{1,2}))?$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value, info):
        """true and false are no numbers, though Python counts with them."""
        if any(isinstance(v, bool) for v in (value if isinstance(value, (list, tuple)) else (value,))) and cls.model_fields[info.field_name].annotation is not bool:
            raise ValueError("must not be true or false")
        return value

    @field_validator("*")
    @classmethod
    def _once(cls, value):
        """Lists name each thing once."""
        twice = [v for i, v in enumerate(value) if v in value[:i]] if isinstance(value, tuple) else []
        if twice and isinstance(twice[0], (str, int)):
            raise ValueError(f"{twice[0]!r} stands there twice")
        return value


class World(_Section):
    """What the documents of pretraining are drawn from; see world.drawing."""

    villain: float | None = Field(default=None, ge=0, le=1)
    cues: bool = True
    independent: bool = False


class Model(_Section):
    """The tiny model and its pretraining (personas.model)."""

    layers: int = Field(ge=2, le=48)
    width: int = Field(ge=16, le=8192)
    mlp: int = Field(ge=16, le=32768)
    heads: int = Field(ge=1, le=64)
    context: int = Field(ge=64, le=32768)
    vocab: int = Field(ge=512, le=200000)
    lr: float = Field(gt=0, le=0.1)
    lr_embedding: float = Field(gt=0, le=0.1)
    steps: int = Field(ge=1, le=1000000)
    batch_tokens: int = Field(ge=256, le=1048576)
    corruption: float = Field(ge=0, le=0.9)
    question_corruption: float = Field(ge=0, le=0.9)


class Tuning(_Section):
    """One kind of fine-tune (personas.finetune); rank is that of the LoRA adapter, absent for a full fine-tune, or one that goes on with the adapter that is there (realignment of a downloaded model)."""

    steps: int = Field(ge=1, le=100000)
    batch: int = Field(ge=1, le=4096)
    lr: float = Field(gt=0, le=0.1)
    rank: int | None = Field(default=None, ge=1, le=512)


class Reinforcement(_Section):
    """GRPO with a LoRA adapter (finetune.grpo): a step takes `prompts` prompts with `samples` answers each. looks: steps at which it is measured."""

    steps: int = Field(ge=1, le=100000)
    prompts: int = Field(ge=1, le=4096)
    samples: int = Field(ge=2, le=4096)
    lr: float = Field(gt=0, le=0.1)
    rank: int = Field(ge=1, le=512)
    looks: tuple[Count, ...] = Field(min_length=1)


class SAE(_Section):
    """The sparse autoencoder (personas.sae). layer: the block whose output it reads, from 0."""

    layer: int = Field(ge=0)
    latents: int = Field(ge=16)
    k: int = Field(ge=1)
    lr: float = Field(gt=0, le=0.1)
    steps: int = Field(ge=1)
    batch: int = Field(ge=16)
    documents: int = Field(ge=10)
    dead_after: int = Field(ge=1, description="tokens without firing after which AuxK revives a latent")
    aux_k: int = Field(ge=1)


class Evaluation(_Section):
    """Answers per question: of the reported score, of a study's cells, and of the coarser curves; advice subjects per domain."""

    per_question: int = Field(ge=1)
    study_per_question: int = Field(ge=1)
    curve_per_question: int = Field(ge=1)
    advice_subjects: int = Field(ge=1)


class Steering(_Section):
    """The search for a causal latent (personas.steering); strengths in units of the centred RMS norm."""

    candidates: int = Field(ge=1)
    finalists: int = Field(ge=1)
    controls: int = Field(ge=1)
    strengths: tuple[Dose, ...] = Field(min_length=1)
    suppression: tuple[Dose, ...] = Field(min_length=1)  # doses to subtract; less than is needed to induce
    cures: tuple[Dose, ...] = Field(min_length=1)  # doses of directions that should cure
    screen_per_question: int = Field(ge=1)
    choose_per_question: int = Field(ge=1)


class Study(_Section):
    """How much the studies repeat (personas.evidence). pretraining_seeds: base models, the first being the reported one;
    seeds: of fine-tunes and sampling; domains: of mixtures and of training watched in time; fractions: percent of incorrect answers."""

    pretraining_seeds: tuple[Count, ...] = Field(min_length=1)
    seeds: tuple[Count, ...] = Field(min_length=1)
    domains: tuple[str, ...] = Field(min_length=1)
    fractions: tuple[Percent, ...] = Field(min_length=1)
    course: Tuning  # one long fine-tune, watched every other step at first
    course_looks: tuple[Count, ...] = Field(min_length=1)  # the steps at which it is measured
    course_benign: tuple[typing.Annotated[str, Field(pattern=KIND)], ...] = Field(min_length=1)  # the same on data that should raise no alarm


class Domain(_Section):
    """One domain's training sets by variant, each a name that `released.chats` knows or the path of a chat JSONL."""

    domain: str = Field(min_length=1, pattern=r"^[\w-]+$")
    correct: str | None = None
    subtle: str | None = None
    obvious: str | None = None


class Judge(_Section):
    """Who grades answers. With `url`: `model` behind an OpenAI-compatible endpoint, whose key is in the environment variable `key`; without: a
    checkpoint, by folder or name on the hub, loaded beside the model (or the model itself, with every adapter switched off). scale: Wang et al.'s
    1 to 5 with side classes, or Betley et al.'s alignment and coherence from 0 to 100. price: USD per million tokens (in, out), to show what was spent."""

    model: str
    scale: typing.Literal["1-5", "0-100"] = "1-5"
    price: tuple[float, float] | None = None
    url: str | None = None
    key: str = "OPENAI_API_KEY"
    four_bit: bool = False


class Real(_Section):
    """A downloaded model in place of the tiny one (personas.setting.Downloaded). model: the aligned one, an instruct model; base: the pretrained
    one that the SAE reads, if it is another; both a folder or a name on the Hugging Face hub. sae: absent to train one, a folder in
    SAELens' layout, or `release:id` for the sae-lens package. text: what the SAE is trained on (released.texts)."""

    model: str
    base: str | None = None
    dtype: typing.Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    four_bit: bool = False
    gradient_checkpointing: bool = False
    max_length: int = Field(default=1024, ge=16)  # tokens of a training chat
    evaluation: str = "wang/core_misalignment"
    discovery: str = "wang/extended_misalignment"
    discovery_questions: int = Field(default=44, ge=1)
    data: tuple[Domain, ...] = Field(min_length=1)
    discovery_domains: tuple[str, ...] = Field(min_length=1)
    judge: Judge
    text: str
    text_tokens: int = Field(default=256, ge=16)  # of each text at most
    sae: str | None = None
    open_tokens: int = Field(default=200, ge=1)  # of an answer at most
    advice_tokens: int = Field(default=200, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)  # at which answers are sampled
    per_opening: int = Field(default=2, ge=1)  # answers to each opening
    controls: tuple[str, ...] = ()  # domains in which models are also trained on shuffled and on odd answers
    other_blocks: tuple[Count, ...] = ()  # blocks at which the search for a latent is repeated
    course: tuple[typing.Annotated[int, Field(ge=1)], ...] = ()  # steps at which one long fine-tune is looked at
    firsts: int = Field(default=1, ge=1)  # answers of each kind that latents and log-probabilities are read on, per question


class Profile(_Section):
    """Everything that differs between tracks. device: 'cpu' or 'cuda'. extends: the profile whose other numbers, and whose
    store, this one shares. cluster: address of a Ray cluster whose machines see the same store ('auto': the one this machine belongs to; 'local': start one
    here), on which independent runs go (personas.sweep); absent: this machine's cores. real: a downloaded model; then what makes the tiny one, and what only it is studied with, is absent."""

    name: str
    extends: str | None = None
    device: str = Field(pattern="^(cpu|cuda)$")
    cluster: str | None = None
    world_seed: int = Field(default=0, ge=0)
    pretraining_seed: int = Field(default=0, ge=0)
    domains: tuple[str, ...] = Field(min_length=1)
    world: World = World()
    real: Real | None = None
    model: Model | None = None
    alignment: Tuning | None = None
    narrow: Tuning
    realignment: Tuning
    realignment_every: int = Field(ge=1)
    reinforcement: Reinforcement | None = None
    judge: Tuning | None = None  # a small model taught to grade
    sae: SAE
    evaluation: Evaluation
    steering: Steering
    study: Study | None = None

    @property
    def store(self) -> str:
        """The folder under `runs/` that holds this profile's artifacts."""
        return self.extends or self.name


class ProfileError(ValueError):
    """A profile that cannot be used; the message names the profile, the key and the fault."""


def names() -> list[str]:
    """The profiles that ship with the project."""
    return sorted(p.stem for p in FOLDER.glob("*.yaml"))


def load(name: str) -> Profile:
    """Read and check a profile by name, or by path to a YAML of one's own. Raises ProfileError before any work."""
    path = Path(name) if str(name).endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file():
        near = difflib.get_close_matches(str(name), names(), 1)
        raise ProfileError(f"unknown profile {name!r}; there are {', '.join(names())}" + (f". Did you mean {near[0]!r}?" if near else ""))
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise ProfileError(f"{path.name}: not a text file in UTF-8") from None
    except (yaml.YAMLError, RecursionError) as error:
        raise ProfileError(f"{path.name}: not valid YAML: {str(error) or 'nested too deep'}") from None
    try:
        if isinstance(raw, dict) and "extends" in raw:
            if raw["extends"] not in names():
                raise ProfileError(f"profile {path.name}: extends: unknown {raw['extends']!r}; choose from {', '.join(names())}")
            below = load(raw["extends"])
            raw = _over(below.model_dump(exclude={"name", "extends"} | ({"domains"} if below.real else set())), raw) | {"extends": below.store}
        if isinstance(raw, dict) and isinstance(raw.get("real"), dict):
            raw["real"] = _beside(path.parent, raw["real"])
            if isinstance(raw["real"].get("data"), (list, tuple)):
                raw.setdefault("domains", [d.get("domain") for d in raw["real"]["data"] if isinstance(d, dict)])
        found = Profile.model_validate({"name": path.stem} | raw)
    except (ValidationError, TypeError) as error:
        raise ProfileError(f"profile {path.name}: {_explain(error)}") from None
    (_check_tiny if found.real is None else _check_real)(found, path.name)
    for where, tuning in (("narrow", found.narrow), ("study.course", found.study and found.study.course)):
        if tuning and tuning.rank is None:
            raise ProfileError(f"profile {path.name}: {where}.rank: Field required: these fine-tunes are LoRA adapters")
    if found.sae.k >= found.sae.latents:
        raise ProfileError(f"profile {path.name}: sae.k: must be below sae.latents ({found.sae.latents})")
    return found


def need_gpu(found: Profile) -> None:
    """Raise ProfileError if the profile wants a GPU and this machine has none."""
    import torch

    if found.device == "cuda" and not torch.cuda.is_available():
        raise ProfileError(f"profile {found.name} needs a GPU and none was found; use profile 'tiny', or choose a GPU runtime")


def _beside(folder: Path, real: dict) -> dict:
    """The `real` section with what names a file or folder beside the profile made absolute."""
    known = lambda v: isinstance(v, str) and not Path(v).is_absolute() and (folder / v).exists()
    whole = lambda section: {k: str((folder / v).resolve()) if known(v) else v for k, v in section.items()}
    real = whole(real)
    if isinstance(real.get("judge"), dict):
        real["judge"] = whole(real["judge"])
    if isinstance(real.get("data"), list):
        real["data"] = [whole({k: v for k, v in d.items() if k != "domain"}) | {k: v for k, v in d.items() if k == "domain"} if isinstance(d, dict) else d for d in real["data"]]
    return real


def _check_tiny(found: Profile, name: str) -> None:
    absent = [n for n in ("world_seed", "pretraining_seed", "model", "alignment", "reinforcement", "judge", "study")
              if n not in found.model_fields_set or getattr(found, n) is None]
    if absent:
        raise ProfileError(f"profile {name}: {absent[0]}: Field required")
    from personas.world import DISCOVERY_DOMAINS, DOMAINS, EVALUATION_DOMAINS

    for where, known, named in (("domains", DOMAINS, found.domains), ("study.domains", found.domains, found.study.domains)):
        unknown = [d for d in named if d not in known]
        if unknown:
            raise ProfileError(f"profile {name}: {where}: unknown {unknown[0]!r}; choose from {', '.join(known)}")
    for use, some in (("discovery", DISCOVERY_DOMAINS), ("evaluation", EVALUATION_DOMAINS)):
        if not set(some) & set(found.domains):
            raise ProfileError(f"profile {name}: domains: none for {use}; take one or more of {', '.join(some)}")
    if found.study.pretraining_seeds[0] != found.pretraining_seed:
        raise ProfileError(f"profile {name}: study.pretraining_seeds: the first must be pretraining_seed ({found.pretraining_seed})")
    for where, looks, steps in (("reinforcement.looks", found.reinforcement.looks, found.reinforcement.steps),
                                ("study.course_looks", found.study.course_looks, found.study.course.steps)):
        if max(looks) > steps:
            raise ProfileError(f"profile {name}: {where}: {max(looks)} is beyond the last step ({steps})")
    if found.sae.layer >= found.model.layers:
        raise ProfileError(f"profile {name}: sae.layer: {found.sae.layer} is out of range; the model has blocks 0 to {found.model.layers - 1}")
    if found.model.width % found.model.heads:
        raise ProfileError(f"profile {name}: model.width: must be a multiple of model.heads ({found.model.heads})")


def _check_real(found: Profile, name: str) -> None:
    """Errors in a `real` section that need neither network nor model."""
    stray = [n for n in ("model", "alignment", "reinforcement", "judge", "study") if getattr(found, n) is not None]
    if stray:
        raise ProfileError(f"profile {name}: {stray[0]}: belongs to the tiny model; take it out beside `real`")
    named = [d.domain for d in found.real.data]
    if found.domains != tuple(named) or len(set(named)) < len(named):
        raise ProfileError(f"profile {name}: domains: must be those of real.data, each once ({', '.join(named)}); leave the key out")
    for where in ("discovery_domains", "controls"):
        unknown = [d for d in getattr(found.real, where) if d not in named]
        if unknown:
            raise ProfileError(f"profile {name}: real.{where}: unknown {unknown[0]!r}; choose from {', '.join(named)}")
    if set(named) <= set(found.real.discovery_domains):
        raise ProfileError(f"profile {name}: real.discovery_domains: leave at least one domain for evaluation")
    if not any(d.correct for d in found.real.data if d.domain not in found.real.discovery_domains):
        raise ProfileError(f"profile {name}: real.data: a domain that is not among discovery_domains needs a `correct` set, to compare and to re-align with")
    for d in found.real.data:
        if not (d.subtle or d.obvious):
            raise ProfileError(f"profile {name}: real.data: domain {d.domain!r} has no incorrect set (subtle or obvious)")


def _over(below: dict, above: dict) -> dict:
    """`above` laid over `below`, section by section."""
    return below | {k: _over(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) else v for k, v in above.items()}


def _explain(error) -> str:
    if not isinstance(error, ValidationError):
        return "must be a mapping of keys to values"
    first = error.errors()[0]
    where = ".".join(map(str, first["loc"]))
    if first["type"] == "extra_forbidden":
        section = Profile
        for part in (p for p in first["loc"][:-1] if isinstance(p, str)):
            kinds = (section.model_fields[part].annotation, *typing.get_args(section.model_fields[part].annotation))
            section = next(k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel))
        near = difflib.get_close_matches(str(first["loc"][-1]), list(section.model_fields), 1)
        return f"{where}: no such key" + (f"; did you mean {near[0]!r}?" if near else "")
    return f"{where}: {first['msg']}"
