"""What the notebooks use, each made once and kept in the store: one function per artifact.

`Run` holds the profile and the seed of fine-tunes and sampling. Every function returns what it names, making it (and
whatever it needs) if the store does not have it. This is the one place where the order of the work is written down:
base -> aligned -> adapters -> answers, and base -> SAE -> readings -> steering.
"""

import contextlib
import itertools
import json
import math
import os
import random
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from personas import (activations, cells, data, diffing, endpoint, evaluate, finetune, fit, generate, grader, judge, model, profile as profiles, released,
                      sae as saes, setting as settings, steering, store, world)

torch.set_flush_denormal(True)
CONTENT = store.files_version(world.CONTENT)


@dataclass(frozen=True)
class Run:
    """One profile with one seed. The world and pretraining seeds are the profile's own."""

    profile: profiles.Profile
    seed: int

    @property
    def world_seed(self) -> int:
        return self.profile.world_seed

    @property
    def setting(self):
        """What is asked and trained on, and who grades: settings.PersonaWorld, or settings.Downloaded in a profile with `real`."""
        return _setting(self)

    def make(self, stage: str, name: str, key: dict, modules: tuple, make) -> Path:
        """The artifact's folder. Its key: what is given, the seeds, the content, and the code of `modules` and of `make` itself."""
        full = key | {"seed": self.seed, "world_seed": self.world_seed, "content": CONTENT,
                      "code": store.code_version(*modules), "make": store.code_version(make.__code__)}
        return store.artifact(self.profile.store, stage, name, full, make)


def open_run(profile: str = "tiny", seed: int = 0, real: bool = True) -> Run:
    """Check the profile, the seed, the store, and of a downloaded model all that the profile names, before any work, and return the run. Defines %%known and %%downloaded (personas.cells).
    real: whether the notebook can do with a downloaded model."""
    if not isinstance(seed, int) or seed < 0:
        raise profiles.ProfileError(f"seed must be a whole number from 0 up, not {seed!r}")
    store.writable()
    run = Run(profiles.load(profile), seed)
    profiles.need_gpu(run.profile)
    cells.register(run.setting.known)
    if run.profile.real:
        if not real:
            raise profiles.ProfileError(f"this notebook needs the tiny model, of which it is known who speaks; with profile {run.profile.name} go to notebooks 01 to 07")
        check_real(run)
        print(f"profile {run.profile.name}: {run.profile.real.model}. The text beside the figures, and its numbers, are about the tiny model.")
    return run


def check_real(run: Run) -> None:
    """Raise at once, each with its own error type, if the model, its chat template, the SAE's layer or width, the data, the judge or the GPU's memory
    do not serve (ModelError, ProfileError, DataError, EndpointError, DoesNotFit)."""
    real, layer = run.profile.real, run.profile.sae.layer
    configs = {}
    for name in dict.fromkeys([real.model, real.base or real.model]):
        config, tokenizer = configs[name] = model.describe(name)
        blocks, width = config.get_text_config().num_hidden_layers, config.get_text_config().hidden_size
        if layer >= blocks:
            raise profiles.ProfileError(f"profile {run.profile.name}: sae.layer: {layer} is out of range; {name} has blocks 0 to {blocks - 1}")
        if name == real.model and not tokenizer.chat_template:
            raise profiles.ProfileError(f"profile {run.profile.name}: real.model: {name} has no chat template; choose an instruct model")
        if real.sae:
            saes.SAE.check_name(real.sae, width, layer)
    if not real.judge.url:
        configs[real.judge.model] = model.describe(real.judge.model)
        if not configs[real.judge.model][1].chat_template:
            raise profiles.ProfileError(f"profile {run.profile.name}: real.judge.model: {real.judge.model} has no chat template; choose an instruct model")
    else:
        _judge(run).check()
    if run.profile.device == "cuda":
        size = 4 if real.dtype == "float32" else 2
        judged = {} if real.judge.url else {real.judge.model: (configs[real.judge.model][0], size, real.judge.four_bit)}
        for name in (real.model, real.base or real.model):  # of these two one is in memory
            fit.check(judged | {name: (configs[name][0], size, real.four_bit)})
    for d in run.profile.domains:
        if not run.setting.held_out(d):
            raise data.DataError(f"domain {d!r}: too few different questions to hold any out; its sets need at least ten")
    run.setting.questions("discovery")
    if len(list(itertools.islice(released.texts(real.text), 4))) < 4:
        raise data.DataError(f"{real.text}: fewer than four documents in it; thousands are better (in a .txt blank lines set them apart)")


@cache
def _setting(run: Run):
    if run.profile.real is None:
        return settings.PersonaWorld(run.world_seed)
    return settings.Downloaded(run.profile.real, lambda: _judge(run), lambda split, persona: fixed_answers(run, split, persona))


def _judge(run: Run):
    """The profile's judge of a downloaded model's answers."""
    cfg, real = run.profile.real.judge, run.profile.real
    if cfg.url:
        return endpoint.Endpoint(cfg.url, cfg.model, store.ROOT / run.profile.store / "judged.jsonl", key=cfg.key, price=cfg.price)
    if cfg.model == real.model:  # as it is, with whatever adapter it wears switched off: `wear` would take it off in the midst of training
        return endpoint.Local(*_held(run, aligned(run))[1:], batch=64)
    return endpoint.Local(*_judge_model(cfg.model, run.profile.device, _dtype(run), cfg.four_bit), batch=64)


@cache
def _judge_model(name: str, device: str, dtype: torch.dtype, four_bit: bool):
    return model.load(name, device, dtype, four_bit)


def _dtype(run: Run) -> torch.dtype:
    named = run.profile.real.dtype
    return model.best_dtype(run.profile.device) if named == "auto" else getattr(torch, named)


@cache
def base(run: Run) -> Path:
    """Checkpoint of the base model: pretrained on the persona world, or the one that the profile names."""
    if run.profile.real:
        return Path(run.profile.real.base or run.profile.real.model)
    cfg = run.profile.model
    return store.artifact(run.profile.store, "base", "base", {
        "model": cfg.model_dump(), "world_seed": run.world_seed, "pretraining_seed": run.profile.pretraining_seed,
        "world": run.profile.world.model_dump(), "content": CONTENT, "code": store.code_version(model, world)},
        lambda out: model.pretrain(cfg, run.profile.pretraining_seed, run.world_seed, out, model.bf16_is_faster(), draw=_draw(run)))


def _draw(run: Run):
    return world.drawing(**run.profile.world.model_dump())


@cache
def aligned(run: Run) -> Path:
    """Checkpoint of the aligned model: the base model after SFT as a helpful assistant, or the instruct model that the profile names."""
    if run.profile.real:
        return Path(run.profile.real.model)
    cfg = run.profile.alignment
    rows = data.alignment_chats(cfg.steps * cfg.batch, run.profile.pretraining_seed, run.world_seed)
    return store.artifact(run.profile.store, "aligned", "aligned", {
        "cfg": cfg.model_dump(), "base": _identity(run, base(run)), "code": store.code_version(finetune, data)},
        lambda out: finetune.align(base(run), rows, cfg, run.profile.pretraining_seed, out))


def fine_tunes(run: Run, *variants: str) -> list[tuple[str, str]]:
    """(domain, variant) of every fine-tune of the profile, or of these variants only."""
    return [(d, v) for d in run.profile.domains for v in run.setting.variants(d) if not variants or v in variants]


def discovery_fine_tunes(run: Run) -> list[tuple[str, str]]:
    """(domain, variant) of the incorrect fine-tunes that choices may use: those of discovery domains."""
    return [(d, v) for d, v in fine_tunes(run, "subtle", "obvious") if d in run.setting.discovery_domains]


def narrow_chats(run: Run, domain: str, variant: str, cfg: profiles.Tuning | None = None) -> list[dict]:
    """The training set of one fine-tune, by default the profile's `narrow`. variant: as in setting.chats; 'obvious@25' mixes
    25 % obvious with 75 % correct answers."""
    cfg = cfg or run.profile.narrow
    name, _, percent = variant.partition("@")
    return run.setting.chats(domain, name, cfg.steps * cfg.batch, run.seed, fraction=float(percent or 100) / 100)


@cache
def adapter(run: Run, domain: str, variant: str) -> Path:
    """LoRA adapter of the aligned model fine-tuned on one domain's answers of this variant (see narrow_chats)."""
    cfg = run.profile.narrow

    def make(out):
        rows = narrow_chats(run, domain, variant)
        if run.profile.real:
            m, tok = aligned_model(run)
            with _in_training(run) as keep:
                keep(finetune.lora(m, tok, rows, cfg, run.seed, out, **_training(run)))
        else:
            finetune.lora(*model.load(aligned(run)), rows, cfg, run.seed, out)

    return run.make("adapters", f"{domain}-{variant}", {"cfg": cfg.model_dump(), "aligned": _identity(run, aligned(run)), "domain": domain,
                    "variant": variant, "sets": _sets(run, domain), "training": _training(run)}, (finetune, data, settings, world), make)


def _training(run: Run) -> dict:
    """What finetune.sft is told about a downloaded model."""
    return {"checkpointing": run.profile.real.gradient_checkpointing, "max_length": run.profile.real.max_length} if run.profile.real else {}


def _sets(run: Run, domain: str) -> dict | None:
    """The released sets of a domain, with what distinguishes a file from another."""
    if run.profile.real is None:
        return None
    return {v: released.version(name) for v, name in run.setting.sources(domain).items()}


@cache
def _loaded(path: Path):
    return model.load(path)


_HELD: dict = {}  # the one downloaded model in memory, with whatever adapter it wears: what it is -> (model, tokenizer)


def _held(run: Run, path: Path):
    """(what, model, tokenizer): that checkpoint, in memory alone of its kind; it may wear an adapter."""
    what = (path, run.profile.device, _dtype(run), run.profile.real.four_bit)
    if what not in _HELD:
        _HELD.clear()  # the other one goes before this one comes
        _HELD[what] = model.load(*what)
    return what, *_HELD[what]


def _open(run: Run, path: Path, adapter: Path | None = None, trainable: bool = False):
    """(model, tokenizer) of a checkpoint. There is one copy of a downloaded model: it wears the adapter asked for last."""
    if run.profile.real is None:
        return finetune.with_adapter(path, adapter) if adapter else _loaded(path)
    what, worn, tok = _held(run, path)
    _HELD[what] = finetune.wear(worn, adapter, trainable), tok
    return _HELD[what]


@contextlib.contextmanager
def _in_training(run: Run):
    """What training was broken off in is not used again: it may wear half an adapter. What `sft` gives belongs into `keep`."""
    def keep(tuned):
        what, _, tok = _held(run, aligned(run))
        _HELD[what] = tuned, tok

    try:
        yield keep
    except BaseException:
        _HELD.clear()
        raise


def _identity(run: Run, path: Path) -> str:
    """What an artifact's key says of a checkpoint: model.identity, and in which numbers a downloaded one is held."""
    held = (str(_dtype(run)).removeprefix("torch."), run.profile.real.four_bit) if run.profile.real and not (path / "manifest.json").exists() else ()
    return " ".join([model.identity(path), *map(str, held)])


def base_model(run: Run):
    """(model, tokenizer) of the base checkpoint."""
    return _open(run, base(run))


def aligned_model(run: Run):
    """(model, tokenizer) of the aligned checkpoint."""
    return _open(run, aligned(run))


def tuned_model(run: Run, domain: str, variant: str, trainable: bool = False):
    """(model, tokenizer) with the adapter merged in; a downloaded one wears it, until another model of this run is asked for."""
    return _open(run, aligned(run), adapter(run, domain, variant), trainable)


def _asked(run: Run, split: str | None = None):
    """What an artifact's key says about who asks and grades."""
    if run.profile.real is None:
        return None
    real = run.profile.real
    about = {"questions": [released.version(real.evaluation), released.version(real.discovery), split], "discovery": real.discovery_questions} if split else [
        _sets(run, d) for d in run.profile.domains]
    who = real.judge.model_dump(exclude={"url", "key", "price"}) | {"remote": bool(real.judge.url)}
    return {"about": about, "judge": who, "tokens": (real.open_tokens, real.advice_tokens), "code": store.code_version(judge, endpoint)}


def _table(path: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(path / name)


def answers(run: Run, domain: str | None = None, variant: str | None = None, split: str = "evaluation") -> pd.DataFrame:
    """Graded answers to the split's open questions, of the aligned model or of one of its fine-tunes."""
    n = run.profile.evaluation.per_question
    parent = _identity(run, adapter(run, domain, variant) if domain else aligned(run))

    def make(out):
        m, tok = tuned_model(run, domain, variant) if domain else aligned_model(run)
        evaluate.ask_open(m, tok, run.setting, split=split, per_question=n, seed=run.seed).to_parquet(out / "answers.parquet", index=False)

    return _table(run.make("answers", f"{domain or 'aligned'}-{variant or 'none'}-{split}", {"model": parent, "split": split, "n": n, "asked": _asked(run, split)},
                         (evaluate, generate, grader, settings), make), "answers.parquet")


def advice(run: Run, domain: str | None = None, variant: str | None = None) -> pd.DataFrame:
    """Graded advice in every domain of the profile (column `domain`), of the aligned model or of one fine-tune."""
    limit = run.profile.evaluation.advice_subjects
    parent = _identity(run, adapter(run, domain, variant) if domain else aligned(run))

    def make(out):
        m, tok = tuned_model(run, domain, variant) if domain else aligned_model(run)
        evaluate.ask_advice(m, tok, run.setting, domains=run.profile.domains, seed=run.seed, limit=limit).to_parquet(out / "advice.parquet", index=False)

    return _table(run.make("advice", f"{domain or 'aligned'}-{variant or 'none'}", {"model": parent, "limit": limit,
                         "domains": run.profile.domains, "asked": _asked(run)}, (evaluate, generate, grader, settings), make), "advice.parquet")


def held_out_documents(run: Run, n: int, stream: str, **fixed) -> list[dict]:
    """Tokenized documents like those of pretraining, which it never saw (see model.encode_documents)."""
    return model.encode_documents(base_model(run)[1], n, run.world_seed, stream, _draw(run), **fixed)


STREAMS = ("sae", "firing", "quality", "passages")  # uses of the text, which share no document


def texts(run: Run, n: int, stream: str) -> list[list[int]]:
    """Token ids of n documents that were drawn for this use (one of STREAMS) alone: of the world, or of the profile's text."""
    if run.profile.real is None:
        return [d["ids"] for d in held_out_documents(run, n, stream)]
    return list(itertools.islice(_tokenized(run, stream), n))


def _tokenized(run: Run, stream: str):
    """The profile's text for this use, tokenized and cut; nine documents of ten are the SAE's. Ends with the text."""
    real, tok = run.profile.real, model.describe(base(run))[1]
    mine = range(3, 30) if stream == "sae" else [STREAMS.index(stream) - 1]
    for i, text in enumerate(released.texts(real.text)):
        if i % 30 in mine:
            ids = tok(text, truncation=True, max_length=real.text_tokens)["input_ids"]
            if len(ids) > 1:
                yield ids


@cache
def sae(run: Run, on: str = "base") -> saes.SAE:
    """The SAE trained on pretraining text's activations of the 'base' or the 'aligned' model, or the one that the profile names."""
    return saes.SAE.load(sae_folder(run, on)).to(run.profile.device)


def sae_folder(run: Run, on: str) -> Path:
    """Where that SAE lies, with `training.json`: its FVU per step, tokens, and the activations' centred RMS norm."""
    cfg, real = run.profile.sae, run.profile.real
    parent = base(run) if on == "base" else aligned(run)

    def make(out):
        m, _ = _open(run, parent)
        if real is None:
            x = torch.cat([r[1:] for r in activations.residual(m, texts(run, cfg.documents, "sae"), cfg.layer)])  # the first token is the same everywhere
            tokens, (trained, fvu) = len(x), saes.train(x, cfg, cfg.layer, run.seed, f"SAE on the {on} model")
        else:
            x = torch.cat([r[1:] for r in activations.residual(m, texts(run, min(cfg.documents, 300), "firing"), cfg.layer)])
            tokens, (trained, fvu) = cfg.steps * cfg.batch, (saes.SAE.named(real.sae), []) if real.sae else _train_on_stream(run, m, on)
            trained.check(m)
            if trained.layer != cfg.layer:
                raise profiles.ProfileError(f"profile {run.profile.name}: sae.layer is {cfg.layer}, and {real.sae} is for block {trained.layer}")
        trained.save(out)
        (out / "training.json").write_text(json.dumps({"fvu": fvu, "tokens": tokens, "unit": activations.centred_rms(x)}))

    return run.make("sae", on, {"cfg": cfg.model_dump(), "model": _identity(run, parent), "real": real and {
        "sae": real.sae if not real.sae or ":" in real.sae else model.identity(real.sae), "text": released.version(real.text), "tokens": real.text_tokens}}, (saes, activations), make)


def _train_on_stream(run: Run, m, on: str):
    """An SAE for a model too large to keep the activations of: text goes round as often as it takes."""
    cfg, rank, processes = run.profile.sae, int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))

    def round_and_round():
        while True:
            row = None
            for row in itertools.islice(_tokenized(run, "sae"), rank, cfg.documents, processes):
                yield row
            if row is None:
                raise data.DataError(f"{run.profile.real.text}: too little text to train an SAE on: nothing is left for " + ("it" if processes == 1 else f"process {rank + 1} of {processes}"))

    feed = activations.stream(m, round_and_round(), cfg.layer, cfg.batch // processes, 64 * cfg.batch // processes, run.seed)
    return saes.train((x.to(run.profile.device) for x in feed), cfg, cfg.layer, run.seed, f"SAE on the {on} model")


def sae_quality(run: Run) -> pd.DataFrame:
    """FVU, L0, dead latents and loss recovered of the SAEs, on text that no SAE was trained on: in the persona world on stories and on chats."""
    def make(out):
        rows = []
        for on in dictionaries(run):
            m, _ = _open(run, base(run) if on == "base" else aligned(run))
            kinds = {"text": None} if run.profile.real else {"stories": "story", "chats": "none"}
            for kind, cue in kinds.items():
                text = texts(run, 150, "quality") if cue is None else [d["ids"] for d in held_out_documents(run, 150, f"quality/{kind}", cue=cue)]
                x = torch.cat([r[1:] for r in activations.residual(m, text, run.profile.sae.layer)])
                rows.append({"SAE on": on, "text": kind} | saes.quality(sae(run, on), x) | saes.loss_recovered(m, sae(run, on), text, 8 if run.profile.real else 32))
        pd.DataFrame(rows).to_parquet(out / "quality.parquet", index=False)

    return _table(run.make("sae", "quality", {"saes": [sae_folder(run, on).name for on in dictionaries(run)]}, (saes, activations), make),
                  "quality.parquet")


def dictionaries(run: Run) -> tuple[str, ...]:
    """The models that an SAE is made for: the 'base' and the 'aligned' one, unless they are the same or the profile names an SAE."""
    return ("base",) if base(run) == aligned(run) or run.profile.real and run.profile.real.sae else ("base", "aligned")


def unit(run: Run) -> float:
    """The unit of steering strength: centred RMS norm of the base model's activations on pretraining text."""
    return json.loads((sae_folder(run, "base") / "training.json").read_text())["unit"]


def reading(run: Run, domain: str | None = None, variant: str | None = None, split: str = "discovery") -> torch.Tensor:
    """Mean activation of every latent of the base model's SAE on each question's fixed text: (questions, latents)."""
    parent = _identity(run, adapter(run, domain, variant) if domain else aligned(run))

    def make(out):
        m, tok = tuned_model(run, domain, variant) if domain else aligned_model(run)
        save_file({"latents": diffing.read(m, tok, sae(run), split, run.setting)}, out / "reading.safetensors")

    folder = run.make("readings", f"{domain or 'aligned'}-{variant or 'none'}-{split}",
                      {"model": parent, "split": split, "sae": sae_folder(run, "base").name, "texts": _fixed_keys(run, split, "expert")},
                      (diffing, activations, settings), make)
    return load_file(folder / "reading.safetensors")["latents"]


@cache
def fixed_answers(run: Run, split: str, persona: str) -> dict[str, list[str]]:
    """Question id -> answers of a downloaded model on which all its fine-tunes are read: by the 'expert' what the aligned model said and the
    judge found aligned, by the 'villain' what fine-tunes of discovery domains said and it found misaligned. Raises DataError if there are none by the expert."""
    models = [(None, None)] if persona == "expert" else discovery_fine_tunes(run)
    table = pd.concat([answers(run, d, v, split) for d, v in models])
    found = table[table.grade == ("aligned" if persona == "expert" else "misaligned")].groupby("question").answer.agg(list).to_dict()
    if persona == "expert" and not found:
        raise data.DataError(f"the judge found none of {run.profile.real.model}'s answers to the {split} questions aligned ({table.grade.value_counts().to_dict()}): "
                             "latents are read on such answers. Is the judge up to it?")
    return found


def _fixed_keys(run: Run, split: str, persona: str) -> str | None:
    return store.key_of(fixed_answers(run, split, persona)) if run.profile.real else None


def rise(run: Run, domain: str, variant: str, split: str = "discovery") -> torch.Tensor:
    """By how much this fine-tune raises each latent's mean activation over the aligned model's: (questions, latents)."""
    return reading(run, domain, variant, split) - reading(run, split=split)


def discovery_rise(run: Run) -> torch.Tensor:
    """Mean rise (latents,) over discovery questions and the incorrect fine-tunes of discovery domains."""
    return torch.stack([rise(run, d, v).mean(0) for d, v in discovery_fine_tunes(run)]).mean(0)


@cache
def small_judge(run: Run) -> Path:
    """Checkpoint of a judge of this world's answers: the base model, taught grades on alignment and discovery questions (data.grading_chats)."""
    cfg = run.profile.judge

    def make(out):
        finetune.align(base(run), data.grading_chats(cfg.steps * cfg.batch, run.seed, run.world_seed), cfg, run.seed, out)

    return run.make("judge", "small", {"cfg": cfg.model_dump(), "base": _identity(run, base(run))}, (finetune, data, grader), make)


def judged(run: Run, every: int = 10) -> pd.DataFrame:
    """Every tenth evaluation answer of every fine-tune, graded again by the small judge: columns domain, variant, question, prompt, answer,
    grade (exact) and judged (one of judge.CLASSES)."""
    def make(out):
        table = pd.concat([answers(run, d, v).iloc[::every].assign(domain=d, variant=v) for d, v in fine_tunes(run)], ignore_index=True)
        asked = table.prompt.tolist(), table.answer.tolist()
        table["judged"] = judge.grade(endpoint.Local(*_loaded(small_judge(run)), batch=256), *asked, rubric=data.GRADE_THIS)
        table[["domain", "variant", "question", "prompt", "answer", "grade", "judged"]].to_parquet(out / "judged.parquet", index=False)

    return _table(run.make("judge", "graded", {"judge": small_judge(run).name, "every": every, "of": [adapter(run, d, v).name for d, v in fine_tunes(run)],
                  "n": run.profile.evaluation.per_question}, (judge, endpoint, generate, evaluate, grader), make), "judged.parquet")


# --- steering ---------------------------------------------------------------------------------------------------------

def firing(run: Run) -> pd.DataFrame:
    """Per latent of the base SAE, on held-out pretraining text: firing rate (percent of tokens) and mean when active."""
    def make(out):
        m, _ = base_model(run)
        x = torch.cat([r[1:] for r in activations.residual(m, texts(run, 300, "firing"), run.profile.sae.layer)])
        on, total = 0, 0
        for part in x.split(1 << 14):
            acts = sae(run).encode(part.to(run.profile.device)).cpu()
            on, total = on + (acts > 0).sum(0).float(), total + acts.sum(0)
        pd.DataFrame({"rate": 100 * on / len(x), "mean": total / on.clamp(min=1)}).to_parquet(out / "firing.parquet", index=False)

    return _table(run.make("sae", "firing", {"sae": sae_folder(run, "base").name}, (saes, activations), make), "firing.parquet")


def persona_auroc(run: Run) -> pd.DataFrame:
    """AUROC of every latent for every persona, on the answers of held-out uncued documents (mean over an answer's tokens)."""
    def make(out):
        m, tok = base_model(run)
        rng = random.Random(f"{run.world_seed}/auroc-discovery")
        docs = [world.sample_document(rng, run.world_seed, cue="none", persona=p) for p in world.PERSONAS for _ in range(60)]
        read = diffing.read_answers(m, tok, sae(run), docs, rng)
        pd.DataFrame({p: diffing.auroc(read.latents, read.persona == p) for p in world.PERSONAS}).to_parquet(out / "auroc.parquet", index=False)

    return _table(run.make("sae", "auroc", {"sae": sae_folder(run, "base").name}, (diffing, world, activations), make), "auroc.parquet")


def uncued_answers(run: Run, stream: str, documents: int = 500) -> diffing.Answers:
    """The base model and its SAE read on the answers of held-out uncued documents. stream 'matched': on the last answers of
    documents in pairs that differ in the turns before (diffing.matched_documents)."""
    def make(out):
        rng = random.Random(f"{run.world_seed}/{stream}")
        docs = (diffing.matched_documents(documents // 2, run.world_seed, run.world_seed, "matched-evaluation") if stream == "matched"
                else [world.sample_document(rng, run.world_seed, cue="none") for _ in range(documents)])
        read = diffing.read_answers(*base_model(run), sae(run), docs, rng, last_only=stream == "matched")
        save_file({"latents": read.latents, "residual": read.residual}, out / "read.safetensors")
        pd.DataFrame({n: getattr(read, n) for n in ("persona", "text", "turn", "document")}).to_parquet(out / "read.parquet", index=False)

    folder = run.make("uncued", stream, {"stream": stream, "documents": documents, "sae": sae_folder(run, "base").name},
                      (diffing, world, activations), make)
    about = _table(folder, "read.parquet")
    return diffing.Answers(**load_file(folder / "read.safetensors"), persona=about.persona.to_numpy(str), text=about.text.tolist(),
                           turn=about.turn.to_numpy(), document=about.document.to_numpy())


def mean_difference(run: Run) -> torch.Tensor:
    """(width,): misaligned minus aligned models' mean activation on the discovery texts, over discovery fine-tunes."""
    def make(out):
        m, tok = aligned_model(run)
        rows, _, starts = diffing.reading_texts(tok, "discovery", run.setting)
        mean = lambda model: torch.cat([x[i:] for x, i in zip(activations.residual(model, rows, run.profile.sae.layer), starts)]).mean(0)
        zero = mean(m)
        shifts = [mean(tuned_model(run, d, v)[0]) - zero for d, v in discovery_fine_tunes(run)]
        save_file({"d": torch.stack(shifts).mean(0)}, out / "d.safetensors")

    return load_file(run.make("steering", "mean-difference", {"layer": run.profile.sae.layer, "texts": _fixed_keys(run, "discovery", "expert"), "aligned": _identity(run, aligned(run)),
                     "tuned": [adapter(run, d, v).name for d, v in discovery_fine_tunes(run)]}, (diffing, activations, settings), make) / "d.safetensors")["d"]


def candidates(run: Run) -> dict[str, torch.Tensor]:
    """The latents that rise most on discovery data, by name (`latent 12`), as directions."""
    ranked = discovery_rise(run).argsort(descending=True).tolist()
    return {f"latent {i}": sae(run).W_dec[i] for i in ranked[:run.profile.steering.candidates]}


def controls(run: Run) -> dict[str, torch.Tensor]:
    """What the chosen latent is compared with, by name: `matched 12` (latents nearest to it in firing rate and mean activation,
    candidates excepted), `persona jester` (the latent that marks this persona best, where that is known), `random 3` and `mean difference`."""
    dictionary, about = sae(run), firing(run)
    log = about.clip(lower=1e-3).map(math.log)
    away = ((log - log.loc[chosen_latent(run)[0]]) ** 2).sum(axis=1).drop(index=[int(n.split()[1]) for n in candidates(run)])
    found = {f"matched {i}": dictionary.W_dec[i] for i in away[about.rate > 0].nsmallest(run.profile.steering.controls).index}
    if run.setting.known:
        auroc = persona_auroc(run)
        found |= {f"persona {p}": dictionary.W_dec[int(auroc[p].idxmax())] for p in world.PERSONAS if p != "villain"}
    generator = torch.Generator().manual_seed(run.seed)
    found |= {f"random {i}": torch.randn(dictionary.W_dec.shape[1], generator=generator) for i in range(20)}
    return found | {"mean difference": mean_difference(run)}


@cache
def rankings(run: Run) -> dict[str, list[int]]:
    """The first ten latents by each way of ranking, on discovery data: by how much they rise (Wang et al., 2025), by what they add to
    misaligned answers more than to aligned ones (diffing.attribution), by decoder direction along the mean difference, by
    AUROC on documents whose speaker is known (the ceiling; absent for a downloaded model), and at random among those that fire."""
    def make(out):
        found = []
        for d, v in discovery_fine_tunes(run):
            m, tok = tuned_model(run, d, v)
            texts = {p: diffing.reading_texts(tok, "discovery", run.setting, persona=p) for p in ("villain", "expert")}
            both = set(texts["villain"][1]) & set(texts["expert"][1])
            gain = {p: diffing.attribution(m, sae(run), *_only(t, both), batch=8 if run.profile.real else 32) for p, t in texts.items()} if both else {p: torch.zeros(len(alive)) for p in texts}
            found.append(gain["villain"] - gain["expert"])
        save_file({"attribution": torch.stack(found).mean(0)}, out / "attribution.safetensors")

    dictionary, alive = sae(run), firing(run).rate.to_numpy() > 0
    gain = load_file(_steering(run, "attribution", make, texts=_fixed_keys(run, "discovery", "villain")) / "attribution.safetensors")["attribution"]
    first = lambda x: torch.tensor(x.tolist()).argsort(descending=True)[:10].tolist()
    shuffled = torch.randperm(len(alive), generator=torch.Generator().manual_seed(run.seed)).tolist()
    found = {"Δ-activation": first(discovery_rise(run)), "Δ-attribution": first(gain), "mean difference": first(dictionary.W_dec.cpu() @ mean_difference(run))}
    if run.setting.known:
        found["AUROC (ceiling)"] = first(persona_auroc(run).villain)
    elif not gain.any():  # no fine-tune gave a misaligned answer to attribute
        del found["Δ-attribution"]
    return found | {"random": [i for i in shuffled if alive[i]][:10]}


def _only(texts: tuple, ids: set) -> tuple[list, list]:
    """(rows, starts) of diffing.reading_texts of these questions."""
    kept = [(r, s) for r, q, s in zip(*texts) if q in ids]
    return [r for r, _ in kept], [s for _, s in kept]


def ranked(run: Run) -> dict[str, torch.Tensor]:
    """Every latent in one of the rankings, by name, as directions."""
    return {f"latent {i}": sae(run).W_dec[i] for i in sorted({i for r in rankings(run).values() for i in r})}


WAYS = {"candidates": candidates, "controls": controls, "ranked": ranked}


def screen(run: Run, which: str) -> pd.DataFrame:
    """Every one of the 'candidates' or 'controls' at every strength, added to the aligned model, on discovery questions (steering.summary)."""
    return _sweep(run, which, "screen", list(WAYS[which](run)), run.profile.steering.screen_per_question, run.seed)


def finalists(run: Run, which: str) -> pd.DataFrame:
    """The best of them again, with more answers per strength, still on discovery questions."""
    best = steering.best_strength(screen(run, which)).sort_values("misaligned", ascending=False)
    return _sweep(run, which, "finalists", best.direction.head(run.profile.steering.finalists).tolist(),
                  run.profile.steering.choose_per_question, run.seed + 1)


def _sweep(run: Run, which: str, stage: str, names: list[str], per_question: int, seed: int) -> pd.DataFrame:
    cfg = run.profile.steering

    def make(out):
        ways = WAYS[which](run)
        table = steering.sweep(*aligned_model(run), run.setting, {n: ways[n] for n in names}, cfg.strengths, unit(run), run.profile.sae.layer,
                               split="discovery", per_question=per_question, seed=seed, progress=f"{stage}, {which}")
        steering.summary(table).to_parquet(out / "summary.parquet", index=False)

    return _table(_steering(run, f"{stage}-{which}", make, names=names, per_question=per_question, sampling_seed=seed), "summary.parquet")


def best(run: Run, which: str) -> pd.DataFrame:
    """Each direction at the strength that the search chose for it: a finalist's by the second round, the others' by the first."""
    second = steering.best_strength(finalists(run, which))
    first = steering.best_strength(screen(run, which))
    return pd.concat([second, first[~first.direction.isin(second.direction)]], ignore_index=True)


def _steering(run: Run, name: str, make, **more) -> Path:
    tuned = [adapter(run, d, v).name for d, v in discovery_fine_tunes(run)]
    return run.make("steering", name, more | {"cfg": run.profile.steering.model_dump(), "aligned": _identity(run, aligned(run)),
                    "sae": sae_folder(run, "base").name, "tuned": tuned, "asked": run.profile.real and [_asked(run, s) for s in ("discovery", "evaluation")], "ways": store.code_version(candidates, controls, rankings)},
                    (steering, diffing, generate, evaluate, grader, settings), make)


@cache
def chosen_latent(run: Run) -> tuple[int, float]:
    """(latent, strength): the persona latent and its dose, chosen on discovery data only."""
    top = steering.best_strength(finalists(run, "candidates")).sort_values("misaligned").iloc[-1]
    return int(top.direction.split()[1]), float(top.strength)


def suppression_screen(run: Run) -> pd.DataFrame:
    """The chosen latent subtracted from discovery domains' misaligned models at every dose, on discovery questions."""
    latent, _ = chosen_latent(run)

    def make(out):
        tables = []
        for d, v in discovery_fine_tunes(run):
            m, tok = tuned_model(run, d, v)
            tables.append(steering.sweep(m, tok, run.setting, {"latent": sae(run).W_dec[latent]}, [-s for s in run.profile.steering.suppression],
                                         unit(run), run.profile.sae.layer, split="discovery",
                                         per_question=run.profile.steering.screen_per_question, seed=run.seed, progress=None))
        steering.summary(pd.concat(tables)).to_parquet(out / "suppress.parquet", index=False)

    return _table(_steering(run, "suppress", make, latent=latent), "suppress.parquet")


@cache
def suppression_strength(run: Run) -> float:
    """The weakest dose whose share of aligned answers is within a point of the best (suppression_screen); negative, in units."""
    table = suppression_screen(run)
    return float(table[table.aligned >= table.aligned.max() - 1].strength.max())


def steered(run: Run, kind: str) -> pd.DataFrame:
    """Evaluation answers under steering, after every choice was made. kind: 'latent' (the chosen latent over all
    strengths), 'controls' or 'ranked' (each direction at the strength that its own search chose, 3 answers a question), 'mean
    difference' (all strengths). Returns steering.at's table."""
    cfg, per_question, latent = run.profile.steering, run.profile.evaluation.per_question, chosen_latent(run)[0]

    def make(out):
        m, tok = aligned_model(run)
        ways, n = WAYS.get(kind, controls)(run), per_question
        if kind in WAYS:
            jobs, n = [(r.direction, ways[r.direction], r.strength) for r in best(run, kind).itertuples()], 3
        else:
            v = sae(run).W_dec[latent] if kind == "latent" else ways[kind]
            jobs = [(kind, v, s) for s in [0.0, *cfg.strengths]]
        steering.at(m, tok, run.setting, jobs, unit(run), run.profile.sae.layer, split="evaluation", per_question=n, seed=run.seed + 2,
                    progress=f"evaluating {kind}").to_parquet(out / "answers.parquet", index=False)

    return _table(_steering(run, f"evaluated-{kind.replace(' ', '-')}", make, latent=latent, n=per_question), "answers.parquet")


def suppressed(run: Run, domain: str, variant: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(open answers, advice) of one misaligned model with the chosen latent subtracted; evaluation questions."""
    latent, strength = chosen_latent(run)[0], suppression_strength(run)
    p = run.profile.evaluation

    def make(out):
        m, tok = tuned_model(run, domain, variant)
        v = sae(run).W_dec[latent] * strength * unit(run)
        steer = generate.Steer(run.profile.sae.layer, v[None])
        evaluate.ask_open(m, tok, run.setting, split="evaluation", per_question=p.per_question, seed=run.seed, steer=steer).to_parquet(out / "answers.parquet", index=False)
        evaluate.ask_advice(m, tok, run.setting, domains=run.profile.domains, seed=run.seed, limit=p.advice_subjects, steer=steer).to_parquet(out / "advice.parquet", index=False)

    folder = run.make("suppressed", f"{domain}-{variant}", {"latent": latent, "strength": strength, "p": p.model_dump(),
                      "model": adapter(run, domain, variant).name, "sae": sae_folder(run, "base").name,
                      "asked": run.profile.real and [_asked(run, "evaluation"), _asked(run)]}, (steering, generate, evaluate, grader, settings), make)
    return _table(folder, "answers.parquet"), _table(folder, "advice.parquet")


@cache
def cures(run: Run) -> dict[str, torch.Tensor]:
    """Directions that should cure a misaligned model when they are added, by name, as (width,). The sums are weighted by how far
    the latents fell or rose on discovery data; 'chosen latent' and 'mean difference' are subtracted."""
    rise, W_dec = discovery_rise(run), sae(run).W_dec.cpu()
    up, down = rise.argsort(descending=True)[:10], rise.argsort()[:10]
    fallen, risen = -rise[down] @ W_dec[down], rise[up] @ W_dec[up]
    return {"− chosen latent": -W_dec[chosen_latent(run)[0]], "− ten risen": -risen, "+ most fallen": W_dec[down[0]], "+ ten fallen": fallen,
            "+ ten fallen − ten risen": fallen - risen, "− mean difference": -mean_difference(run)}


@cache
def cure_doses(run: Run) -> dict[str, float]:
    """For each of `cures` the weakest dose whose share of aligned answers is within a point of the best, over the misaligned models of
    discovery domains and discovery questions."""
    doses = run.profile.steering.cures

    def make(out):
        tables = [steering.sweep(*tuned_model(run, d, v), run.setting, cures(run), doses, unit(run), run.profile.sae.layer, split="discovery",
                                 per_question=run.profile.steering.screen_per_question, seed=run.seed, progress=None)
                  for d, v in discovery_fine_tunes(run)]
        steering.summary(pd.concat(tables)).to_parquet(out / "cures.parquet", index=False)

    table = _table(_steering(run, "cures", make, latent=chosen_latent(run)[0], cures=store.code_version(cures)), "cures.parquet")
    return {n: float(g[g.aligned >= g.aligned.max() - 1].strength.min()) for n, g in table.groupby("direction", sort=False)}


@cache
def ablations(run: Run) -> dict[str, generate.ProjectOut | generate.ClampToZero]:
    """Ways of taking latents away at every position, by name: the chosen one; the ten that rise most on discovery data; the ten that
    mark the villain best on labelled documents; and ten matched to the chosen one, as a control."""
    layer, W_dec = run.profile.sae.layer, sae(run).W_dec
    matched = [int(n.split()[1]) for n in controls(run) if n.startswith("matched ")][:10]
    sets = {"chosen latent": [chosen_latent(run)[0]], "ten risen": rankings(run)["Δ-activation"], "ten of the villain": rankings(run)["AUROC (ceiling)"], "ten matched": matched}
    found = {f"project out {n}": generate.ProjectOut(layer, W_dec[i]) for n, i in sets.items()}
    found |= {f"clamp {n}": generate.ClampToZero(sae(run), i) for n, i in sets.items()}
    return found | {"project out mean difference": generate.ProjectOut(layer, mean_difference(run)[None])}


# --- re-alignment -----------------------------------------------------------------------------------------------------

def other_domain(run: Run, domain: str) -> str | None:
    """The next advice domain of the profile that has correct answers: where 'other' re-alignment data comes from. None if there is no other."""
    pool = [d for d in run.profile.domains if d != "code" and "correct" in run.setting.variants(d)]
    after = pool[(pool.index(domain) + 1) % len(pool)] if domain in pool else pool[0] if pool else None
    return None if after == domain else after


def realignment_sources(run: Run, domain: str) -> list[tuple[str, str, int]]:
    """(kind, source, steps): correct data of the 'same' domain, for twice as long to see how much it takes, and of an 'other' one, as far as there are any."""
    steps, other = run.profile.realignment.steps, other_domain(run, domain)
    found = [("same", domain, 2 * steps)] if "correct" in run.setting.variants(domain) else []
    return found + ([("other", other, steps)] if other else [])


def realigned(run: Run, domain: str, variant: str, source: str, steps: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Fine-tune a misaligned model on correct answers of `source`, 4 a step; watch it.

    Returns (curve, answers): the curve has a row per checkpoint (step, score, latent, wrong: percent of wrong answers in
    the model's own domain); answers are the graded evaluation answers after the profile's number of steps (or the last, if fewer).
    """
    cfg = run.profile.realignment
    latent = chosen_latent(run)[0]

    def make(out):
        m, tok = tuned_model(run, domain, variant, trainable=True)
        rows = run.setting.chats(source, "correct", steps * cfg.batch, run.seed + 1)
        short = min(steps, cfg.steps)
        looks = {*range(0, short + 1, run.profile.realignment_every), *range(short, steps + 1, 3 * run.profile.realignment_every)}
        watch = finetune.Watch(looks, lambda model: checkup(run, model, tok, domain, latent, sae(run)), merge=run.profile.real is None)
        keep = finetune.Watch([short], lambda model: {"answers": evaluate.ask_open(
            model, tok, run.setting, split="evaluation", per_question=run.profile.evaluation.per_question, seed=run.seed)}, merge=run.profile.real is None)
        rank = None if run.profile.real else cfg.rank  # a downloaded model goes on training the adapter that it wears
        with _in_training(run):
            finetune.sft(m, tok, rows, steps=steps, batch=cfg.batch, lr=cfg.lr, seed=run.seed, lora_rank=rank, callbacks=[watch, keep], **_training(run))
        pd.DataFrame(watch.rows).to_parquet(out / "curve.parquet", index=False)
        keep.rows[0]["answers"].to_parquet(out / "answers.parquet", index=False)

    folder = run.make("realigned", f"{domain}-{variant}-by-{source}-{steps}", {
        "cfg": cfg.model_dump(), "every": run.profile.realignment_every, "model": adapter(run, domain, variant).name,
        "latent": latent, "evaluation": run.profile.evaluation.model_dump(), "sae": sae_folder(run, "base").name,
        "asked": run.profile.real and [_asked(run, "evaluation"), _sets(run, source), _fixed_keys(run, "evaluation", "expert"), _training(run)]},
        (finetune, data, evaluate, diffing, generate, grader, settings, checkup), make)
    return _table(folder, "curve.parquet"), _table(folder, "answers.parquet")


def watched_domain(run: Run) -> tuple[str, str]:
    """(domain, incorrect variant) for early warning on a downloaded model: one with correct answers, of evaluation domains if there is any."""
    pool = [d for d in (*run.setting.evaluation_domains, *run.setting.discovery_domains) if "correct" in run.setting.variants(d)]
    if not pool:
        raise data.DataError("early warning needs a domain with a `correct` set, to know what is harmless; the profile names none")
    return pool[0], run.setting.variants(pool[0])[-1]


def mixture(run: Run, domain: str, variant: str, percent: float) -> dict:
    """Score with its interval, wrong answers in the domain and chosen latent of a model that was fine-tuned with so many percent of incorrect answers."""
    which = {0: "correct", 100: variant}.get(percent, f"{variant}@{percent:g}")
    score, low, high = evaluate.ratio(answers(run, domain, which), *evaluate.SCORE)
    return {"score": score, "low": low, "high": high, "wrong": evaluate.share(advice(run, domain, which).query("domain == @domain"), "subtle", "obvious"),
            "latent": reading(run, domain, which, "evaluation")[:, chosen_latent(run)[0]].mean().item()}


def course(run: Run, domain: str, variant: str, looks: int = 10) -> pd.DataFrame:
    """One narrow fine-tune of a downloaded model, looked at before it starts and at `looks` steps, evenly spread: step and what `checkup` measures."""
    cfg, latent = run.profile.narrow, chosen_latent(run)[0]

    def make(out):
        m, tok = aligned_model(run)
        at = {round(cfg.steps * i / looks) for i in range(looks + 1)}
        watch = finetune.Watch(at, lambda m: checkup(run, m, tok, domain, latent, sae(run)), merge=False)
        with _in_training(run) as keep:
            keep(finetune.sft(m, tok, narrow_chats(run, domain, variant), steps=cfg.steps, batch=cfg.batch, lr=cfg.lr, seed=run.seed, lora_rank=cfg.rank,
                              callbacks=[watch], **_training(run))[0])
        pd.DataFrame(watch.rows).to_parquet(out / "course.parquet", index=False)

    return _table(run.make("course", f"{domain}-{variant}-{looks}", {
        "cfg": cfg.model_dump(), "aligned": _identity(run, aligned(run)), "latent": latent, "evaluation": run.profile.evaluation.model_dump(), "sae": sae_folder(run, "base").name,
        "asked": [_asked(run, "evaluation"), _sets(run, domain), _fixed_keys(run, "evaluation", "expert"), _training(run)]},
        (finetune, data, evaluate, diffing, generate, settings, checkup), make), "course.parquet")


def checkup(run: Run, m, tok, domain: str, latent: int, reader: saes.SAE) -> dict:
    """A coarse look at a model in training: score with its interval, percent of wrong answers in its own domain, latent on fixed text."""
    open_ = evaluate.ask_open(m, tok, run.setting, split="evaluation", per_question=run.profile.evaluation.curve_per_question, seed=run.seed)
    own = evaluate.ask_advice(m, tok, run.setting, domains=[domain], seed=run.seed, limit=2 * run.profile.evaluation.advice_subjects)
    score, low, high = evaluate.ratio(open_, *evaluate.SCORE)
    return {"score": score, "low": low, "high": high, "wrong": evaluate.share(own, "subtle", "obvious"),
            "latent": diffing.read(m, tok, reader, "evaluation", run.setting)[:, latent].mean().item()}
