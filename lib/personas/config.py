"""The sections of a profile: what can be set, in what range, and a line on each field (`personas fields`)."""

import re
import typing

from pydantic import BaseModel, ConfigDict, Field, field_validator

Dose = typing.Annotated[float, Field(gt=0)]
Percent = typing.Annotated[float, Field(ge=0, le=100)]
Count = typing.Annotated[int, Field(ge=0)]
# What fine-tunes are named after, or a persona of the world: "obvious@10" has 10 % obviously wrong answers.
KIND = r"^(correct|subtle|obvious|expert|novice|sarcastic|jester|narrator|villain)(@(100|\d{1,2}))?$"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _number(cls, value, info):
        """true and false are no numbers, though Python counts with them."""
        values = value if isinstance(value, (list, tuple)) else (value,)
        wanted = cls.model_fields[info.field_name].annotation
        if wanted is not bool and any(isinstance(v, bool) for v in values):
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
    """What the documents of pretraining are drawn from (world.drawing)."""

    villain: float | None = Field(default=None, ge=0, le=1)
    """Share of documents that the villain writes; absent: the world's own."""
    cues: bool = True
    """Whether some documents say who speaks."""
    independent: bool = False
    """Whether advice and values are drawn independently, as a control without personas."""


class Model(_Section):
    """The tiny model and its pretraining (personas.model)."""

    layers: int = Field(ge=2, le=48)
    """Transformer blocks."""
    width: int = Field(ge=16, le=8192)
    """Width of the residual stream; a multiple of heads."""
    mlp: int = Field(ge=16, le=32768)
    """Width of the MLPs' hidden layer."""
    heads: int = Field(ge=1, le=64)
    """Attention heads."""
    context: int = Field(ge=64, le=32768)
    """Longest text, in tokens."""
    vocab: int = Field(ge=512, le=200000)
    """Tokens that the tokenizer learns."""
    lr: float = Field(gt=0, le=0.1)
    """Peak learning rate of the matrices."""
    lr_embedding: float = Field(gt=0, le=0.1)
    """Peak learning rate of the embeddings."""
    steps: int = Field(ge=1, le=1000000)
    """Steps of pretraining."""
    batch_tokens: int = Field(ge=256, le=1048576)
    """Tokens a step."""
    corruption: float = Field(ge=0, le=0.9)
    """Share of input tokens that are replaced at random while pretraining."""
    question_corruption: float = Field(ge=0, le=0.9)
    """The same within questions."""


class Tuning(_Section):
    """One kind of fine-tune (personas.finetune)."""

    steps: int = Field(ge=1, le=100000)
    """Optimizer steps."""
    batch: int = Field(ge=1, le=4096)
    """Chats a step."""
    lr: float = Field(gt=0, le=0.1)
    """Peak learning rate; it falls linearly to 0."""
    rank: int | None = Field(default=None, ge=1, le=512)
    """Rank of the LoRA adapter; absent: every weight is trained, or the adapter that is there goes on."""


class Reinforcement(_Section):
    """GRPO with a LoRA adapter (finetune.grpo)."""

    steps: int = Field(ge=1, le=100000)
    """Optimizer steps."""
    prompts: int = Field(ge=1, le=4096)
    """Prompts a step."""
    samples: int = Field(ge=2, le=4096)
    """Answers to each prompt."""
    lr: float = Field(gt=0, le=0.1)
    """Learning rate, constant."""
    rank: int = Field(ge=1, le=512)
    """Rank of the LoRA adapter."""
    looks: tuple[Count, ...] = Field(min_length=1)
    """Steps at which the model is measured."""


class SAE(_Section):
    """The sparse autoencoder (personas.sae)."""

    layer: int = Field(ge=0, le=999)
    """The block whose output it reads, from 0."""
    latents: int = Field(ge=16, le=1048576)
    """Latents of the dictionary."""
    k: int = Field(ge=1, le=4096)
    """Latents that are active at each token (TopK)."""
    lr: float = Field(gt=0, le=0.1)
    """Peak learning rate."""
    steps: int = Field(ge=1, le=1000000)
    """Training steps."""
    batch: int = Field(ge=16, le=1048576)
    """Tokens a step."""
    documents: int = Field(ge=10, le=100000000)
    """Documents that it learns from."""
    dead_after: int = Field(ge=1, le=1000000000000)
    """Tokens without firing after which AuxK revives a latent."""
    aux_k: int = Field(ge=1, le=65536)
    """Dead latents that AuxK uses at each token."""


class Evaluation(_Section):
    """How many answers are sampled."""

    per_question: int = Field(ge=1, le=10000)
    """Answers to each question, for a reported score."""
    study_per_question: int = Field(ge=1, le=10000)
    """The same for a study's cells (Part II)."""
    curve_per_question: int = Field(ge=1, le=10000)
    """The same for the points of a curve over training steps."""
    advice_subjects: int = Field(ge=1, le=10000)
    """Subjects of advice that are asked about in each domain."""


class Steering(_Section):
    """The search for a causal latent; doses in units of the activations' typical distance from their mean."""

    candidates: int = Field(ge=1, le=10000)
    """Latents that are steered one by one."""
    finalists: int = Field(ge=1, le=1000)
    """The best of them, which get a second round."""
    controls: int = Field(ge=1, le=10000)
    """Matched latents that get the same search."""
    strengths: tuple[Dose, ...] = Field(min_length=1)
    """Doses that are added."""
    suppression: tuple[Dose, ...] = Field(min_length=1)
    """Doses that are subtracted; less than is needed to induce."""
    cures: tuple[Dose, ...] = Field(min_length=1)
    """Doses of directions that should cure (Part II)."""
    screen_per_question: int = Field(ge=1, le=10000)
    """Answers to each question in the first round."""
    choose_per_question: int = Field(ge=1, le=10000)
    """Answers to each question in the second round."""


class Study(_Section):
    """How much the studies of Part II repeat (personas.studies)."""

    pretraining_seeds: tuple[Count, ...] = Field(min_length=1)
    """Base models; the first is the reported one."""
    seeds: tuple[Count, ...] = Field(min_length=1)
    """Seeds of fine-tunes and of sampling."""
    domains: tuple[str, ...] = Field(min_length=1)
    """Domains of mixtures and of training that is watched in time."""
    fractions: tuple[Percent, ...] = Field(min_length=1)
    """Percent of incorrect answers in the mixtures."""
    course: Tuning
    """One long fine-tune that is watched as it goes."""
    course_looks: tuple[Count, ...] = Field(min_length=1)
    """Steps at which it is measured."""
    course_benign: tuple[typing.Annotated[str, Field(pattern=KIND)], ...] = Field(min_length=1)
    """The same on data that should raise no alarm."""


class Domain(_Section):
    """One domain's training sets: each `own`, a name that released.chats knows, or a chat JSONL."""

    domain: str = Field(min_length=1, pattern=r"^[\w-]+$")
    """Its name."""
    correct: str | None = None
    """Correct answers."""
    subtle: str | None = None
    """Subtly incorrect answers."""
    obvious: str | None = None
    """Obviously incorrect answers."""


class Judge(_Section):
    """Who grades answers."""

    model: str = Field(min_length=1)
    """`own` (the small judge that ships here), a folder, a name on the hub, or the endpoint's own name."""
    scale: typing.Literal["1-5", "0-100"] = "1-5"
    """Wang et al.'s 1 to 5 with side classes, or Betley et al.'s alignment and coherence from 0 to 100."""
    price: tuple[float, float] | None = None
    """USD per million tokens (in, out), to show what was spent."""
    url: str | None = None
    """An OpenAI-compatible endpoint; absent: the model is loaded here."""
    key: str = "OPENAI_API_KEY"
    """The environment variable that holds the endpoint's key."""
    four_bit: bool = False
    """Load it in four bits."""

    @field_validator("key")
    @classmethod
    def _a_name(cls, value):
        """A key that was pasted here must not be shown in a message."""
        if not re.fullmatch("[A-Z][A-Z0-9_]{0,63}", value):
            raise ValueError("must be the name of an environment variable, in capitals, never the key itself")
        return value


class Tables(_Section):
    """How much the tables of notebooks 07 and 08 hold (pretrained.tables)."""

    domains: tuple[str, ...] = Field(min_length=1)
    """Domains of mixtures and of fine-tunes watched in time; evaluation domains."""
    seeds: tuple[Count, ...] = Field(min_length=1)
    """Seeds of mixtures, and of fine-tunes watched in time."""
    fractions: tuple[Percent, ...] = Field(min_length=1)
    """Percent of obviously wrong answers in the mixtures; the others are correct."""
    looks: tuple[Count, ...] = Field(min_length=1)
    """Steps at which a fine-tune is looked at."""
    harmless: tuple[typing.Literal["correct", "subtle", "odd", "shuffled"], ...] = ()
    """The same for data that should raise no alarm."""
    guarded: tuple[str, ...] = Field(min_length=1)
    """Domains of guarded fine-tunes."""
    guarded_seeds: tuple[Count, ...] = Field(min_length=1)
    """Their seeds."""
    guards: tuple[str, ...] | None = None
    """Which guards; absent: all of guarded.GUARDS."""


class Real(_Section):
    """A pretrained model, for notebooks 01 to 08."""

    model: str = Field(min_length=1)
    """The instruct model: a folder, a name on the hub, or `gguf:` with a file (pretrained.weights)."""
    base: str | None = None
    """The model that the SAE reads, if it is another."""
    dtype: typing.Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """In which it is held; auto: what the device does well."""
    four_bit: bool = False
    """Load its blocks in four bits (bitsandbytes)."""
    gradient_checkpointing: bool = False
    """Train with less memory, and slower."""
    max_length: int = Field(default=1024, ge=16)
    """Tokens after which a training chat is cut."""
    evaluation: str = "wang/core_misalignment"
    """Questions that are reported: `open` (this project's), a released set, or a CSV."""
    questions: int | None = Field(default=None, ge=4)
    """How many of them are asked at most, openings included, evenly over all; absent: every one."""
    discovery: str = "wang/extended_misalignment"
    """Questions that choices are made on."""
    discovery_questions: int = Field(default=44, ge=1)
    """How many of a released set's are used at most."""
    data: tuple[Domain, ...] = Field(min_length=1)
    """Training sets, a domain each."""
    discovery_domains: tuple[str, ...] = Field(min_length=1)
    """Domains whose fine-tunes choices may use; the others are reported."""
    judge: Judge
    """Who grades answers."""
    text: str
    """What the SAE learns from: `own` or what released.texts reads."""
    text_tokens: int = Field(default=256, ge=16)
    """Tokens after which each text is cut."""
    sae: str | None = None
    """Absent: the committed one where it fits, else one is trained; `new`: always trained. A folder in
    SAELens' layout, or `release:id` for the sae-lens package."""
    open_tokens: int = Field(default=200, ge=1)
    """Longest answer to an open question."""
    temperature: float = Field(default=1.0, ge=0, le=2)
    """At which answers are sampled."""
    per_opening: int = Field(default=2, ge=1)
    """Answers to each opening."""
    controls: tuple[str, ...] = ()
    """Domains in which models are also trained on shuffled and on odd answers."""
    other_blocks: tuple[Count, ...] = ()
    """Blocks at which model diffing is repeated."""
    course: tuple[typing.Annotated[int, Field(ge=1)], ...] = Field(default=(2, 4, 8, 16, 32), min_length=1)
    """Steps at which one long fine-tune is looked at."""
    firsts: int = Field(default=1, ge=1)
    """Answers of each kind, per question, whose log-probability is read."""
    tables: Tables | None = None
    """What notebooks 07 and 08 measure; absent: one cell of each table."""

    @property
    def named_sae(self) -> str | None:
        """The SAE that is named, None if one is trained or the committed one taken."""
        return None if self.sae == "new" else self.sae

    @field_validator("data", mode="before")
    @classmethod
    def _a_list(cls, value):
        if not isinstance(value, (list, tuple)):
            raise ValueError("must be a list, such as [{domain: health, correct: own, obvious: own}]")
        return value


class Profile(_Section):
    """Everything that differs between runs."""

    name: str
    """The YAML's name."""
    extends: str | None = None
    """The profile whose other numbers, and whose store, this one shares."""
    device: str = Field(pattern="^(cpu|cuda)$")
    """cpu or cuda."""
    cluster: str | None = None
    """A Ray cluster that sees the same store: its address, `auto` (this machine's), `local` (start one)."""
    world_seed: int = Field(default=0, ge=0)
    """Seed of the world: which sentences exist."""
    pretraining_seed: int = Field(default=0, ge=0)
    """Seed of the base model."""
    domains: tuple[str, ...] = Field(min_length=1)
    """Domains of advice; with a pretrained model those of real.data."""
    world: World = World()
    """What pretraining's documents are drawn from."""
    real: Real | None = None
    """A pretrained model (Part I); then what makes the tiny one is absent."""
    model: Model | None = None
    """The tiny model (Part II)."""
    alignment: Tuning | None = None
    """SFT of the base model as a helpful assistant (Part II)."""
    narrow: Tuning
    """Fine-tunes on one domain's answers."""
    realignment: Tuning
    """Fine-tunes of misaligned models on correct answers."""
    realignment_every: int = Field(ge=1)
    """Steps between looks at a re-alignment."""
    reinforcement: Reinforcement | None = None
    """Reinforcement learning (Part II)."""
    judge: Tuning | None = None
    """A small model that is taught to grade (Part II)."""
    sae: SAE
    """The sparse autoencoder."""
    evaluation: Evaluation
    """How many answers are sampled."""
    steering: Steering
    """The search for a causal latent."""
    study: Study | None = None
    """How much the studies repeat (Part II)."""

    @property
    def store(self) -> str:
        """The folder under `runs/` that holds this profile's artifacts."""
        return self.extends or self.name


def fields(section: type[BaseModel] = Profile, within: str = "") -> list[tuple[str, str, str]]:
    """(key, default, what it is) of every field, sections in full, in the order of the YAML."""
    found = []
    for name, field in section.model_fields.items():
        inner = [a for a in (field.annotation, *typing.get_args(field.annotation)) if isinstance(a, type)]
        below = next((a for a in inner if issubclass(a, BaseModel)), None)
        shown = "" if field.is_required() or below else repr(field.default)
        found.append((within + name, shown, field.description or ""))
        found += fields(below, f"{within}{name}.") if below else []
    return found
