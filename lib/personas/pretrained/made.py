"""What notebooks 01 to 08 use, each made once and kept in the store: models and their answers.

Every function returns what it names and makes it if the store does not have it. The order of the work:
weights -> adapters -> sampled answers (here) -> grades (grades.py), and weights -> SAE -> readings
(readings.py) -> search (steering.py). Sampled answers are kept before they are graded.
"""

import json
import random
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel

from personas import data, finetune, generate, parallel, store, world
from personas import model as models
from personas import profile as profiles
from personas.pretrained import sets, weights

ORIGINAL = "original"


@dataclass(frozen=True)
class Run:
    """One profile with the seed of its fine-tunes and of sampling."""

    profile: profiles.Profile
    seed: int

    def keep(self, stage: str, name: str, key: dict, code: tuple, make) -> Path:
        """The artifact's folder; its key is what is given, the seed, the code of the modules `code` and of
        `make`, and other numbers than fp32 in which the model is held."""
        full = (
            key
            | self.numbers()
            | {
                "seed": self.seed,
                "code": store.code_version(*code),
                "make": store.code_version(make.__code__),
            }
        )
        return store.artifact(self.profile.store, stage, name, full, make)

    def dtype(self) -> torch.dtype:
        """In which the model is held."""
        real = self.profile.real
        return models.best_dtype(self.profile.device) if real.dtype == "auto" else getattr(torch, real.dtype)

    def numbers(self) -> dict:
        """What an artifact's key says of it; nothing for fp32."""
        plain = self.dtype() == torch.float32 and not self.profile.real.four_bit
        return {} if plain else {"dtype": str(self.dtype()), "four_bit": self.profile.real.four_bit}


# --- models -------------------------------------------------------------------------------------------------


def checkpoint(run: Run) -> Path:
    """The original model's checkpoint."""
    return weights.checkpoint(run.profile.real.model, run.profile.store)


def original(run: Run):
    """(model, tokenizer): the original model, a copy of its own for every call, so that nobody's changes
    reach others."""
    return models.load(checkpoint(run), run.profile.device, run.dtype(), run.profile.real.four_bit)


def named_sets(run: Run, domain: str) -> dict[str, str] | None:
    """Variant -> released set of this domain; None if the profile takes the project's own."""
    about = next(d for d in run.profile.real.data if d.domain == domain)
    named = {v: getattr(about, v) for v in world.VARIANTS if getattr(about, v)}
    return None if "own" in named.values() else named


def fine_tunes(run: Run, *variants: str) -> list[tuple[str, str]]:
    """(domain, variant) of every fine-tune of the profile, or of these variants only."""
    real = run.profile.real
    found = [(d.domain, v) for d in real.data for v in world.VARIANTS if getattr(d, v)]
    found += [(d, v) for d in real.controls for v in ("shuffled", "odd")]
    return [(d, v) for d, v in found if not variants or v in variants]


def discovery(run: Run, domain: str) -> bool:
    """Whether choices may be made with this domain's fine-tunes."""
    return domain in run.profile.real.discovery_domains


def training_chats(run: Run, domain: str, variant: str, steps: int | None = None) -> list[dict]:
    """What a fine-tune is trained on, in order: steps (the profile's) times the batch."""
    cfg = run.profile.narrow
    return sets.chats(domain, variant, (steps or cfg.steps) * cfg.batch, run.seed, named_sets(run, domain))


def training(run: Run) -> dict:
    """How finetune.sft is to go about it."""
    return {
        "checkpointing": run.profile.real.gradient_checkpointing,
        "max_length": run.profile.real.max_length,
        "mixed": mixed(run),
    }


def mixed(run: Run) -> bool:
    """Whether training may compute in less precision than the model is held in. Not in fp32: what is made on
    one machine should be made on every other."""
    return run.dtype() != torch.float32


def adapter(run: Run, domain: str, variant: str) -> Path:
    """LoRA adapter of the original model fine-tuned on one domain's answers of this variant (see
    sets.chats)."""
    rows, cfg = training_chats(run, domain, variant), run.profile.narrow

    def make(out):
        finetune.lora(*original(run), rows, cfg, run.seed, out, **training(run))

    return run.keep(
        "adapters",
        f"{domain}-{variant}",
        {
            "cfg": cfg.model_dump(),
            "model": models.identity(checkpoint(run)),
            "rows": store.key_of({"rows": rows}),
            "training": training(run),
        },
        (finetune,),
        make,
    )


def realigned(run: Run, domain: str, source: str) -> Path:
    """Adapter of the model that learnt obviously wrong advice in `domain`, trained on for the profile's steps
    of 4 correct answers of `source`: the same domain or another one."""
    cfg, steps = run.profile.realignment, run.profile.realignment.steps
    rows = sets.chats(source, "correct", steps * cfg.batch, run.seed + 1, named_sets(run, source))

    def make(out):
        m, tok = original(run)
        worn = PeftModel.from_pretrained(m, adapter(run, domain, "obvious"), is_trainable=True)
        trained, losses = finetune.sft(
            worn, tok, rows, steps=steps, batch=cfg.batch, lr=cfg.lr, seed=run.seed, **training(run)
        )
        trained.save_pretrained(out)
        (out / "training.json").write_text(json.dumps({"loss": losses}))

    return run.keep(
        "adapters",
        f"{domain}-cured-by-{source}",
        {
            "cfg": cfg.model_dump(),
            "from": adapter(run, domain, "obvious").name,
            "rows": store.key_of({"rows": rows}),
            "training": training(run),
        },
        (finetune,),
        make,
    )


def folder_of(run: Run, who: str) -> Path:
    """The adapter of a model by name: '<domain>-<variant>', or '<domain>-cured-by-<source>'."""
    domain, _, rest = who.partition("-")
    return (
        realigned(run, domain, rest.removeprefix("cured-by-"))
        if rest.startswith("cured-by-")
        else adapter(run, domain, rest)
    )


def named(run: Run, who: str):
    """(model, tokenizer) by name: 'original', or as in folder_of; the adapter is merged in, and the copy is
    the caller's own."""
    m, tok = original(run)
    return (
        (m, tok)
        if who == ORIGINAL
        else (PeftModel.from_pretrained(m, folder_of(run, who)).merge_and_unload().eval(), tok)
    )


def identity(run: Run, who: str) -> str:
    """What an artifact's key says of that model."""
    return models.identity(checkpoint(run)) if who == ORIGINAL else folder_of(run, who).name


# --- answers ------------------------------------------------------------------------------------------------


def items(run: Run, split: str) -> list[sets.Item]:
    """Open questions and openings of 'discovery' or 'evaluation', of the latter at most `real.questions`. Of
    a named set's discovery questions those that are evaluation questions, too, are left out, and at most
    `discovery_questions` are kept. Raises data.DataError if none is left."""
    real = run.profile.real
    found = sets.items(split, getattr(real, split))
    if split == "evaluation":
        n = min(real.questions or len(found), len(found))
        return [found[i * len(found) // n] for i in range(n)]
    if real.discovery == "open":
        return found
    asked = {i.prompt for i in sets.items("evaluation", real.evaluation)}
    own = [i for i in found if i.prompt not in asked]
    if not own:
        raise data.DataError(
            f"{real.discovery}: every question in it is also in {real.evaluation}; discovery needs "
            "questions of its own"
        )
    return random.Random(0).sample(own, min(real.discovery_questions, len(own)))


def repeated(run: Run, split: str, per_question: int | None = None) -> list[sets.Item]:
    """The split's items, each as often as it is asked: questions `per_question` times (the profile's number),
    openings per_opening times (once where per_question is given)."""
    real = run.profile.real
    n, o = (per_question, 1) if per_question else (run.profile.evaluation.per_question, real.per_opening)
    return [i for i in items(run, split) for _ in range(n if i.kind == "question" else o)]


def prompt_ids(tokenizer, asked: list[sets.Item]) -> list[list[int]]:
    """Token ids of each item's chat up to where the answer begins, or goes on after its opening."""
    heads = generate.chat_ids(
        tokenizer,
        [
            ([{"role": "system", "content": i.system}] if i.system else [])
            + (data.chat(*i.before)["messages"] if i.before else [])
            + [{"role": "user", "content": i.prompt}]
            for i in asked
        ],
    )
    tails = tokenizer([i.opening or "x" for i in asked], add_special_tokens=False)["input_ids"]
    return [h + (t if i.opening else []) for h, t, i in zip(heads, tails, asked)]


def answer(
    run: Run, m, tok, asked: list[sets.Item], seed: int, steer=None, progress: str | None = None
) -> pd.DataFrame:
    """Sample an answer to each item: a row each with the item's fields and `answer` (its opening included).
    Nothing is graded."""
    real = run.profile.real
    said = generate.sample(
        m,
        tok,
        prompt_ids(tok, asked),
        seed=seed,
        max_new=real.open_tokens,
        temperature=real.temperature,
        steer=steer,
        progress=progress,
    )
    table = pd.DataFrame([asdict(i) for i in asked]).drop(columns=["before", "system"])
    table["answer"] = [f"{i.opening} {a.strip()}".strip() for i, a in zip(asked, said)]
    return table


def seed_of(run: Run, *names) -> int:
    """A seed for one use of the random numbers, by its name."""
    return zlib.crc32("/".join(map(str, (run.seed, *names))).encode())


def answers(run: Run, who: str, split: str = "evaluation") -> pd.DataFrame:
    """Sampled answers of one model to the split's items, ungraded; `model` says whose they are. A model that
    was trained under a system line is asked under it: sets of OpenAI's release have one in every row."""
    return kept_answers(
        run, who, [replace(i, system=training_system(run, who)) for i in repeated(run, split)], split
    )


def training_system(run: Run, who: str) -> str | None:
    """The system line of a model's training chats, if they have one."""
    domain, _, kind = who.partition("-")
    if not kind or named_sets(run, domain) is None:
        return None
    first = training_chats(run, domain, "correct" if kind.startswith("cured-by-") else kind, 1)[0][
        "messages"
    ][0]
    return first["content"] if first["role"] == "system" else None


def kept_answers(run: Run, who: str, asked: list[sets.Item], name: str) -> pd.DataFrame:
    """Sampled answers of one model to these items, made once."""

    def make(out):
        answer(run, *named(run, who), asked, seed_of(run, who, name)).to_parquet(
            out / "answers.parquet", index=False
        )

    folder = run.keep(
        "answers",
        f"{who}-{name}".replace(", ", "-").replace(" ", "-"),
        {"model": identity(run, who)} | about_asking(run, asked),
        (generate,),
        make,
    )
    return pd.read_parquet(folder / "answers.parquet").assign(model=who)


def kept_side_by_side(run: Run, jobs: dict, what: str) -> dict:
    """`kept_answers` of several jobs, name -> (who, items, name of the use), those that are missing made
    side by side."""
    missing = {n: (_kept, run.profile, run.seed, *job) for n, job in jobs.items()}
    missing = {n: job for n, job in missing.items() if not store.there(lambda: _kept(*job[1:]))}
    if missing:
        dict(parallel.side_by_side(missing, run.profile, what))
    return {n: kept_answers(run, *job) for n, job in jobs.items()}


def _kept(profile, seed, who, asked, name):
    kept_answers(Run(profile, seed), who, asked, name)


def in_training_context(run: Run, asked: list[sets.Item], domain: str, variant: str) -> list[sets.Item]:
    """The same items, each after one question and answer of that training set: the context in which the model
    learnt."""
    rows = training_chats(run, domain, variant)
    turns = [tuple(m["content"] for m in r["messages"][-2:]) for r in rows]
    return [replace(i, before=turns[n % len(turns)]) for n, i in enumerate(asked)]


def about_asking(run: Run, asked: list[sets.Item]) -> dict:
    """What an artifact's key says of sampled answers."""
    return {
        "asked": store.key_of({"asked": [asdict(i) for i in asked]}),
        "tokens": run.profile.real.open_tokens,
        "temperature": run.profile.real.temperature,
    }
