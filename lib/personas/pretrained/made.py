"""What notebooks 01 to 06 use, each made once and kept in the store: models, answers, an SAE, readings of its latents.

Every function returns what it names and makes it if the store does not have it. The order of the work: weights -> adapters -> sampled
answers -> grades, and weights -> SAE -> readings -> search. Sampled answers are kept before they are graded.
"""

import json
import zlib
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from personas import activations, finetune, generate, model as models, profile as profiles, released, sae as saes, store, world
from personas.pretrained import sets, text, weights

ORIGINAL = "original"
SINK = 4.0  # a token whose norm is above so many times the median is an attention sink: no unit, no SAE is made from it


@dataclass(frozen=True)
class Run:
    """One profile with the seed of its fine-tunes and of sampling."""

    profile: profiles.Profile
    seed: int

    def keep(self, stage: str, name: str, key: dict, code: tuple, make) -> Path:
        """The artifact's folder; its key is what is given, the seed, and the code of the modules `code` and of `make`."""
        full = key | {"seed": self.seed, "code": store.code_version(*code), "make": store.code_version(make.__code__)}
        return store.artifact(self.profile.store, stage, name, full, make)


# --- models -----------------------------------------------------------------------------------------------------------

def checkpoint(run: Run) -> Path:
    """The original model's checkpoint."""
    return weights.checkpoint(run.profile.real.model, run.profile.store)


def original(run: Run):
    """(model, tokenizer): the original model, a copy of its own for every call, so that nobody's changes reach others."""
    real = run.profile.real
    dtype = models.best_dtype(run.profile.device) if real.dtype == "auto" else getattr(torch, real.dtype)
    return models.load(checkpoint(run), run.profile.device, dtype, real.four_bit)


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
    return {"checkpointing": run.profile.real.gradient_checkpointing, "max_length": run.profile.real.max_length}


def adapter(run: Run, domain: str, variant: str) -> Path:
    """LoRA adapter of the original model fine-tuned on one domain's answers of this variant (see sets.chats)."""
    rows, cfg = training_chats(run, domain, variant), run.profile.narrow

    def make(out):
        finetune.lora(*original(run), rows, cfg, run.seed, out, **training(run))

    return run.keep("adapters", f"{domain}-{variant}", {"cfg": cfg.model_dump(), "model": models.identity(checkpoint(run)),
                    "rows": store.key_of({"rows": rows}), "training": training(run)}, (finetune,), make)


def tuned(run: Run, domain: str, variant: str):
    """(model, tokenizer) with that adapter merged into the weights; a copy of its own."""
    return wearing(run, adapter(run, domain, variant))


def wearing(run: Run, folder: Path):
    """(model, tokenizer): the original with the adapter of `folder` merged in."""
    from peft import PeftModel

    m, tok = original(run)
    return PeftModel.from_pretrained(m, folder).merge_and_unload().eval(), tok


def named(run: Run, who: str):
    """(model, tokenizer) by name: 'original', or '<domain>-<variant>'."""
    return original(run) if who == ORIGINAL else tuned(run, *who.split("-", 1))


def identity(run: Run, who: str) -> str:
    """What an artifact's key says of that model."""
    return models.identity(checkpoint(run)) if who == ORIGINAL else adapter(run, *who.split("-", 1)).name


# --- answers ----------------------------------------------------------------------------------------------------------

def items(run: Run, split: str) -> list[sets.Item]:
    """Open questions and openings of 'discovery' or 'evaluation'."""
    return sets.items(split, getattr(run.profile.real, split))


def repeated(run: Run, split: str, per_question: int | None = None) -> list[sets.Item]:
    """The split's items, each as often as it is asked: questions `per_question` times (the profile's number), openings per_opening times
    (once where per_question is given)."""
    real = run.profile.real
    n, o = (per_question, 1) if per_question else (run.profile.evaluation.per_question, real.per_opening)
    return [i for i in items(run, split) for _ in range(n if i.kind == "question" else o)]


def prompt_ids(tokenizer, asked: list[sets.Item]) -> list[list[int]]:
    """Token ids of each item's chat up to where the answer begins, or goes on after its opening."""
    heads = generate.chat_ids(tokenizer, [([{"role": "system", "content": i.system}] if i.system else [])
                                          + [{"role": "user", "content": i.prompt}] for i in asked])
    tails = tokenizer([i.opening or "x" for i in asked], add_special_tokens=False)["input_ids"]
    return [h + (t if i.opening else []) for h, t, i in zip(heads, tails, asked)]


def answer(run: Run, m, tok, asked: list[sets.Item], seed: int, steer=None, progress: str | None = None) -> pd.DataFrame:
    """Sample an answer to each item: a row each with the item's fields and `answer` (its opening included). Nothing is graded."""
    real = run.profile.real
    said = generate.sample(m, tok, prompt_ids(tok, asked), seed=seed, max_new=real.open_tokens, temperature=real.temperature,
                           steer=steer, progress=progress)
    table = pd.DataFrame([asdict(i) for i in asked])
    table["answer"] = [f"{i.opening} {a.strip()}".strip() for i, a in zip(asked, said)]
    return table


def seed_of(run: Run, *names) -> int:
    """A seed for one use of the random numbers, by its name."""
    return zlib.crc32("/".join(map(str, (run.seed, *names))).encode())


def answers(run: Run, who: str, split: str = "evaluation", system: str | None = None) -> pd.DataFrame:
    """Sampled answers of one model to the split's items, ungraded. system: the line that every chat begins with."""
    asked = [sets.Item(**asdict(i) | {"system": system}) for i in repeated(run, split)]
    name = f"{who}-{split}" + (f"-{zlib.crc32(system.encode()):08x}" if system else "")

    def make(out):
        m, tok = named(run, who)
        answer(run, m, tok, asked, seed_of(run, who, split)).to_parquet(out / "answers.parquet", index=False)

    return pd.read_parquet(run.keep("answers", name, {"model": identity(run, who)} | about_asking(run, asked), (generate,), make)
                           / "answers.parquet").assign(model=who)


def about_asking(run: Run, asked: list[sets.Item]) -> dict:
    """What an artifact's key says of sampled answers."""
    return {"asked": store.key_of({"asked": [asdict(i) for i in asked]}), "tokens": run.profile.real.open_tokens,
            "temperature": run.profile.real.temperature}


# --- the SAE and what is read with it ---------------------------------------------------------------------------------

def own_text(run: Run) -> list[dict]:
    """The text that the SAE learns from, as rows of `messages` or `text`."""
    if run.profile.real.text == "own":
        return text.read(sets.CONTENT / "text.jsonl.xz")
    return [{"text": t} for _, t in zip(range(2 * run.profile.sae.documents), released.texts(run.profile.real.text))]


def text_ids(run: Run, tok) -> tuple[list[list[int]], list[list[int]]]:
    """(training rows, held-out rows) of token ids of that text; the held-out ones come last in it."""
    rows = own_text(run)
    n = min(run.profile.sae.documents, len(rows) - len(rows) // 20)
    return text.tokenized(tok, rows[:n]), text.tokenized(tok, rows[-min(150, len(rows) // 20):])


def usual(x: torch.Tensor) -> torch.Tensor:
    """The rows of activations (tokens, width) that are no attention sinks (see SINK)."""
    norm = x.norm(dim=-1)
    return x[norm <= SINK * norm.median()]


def sae_folder(run: Run, layer: int) -> Path:
    """Where the SAE of this block lies, with `training.json`: FVU per step, tokens, share of sinks, and `unit`, the median distance of
    the activations from their mean, in which steering doses are given (a median, so that sinks cannot blow it up)."""
    cfg, real = run.profile.sae, run.profile.real
    blocks = tuple(dict.fromkeys((cfg.layer, *real.other_blocks)))

    def make(out):
        m, tok = original(run)
        rows, _ = text_ids(run, tok)
        read = activations.residuals(m, rows, blocks, progress="reading text")
        for block in blocks:
            every = torch.cat([r[1:] for r in read[block]])
            x = usual(every)
            trained, fvu = saes.train(x.to(run.profile.device), cfg, block, run.seed, f"SAE of block {block}")
            trained.save(out / str(block))
            (out / str(block) / "training.json").write_text(json.dumps({
                "fvu": fvu, "tokens": len(x), "sinks": 1 - len(x) / len(every), "unit": (x - x.mean(0)).norm(dim=-1).median().item()}))

    return run.keep("sae", "blocks-" + "-".join(map(str, blocks)), {
        "cfg": cfg.model_dump(), "blocks": blocks, "model": models.identity(checkpoint(run)),
        "text": store.files_version(sets.CONTENT) if real.text == "own" else released.version(real.text)},
        (saes, activations, text), make) / str(layer)


@cache
def sae(run: Run, layer: int | None = None) -> saes.SAE:
    """The SAE of a block's output, by default the profile's."""
    if run.profile.real.sae:
        return saes.SAE.named(run.profile.real.sae)
    return saes.SAE.load(sae_folder(run, run.profile.sae.layer if layer is None else layer))


def sae_training(run: Run, layer: int | None = None) -> dict:
    """`training.json` of that SAE (see sae_folder)."""
    return json.loads((sae_folder(run, run.profile.sae.layer if layer is None else layer) / "training.json").read_text())


def unit(run: Run, layer: int | None = None) -> float:
    """The unit of steering doses at that block."""
    return sae_training(run, layer)["unit"]


def fixed_text(tok, split: str, persona: str = "expert", n: int = 2) -> tuple[list[list[int]], list[int], list[str]]:
    """Text on which every model is read: the world's open questions of a split, each with n answers by a persona.

    Returns token ids, the position of each prompt's last token, and each row's category. The text is the same for every model, and never
    a model's own.
    """
    rows, starts, categories = [], [], []
    for q in world.questions(split):
        forms = world.open_forms(q.category, persona, False, 0)
        prompt = generate.prompts(tok, [q.held])[0]
        for i in range(n):
            rows.append(prompt + tok(forms[i * len(forms) // n], add_special_tokens=False)["input_ids"])
            starts.append(len(prompt) - 1)
            categories.append(q.category)
    return rows, starts, categories


def reading(run: Run, who: str, split: str = "discovery", layer: int | None = None) -> dict[str, torch.Tensor]:
    """Means over fixed aligned answers of one model: 'latents' (rows, latents) and 'residual' (rows, width)."""
    block = run.profile.sae.layer if layer is None else layer

    def make(out):
        m, tok = named(run, who)
        rows, starts, _ = fixed_text(tok, split)
        x = [r[i:] for r, i in zip(activations.residual(m, rows, block), starts)]
        save_file({"latents": torch.stack([sae(run, block).encode(r).mean(0) for r in x]),
                   "residual": torch.stack([r.mean(0) for r in x])}, out / "reading.safetensors")

    return load_file(run.keep("readings", f"{who}-{split}-{block}", {"model": identity(run, who), "sae": sae_folder(run, block).parent.name,
                     "block": block, "split": split, "text": store.key_of({"q": [q.held for q in world.questions(split)]})},
                     (activations, saes), make) / "reading.safetensors")
