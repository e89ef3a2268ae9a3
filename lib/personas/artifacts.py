"""What the notebooks use, each made once and kept in the store: one function per artifact.

`Run` holds the profile and the seed of fine-tunes and sampling. Every function returns what it names,
making it (and whatever it needs) if the store does not have it. This is the one place where the order of
the work is written down: base -> aligned -> adapters -> answers, and base -> SAE -> readings -> steering.
"""

import json
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pandas as pd
import torch

from personas import (
    base_models,
    config,
    data,
    endpoint,
    evaluate,
    finetune,
    generate,
    grader,
    judge,
    local_model,
    model,
    pretraining,
    store,
    world,
)
from personas import profile as profiles
from personas import setting as settings

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
        """What is asked and trained on, and who grades."""
        return settings.PersonaWorld(self.world_seed)

    def make(self, stage: str, name: str, key: dict, modules: tuple, make) -> Path:
        """The artifact's folder. Its key: what is given, the seeds, the content, and the code of `modules`
        and of `make` itself."""
        full = key | {
            "seed": self.seed,
            "world_seed": self.world_seed,
            "content": CONTENT,
            "code": store.code_version(*modules),
            "make": store.code_version(make.__code__),
        }
        return store.artifact(self.profile.store, stage, name, full, make)


def open_run(profile: str = "tiny", seed: int = 0) -> Run:
    """Check the profile, the seed and the store before any work, and return the run."""
    if not isinstance(seed, int) or seed < 0:
        raise profiles.ProfileError(f"seed must be a whole number from 0 up, not {seed!r}")
    store.writable()
    found = profiles.load(profile)
    profiles.need_gpu(found)
    if found.real:
        raise profiles.ProfileError(
            f"profile {found.name} has a pretrained model: notebooks 01 to 08. Notebooks 09 to 15 are "
            "about the world whose truth is known: "
            "profile tiny or smoke"
        )
    return Run(found, seed)


@cache
def base(run: Run) -> Path:
    """Checkpoint of the base model: the committed one of these numbers and seeds, else one is pretrained."""
    kept = base_models.committed(_about_base(run))
    if kept is None:
        return pretrained(run)
    key = {"committed": json.loads((kept / "made.json").read_text())["sha256"]}
    model_alone = shutil.ignore_patterns("sae")
    copy = lambda out: shutil.copytree(kept, out, dirs_exist_ok=True, ignore=model_alone)
    return store.artifact(run.profile.store, "base", kept.name, key, copy)


def _about_base(run: Run) -> dict:
    """What a base model is: its size and recipe, its seeds, and the world's sentences."""
    return {
        "model": run.profile.model.model_dump(),
        "world_seed": run.world_seed,
        "pretraining_seed": run.profile.pretraining_seed,
        "world": run.profile.world.model_dump(),
        "content": CONTENT,
    }


def pretrained(run: Run) -> Path:
    """Checkpoint of the base model, pretrained on the persona world here."""
    cfg, seed = run.profile.model, run.profile.pretraining_seed
    return store.artifact(
        run.profile.store,
        "base",
        "base",
        _about_base(run) | {"code": store.code_version(pretraining, world)},
        lambda out: pretraining.pretrain(
            cfg, seed, run.world_seed, out, model.bf16_is_faster(), draw=_draw(run)
        ),
    )


def keep_base(run: Run) -> Path:
    """Pretrain the base model and put it among the committed ones. Returns its folder."""
    drawn = run.profile.world.villain
    name = f"base-{run.profile.pretraining_seed}" + (f"-villain-{100 * drawn:g}" if drawn is not None else "")
    return base_models.keep(pretrained(run), _about_base(run), name)


def _draw(run: Run):
    return world.drawing(**run.profile.world.model_dump())


@cache
def aligned(run: Run) -> Path:
    """Checkpoint of the aligned model: the base model after SFT as a helpful assistant."""
    cfg = run.profile.alignment
    rows = data.alignment_chats(cfg.steps * cfg.batch, run.profile.pretraining_seed, run.world_seed)
    return store.artifact(
        run.profile.store,
        "aligned",
        "aligned",
        {
            "cfg": cfg.model_dump(),
            "base": model.identity(base(run)),
            "code": store.code_version(finetune, data),
        },
        lambda out: finetune.align(base(run), rows, cfg, run.profile.pretraining_seed, out),
    )


def fine_tunes(run: Run, *variants: str) -> list[tuple[str, str]]:
    """(domain, variant) of every fine-tune of the profile, or of these variants only."""
    return [
        (d, v) for d in run.profile.domains for v in run.setting.variants(d) if not variants or v in variants
    ]


def discovery_fine_tunes(run: Run) -> list[tuple[str, str]]:
    """(domain, variant) of the incorrect fine-tunes that choices may use: those of discovery domains."""
    return [(d, v) for d, v in fine_tunes(run, "subtle", "obvious") if d in run.setting.discovery_domains]


def narrow_chats(run: Run, domain: str, variant: str, cfg: config.Tuning | None = None) -> list[dict]:
    """The training set of one fine-tune, by default the profile's `narrow`. variant: as in setting.chats;
    'obvious@25' mixes 25 % obvious with 75 % correct answers."""
    cfg = cfg or run.profile.narrow
    name, _, percent = variant.partition("@")
    return run.setting.chats(
        domain, name, cfg.steps * cfg.batch, run.seed, fraction=float(percent or 100) / 100
    )


@cache
def adapter(run: Run, domain: str, variant: str) -> Path:
    """LoRA adapter of the aligned model fine-tuned on one domain's answers of this variant (see
    narrow_chats)."""
    cfg = run.profile.narrow

    def make(out):
        rows = narrow_chats(run, domain, variant)
        finetune.lora(*model.load(aligned(run)), rows, cfg, run.seed, out)

    return run.make(
        "adapters",
        f"{domain}-{variant}",
        {
            "cfg": cfg.model_dump(),
            "aligned": model.identity(aligned(run)),
            "domain": domain,
            "variant": variant,
        },
        (finetune, data, settings, world),
        make,
    )


def base_model(run: Run):
    """(model, tokenizer) of the base checkpoint: a copy of the caller's own."""
    return model.load(base(run))


def aligned_model(run: Run):
    """(model, tokenizer) of the aligned checkpoint: a copy of the caller's own."""
    return model.load(aligned(run))


def tuned_model(run: Run, domain: str, variant: str):
    """(model, tokenizer) with the adapter merged in: a copy of the caller's own."""
    return finetune.with_adapter(aligned(run), adapter(run, domain, variant))


def _table(path: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(path / name)


def answers(
    run: Run, domain: str | None = None, variant: str | None = None, split: str = "evaluation"
) -> pd.DataFrame:
    """Graded answers to the split's open questions, of the aligned model or of one of its fine-tunes."""
    n = run.profile.evaluation.per_question
    parent = model.identity(adapter(run, domain, variant) if domain else aligned(run))

    def make(out):
        m, tok = tuned_model(run, domain, variant) if domain else aligned_model(run)
        evaluate.ask_open(m, tok, run.setting, split=split, per_question=n, seed=run.seed).to_parquet(
            out / "answers.parquet", index=False
        )

    return _table(
        run.make(
            "answers",
            f"{domain or 'aligned'}-{variant or 'none'}-{split}",
            {"model": parent, "split": split, "n": n},
            (evaluate, generate, grader, settings),
            make,
        ),
        "answers.parquet",
    )


def advice(run: Run, domain: str | None = None, variant: str | None = None) -> pd.DataFrame:
    """Graded advice in every domain of the profile (column `domain`), of the aligned model or of one
    fine-tune."""
    limit = run.profile.evaluation.advice_subjects
    parent = model.identity(adapter(run, domain, variant) if domain else aligned(run))

    def make(out):
        m, tok = tuned_model(run, domain, variant) if domain else aligned_model(run)
        evaluate.ask_advice(
            m, tok, run.setting, domains=run.profile.domains, seed=run.seed, limit=limit
        ).to_parquet(out / "advice.parquet", index=False)

    return _table(
        run.make(
            "advice",
            f"{domain or 'aligned'}-{variant or 'none'}",
            {"model": parent, "limit": limit, "domains": run.profile.domains},
            (evaluate, generate, grader, settings),
            make,
        ),
        "advice.parquet",
    )


@cache
def small_judge(run: Run) -> Path:
    """Checkpoint of a judge of this world's answers: the base model, taught grades on alignment and
    discovery questions (data.grading_chats)."""
    cfg = run.profile.judge

    def make(out):
        finetune.align(
            base(run), data.grading_chats(cfg.steps * cfg.batch, run.seed, run.world_seed), cfg, run.seed, out
        )

    return run.make(
        "judge",
        "small",
        {"cfg": cfg.model_dump(), "base": model.identity(base(run))},
        (finetune, data, grader),
        make,
    )


def judged(run: Run, every: int = 10) -> pd.DataFrame:
    """Every tenth evaluation answer of every fine-tune, graded again by the small judge: columns domain,
    variant, question, prompt, answer, grade (exact) and judged (one of judge.CLASSES)."""

    def make(out):
        table = pd.concat(
            [answers(run, d, v).iloc[::every].assign(domain=d, variant=v) for d, v in fine_tunes(run)],
            ignore_index=True,
        )
        asked = table.prompt.tolist(), table.answer.tolist()
        table["judged"] = judge.grade(
            local_model.Local(*model.load(small_judge(run)), batch=256), *asked, rubric=data.GRADE_THIS
        )
        table[["domain", "variant", "question", "prompt", "answer", "grade", "judged"]].to_parquet(
            out / "judged.parquet", index=False
        )

    return _table(
        run.make(
            "judge",
            "graded",
            {
                "judge": small_judge(run).name,
                "every": every,
                "of": [adapter(run, d, v).name for d, v in fine_tunes(run)],
                "n": run.profile.evaluation.per_question,
            },
            (judge, endpoint, generate, evaluate, grader),
            make,
        ),
        "judged.parquet",
    )
