"""What notebooks 01 to 06 use, each made once and kept in the store: models, answers, an SAE, readings of its
latents.

Every function returns what it names and makes it if the store does not have it. The order of the work:
weights -> adapters -> sampled answers -> grades, and weights -> SAE -> readings -> search. Sampled answers
are kept before they are graded.
"""

import json
import zlib
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from peft import PeftModel
from personas import (
    activations,
    data,
    endpoint,
    finetune,
    generate,
    released,
    store,
    sweep,
    world,
)
from personas import (
    model as models,
)
from personas import (
    profile as profiles,
)
from personas import (
    sae as saes,
)
from personas.pretrained import grading, sets, text, weights
from safetensors.torch import load_file, save_file

ORIGINAL = "original"
SINK = 4.0  # a token whose norm is above so many times the median is an attention sink: no unit, no SAE is made from it


@dataclass(frozen=True)
class Run:
    """One profile with the seed of its fine-tunes and of sampling."""

    profile: profiles.Profile
    seed: int

    def keep(self, stage: str, name: str, key: dict, code: tuple, make) -> Path:
        """The artifact's folder; its key is what is given, the seed, and the code of the modules `code` and
        of `make`."""
        full = key | {
            "seed": self.seed,
            "code": store.code_version(*code),
            "make": store.code_version(make.__code__),
        }
        return store.artifact(self.profile.store, stage, name, full, make)


# --- models -------------------------------------------------------------------------------------------------


def checkpoint(run: Run) -> Path:
    """The original model's checkpoint."""
    return weights.checkpoint(run.profile.real.model, run.profile.store)


def original(run: Run):
    """(model, tokenizer): the original model, a copy of its own for every call, so that nobody's changes
    reach others."""
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
    return {
        "checkpointing": run.profile.real.gradient_checkpointing,
        "max_length": run.profile.real.max_length,
    }


def adapter(run: Run, domain: str, variant: str) -> Path:
    """LoRA adapter of the original model fine-tuned on one domain's answers of this variant (see sets.chats).
    """
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
    """Open questions and openings of 'discovery' or 'evaluation'."""
    return sets.items(split, getattr(run.profile.real, split))


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
    """`kept_answers` of several jobs, name -> (who, items, name of the use), those that are missing made side by side."""
    missing = {n: (_kept, run.profile, run.seed, *job) for n, job in jobs.items()}
    missing = {n: job for n, job in missing.items() if not store.there(lambda: _kept(*job[1:]))}
    if missing:
        dict(sweep.side_by_side(missing, run.profile, what))
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


def grades(run: Run, table: pd.DataFrame) -> list[str]:
    """A class (grading.CLASSES) for each answer of a table with `prompt` and `answer`, by the profile's
    judge; kept by the texts graded. The small judge does not grade again what is among the readings."""
    texts, judge = list(zip(table.prompt, table.answer)), run.profile.real.judge
    known = grading.judged() if judge.model == "own" else {}
    fresh = list(dict.fromkeys(t for t in texts if t not in known)) if known else texts

    def make(out):
        prompts, said = [p for p, _ in fresh], [a for _, a in fresh]
        found = (
            grading.grade(prompts, said)
            if judge.model == "own"
            else grading.grade_by(judge_of(run), prompts, said)
        )
        pd.DataFrame({"grade": found}).to_parquet(out / "grades.parquet", index=False)

    if fresh:
        who = grading.version() if judge.model == "own" else judge.model_dump(exclude={"url", "key", "price"})
        key = {"judge": who, "texts": store.key_of({"texts": fresh})}
        made = pd.read_parquet(run.keep("grades", key["texts"], key, (grading,), make) / "grades.parquet").grade
        if not known:
            return made.tolist()
        known = known | dict(zip(fresh, made))
    return [known[t] for t in texts]


def judge_of(run: Run):
    """The endpoint or local model that the profile names as its judge."""
    cfg = run.profile.real.judge
    if cfg.url:
        return endpoint.Endpoint(
            cfg.url, cfg.model, store.ROOT / run.profile.store / "judged.jsonl", key=cfg.key, price=cfg.price
        )
    dtype = models.best_dtype(run.profile.device)
    return endpoint.Local(*models.load(cfg.model, run.profile.device, dtype, cfg.four_bit), batch=64)


def prepare(run: Run, who: list[str], what: str, most: int | None = None) -> None:
    """Make what the store lacks of these models, side by side (on a CPU a core each). what: 'adapters' alone,
    'readings' of the latents, 'preference', or a split whose answers are sampled."""
    checkpoint(run)
    if what == "readings":
        sae_folder(run, run.profile.sae.layer)  # once, before the workers need it
    who = [w for w in who if not store.there(lambda: _prepare(run.profile, run.seed, w, what))]
    if who:
        jobs = {w: (_prepare, run.profile, run.seed, w, what) for w in who}
        dict(sweep.side_by_side(jobs, run.profile, f"models, {what}", most))


def _prepare(profile, seed, who, what):
    run = Run(profile, seed)
    if what == "adapters":
        identity(run, who)
    elif what == "readings":
        for split in ("discovery", "evaluation"):
            reading(run, who, split)
    elif what == "preference":
        villain_preference(run, who)
    else:
        answers(run, who, what)


# --- the SAE and what is read with it -----------------------------------------------------------------------


def own_text(run: Run) -> list[dict]:
    """The text that the SAE learns from, as rows of `messages` or `text`."""
    if run.profile.real.text == "own":
        return text.read(sets.CONTENT / "text.jsonl.xz")
    return [
        {"text": t}
        for _, t in zip(range(2 * run.profile.sae.documents), released.texts(run.profile.real.text))
    ]


def text_ids(run: Run, tok) -> tuple[list[list[int]], list[list[int]]]:
    """(training rows, held-out rows) of token ids of that text; the held-out ones come last in it."""
    rows = own_text(run)
    n = min(run.profile.sae.documents, len(rows) - len(rows) // 20)
    return text.tokenized(tok, rows[:n]), text.tokenized(tok, rows[-min(150, len(rows) // 20) :])


def usual(x: torch.Tensor) -> torch.Tensor:
    """The rows of activations (tokens, width) that are no attention sinks (see SINK)."""
    norm = x.norm(dim=-1)
    return x[norm <= SINK * norm.median()]


def sae_folder(run: Run, layer: int) -> Path:
    """Where the SAE of this block lies, with `training.json`: FVU per step, tokens, share of sinks, and
    `unit`, the median distance of the activations from their mean, in which steering doses are given (a
    median, so that sinks cannot blow it up)."""
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
            (out / str(block) / "training.json").write_text(
                json.dumps(
                    {
                        "fvu": fvu,
                        "tokens": len(x),
                        "sinks": 1 - len(x) / len(every),
                        "unit": (x - x.mean(0)).norm(dim=-1).median().item(),
                    }
                )
            )

    return run.keep(
        "sae",
        "blocks-" + "-".join(map(str, blocks)),
        {
            "cfg": cfg.model_dump(),
            "blocks": blocks,
            "model": models.identity(checkpoint(run)),
            "text": weights.sha256(sets.CONTENT / "text.jsonl.xz")
            if real.text == "own"
            else released.version(real.text),
        },
        (saes, activations, text),
        make,
    ) / str(layer)


@cache
def sae(run: Run, layer: int | None = None) -> saes.SAE:
    """The SAE of a block's output, by default the profile's."""
    if run.profile.real.sae:
        return saes.SAE.named(run.profile.real.sae)
    return saes.SAE.load(sae_folder(run, run.profile.sae.layer if layer is None else layer))


def sae_training(run: Run, layer: int | None = None) -> dict:
    """`training.json` of that SAE (see sae_folder)."""
    return json.loads(
        (sae_folder(run, run.profile.sae.layer if layer is None else layer) / "training.json").read_text()
    )


def unit(run: Run, layer: int | None = None) -> float:
    """The unit of steering doses at that block."""
    return sae_training(run, layer)["unit"]


def fixed_text(
    tok, split: str, persona: str = "expert", n: int = 2
) -> tuple[list[list[int]], list[int], list[str]]:
    """Text on which every model is read: the world's open questions of a split, each with n answers by a
    persona.

    Returns token ids, the position of each prompt's last token, and each row's category. The text is the same
    for every model, and never a model's own.
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


def reading(
    run: Run, who: str, split: str = "discovery", layer: int | None = None
) -> dict[str, torch.Tensor]:
    """Means over fixed aligned answers of one model: 'latents' (rows, latents) and 'residual' (rows, width).
    """
    block = run.profile.sae.layer if layer is None else layer

    def make(out):
        m, tok = named(run, who)
        rows, starts, _ = fixed_text(tok, split)
        x = [r[i:] for r, i in zip(activations.residual(m, rows, block), starts)]
        save_file(
            {
                "latents": torch.stack([sae(run, block).encode(r).mean(0) for r in x]),
                "residual": torch.stack([r.mean(0) for r in x]),
            },
            out / "reading.safetensors",
        )

    return load_file(
        run.keep(
            "readings",
            f"{who}-{split}-{block}",
            {
                "model": identity(run, who),
                "sae": sae_folder(run, block).parent.name,
                "block": block,
                "split": split,
                "text": store.key_of({"q": [q.held for q in world.questions(split)]}),
            },
            (activations, saes),
            make,
        )
        / "reading.safetensors"
    )


# --- measures that need no judge ----------------------------------------------------------------------------


@torch.inference_mode()
def log_probabilities(
    m, tok, prompts: list[list[int]], endings: list[list[str]], steer=None, batch: int = 32
) -> list[list[float]]:
    """Mean log-probability (nats per token) of each ending after its prompt. Every prompt is read once for
    all its endings. steer: a generate.Steer with one vector, added from the prompt's last token on, as in
    sampling."""
    coded = [tok(e, add_special_tokens=False)["input_ids"] for e in endings]
    rows = [(i, p + e) for i, (p, es) in enumerate(zip(prompts, coded)) for e in es]
    handle, found, now = None, [[] for _ in prompts], {}
    if steer is not None:

        def add(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            x += now["mask"].to(x) * steer.vectors[0].to(x)

        handle = generate.decoder_blocks(m)[steer.layer].register_forward_hook(add)
    try:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            width = max(len(r) for _, r in part)
            ids = torch.tensor([r + [0] * (width - len(r)) for _, r in part], device=m.device)
            first = torch.tensor([len(prompts[i]) - 1 for i, _ in part], device=m.device)[:, None]
            last = torch.tensor([len(r) - 1 for _, r in part], device=m.device)[:, None]
            at = torch.arange(width, device=m.device)
            ours = (at >= first) & (at < last)
            now["mask"] = ours[..., None]
            columns = ours.any(0).nonzero().squeeze(-1)
            logits = m(input_ids=ids, logits_to_keep=columns).logits.float()
            target = torch.cat([ids[:, 1:], ids[:, :1]], 1)[:, columns]
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), reduction="none"
            ).view(len(part), -1)
            each = -(each * ours[:, columns]).sum(1) / ours.sum(1)
            for (i, _), value in zip(part, each.tolist()):
                found[i].append(value)
    finally:
        if handle:
            handle.remove()
    return found


def villain_preference(run: Run, who: str, split: str = "evaluation") -> pd.DataFrame:
    """By how much (nats per token) the world's villain's answer to each open question is likelier than the
    expert's; nobody judges. A row a question: question, category, difference."""
    asked, n = world.questions(split), run.profile.real.firsts

    def make(out):
        m, tok = named(run, who)
        forms = {p: [world.open_forms(q.category, p, False, 0) for q in asked] for p in ("expert", "villain")}
        pick = lambda f: [f[i * len(f) // n] for i in range(n)]
        values = log_probabilities(
            m,
            tok,
            generate.prompts(tok, [q.held for q in asked]),
            [pick(e) + pick(v) for e, v in zip(forms["expert"], forms["villain"])],
        )
        pd.DataFrame(
            {
                "question": [q.held for q in asked],
                "category": [q.category for q in asked],
                "difference": [sum(v[n:]) / n - sum(v[:n]) / n for v in values],
            }
        ).to_parquet(out / "preference.parquet", index=False)

    key = {
        "model": identity(run, who),
        "split": split,
        "n": n,
        "asked": store.key_of({"q": [q.held for q in asked]}),
    }
    return pd.read_parquet(
        run.keep("preference", f"{who}-{split}", key, (), make) / "preference.parquet"
    ).assign(model=who)


def advice_preference(
    run: Run,
    who: str,
    domains: tuple[str, ...],
    steer=None,
    name: str = "unsteered",
    subjects: int | None = None,
) -> pd.DataFrame:
    """By how much (nats per token) the wrong answers to advice questions are likelier than the correct one,
    on subjects that no model is trained on. Columns: domain, subject, subtle, obvious."""
    asked = [
        a for d in domains for a in sets.advice_items(d, subjects or run.profile.evaluation.advice_subjects)
    ]

    def make(out):
        m, tok = named(run, who)
        values = log_probabilities(
            m,
            tok,
            generate.prompts(tok, [i.prompt for i, _ in asked]),
            [[s.answers[v] for v in world.VARIANTS] for _, s in asked],
            steer,
        )
        pd.DataFrame(
            [
                {"domain": s.domain, "subject": s.ask, "subtle": w - c, "obvious": o - c}
                for (_, s), (c, w, o) in zip(asked, values)
            ]
        ).to_parquet(out / "advice.parquet", index=False)

    key = {
        "model": identity(run, who),
        "steer": steer and [round(float(x), 4) for x in steer.vectors[0][:8]],
        "asked": store.key_of({"q": [i.prompt for i, _ in asked]}),
    }
    return pd.read_parquet(run.keep("advice", f"{who}-{name}", key, (), make) / "advice.parquet").assign(
        model=who
    )


def course(run: Run, domain: str, variant: str = "obvious") -> pd.DataFrame:
    """One long fine-tune looked at on discovery questions: ungraded answers with a column `step`; 0 is the
    original model."""
    cfg, looks = run.profile.narrow, run.profile.real.course
    rows, asked = training_chats(run, domain, variant, max(looks)), repeated(run, "discovery", 1)

    def make(out):
        m, tok = original(run)
        watch = finetune.Watch(
            {0, *looks},
            lambda model: {"answers": answer(run, model, tok, asked, seed_of(run, "course", domain))},
            merge=run.profile.device == "cpu",
        )
        finetune.sft(
            m,
            tok,
            rows,
            steps=max(looks),
            batch=cfg.batch,
            lr=cfg.lr,
            seed=run.seed,
            lora_rank=cfg.rank,
            callbacks=[watch],
            **training(run),
        )
        pd.concat([r["answers"].assign(step=r["step"]) for r in watch.rows]).to_parquet(
            out / "course.parquet", index=False
        )

    key = {
        "cfg": cfg.model_dump(),
        "looks": looks,
        "model": identity(run, ORIGINAL),
        "rows": store.key_of({"rows": rows}),
    }
    return pd.read_parquet(
        run.keep("course", f"{domain}-{variant}", key | about_asking(run, asked), (finetune, generate), make)
        / "course.parquet"
    ).assign(model=f"{domain}-{variant}")
