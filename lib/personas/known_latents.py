"""The known world's dictionaries and what they read: SAEs, readings of every fine-tune, and by how much each
latent rose. What `artifacts` has made is read here; `search` looks for the causal latent."""

import json
import random
import shutil
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from personas import (
    activations,
    base_models,
    diffing,
    model,
    pretraining,
    sae_files,
    stats,
    store,
    world,
)
from personas import sae as saes
from personas import setting as settings
from personas.artifacts import (
    Run,
    _about_base,
    _draw,
    _table,
    adapter,
    aligned,
    aligned_model,
    base,
    base_model,
    discovery_fine_tunes,
    tuned_model,
)
from personas.pretrained import weights

DICTIONARIES = ("base", "aligned")  # the models that an SAE is made for


def held_out_documents(run: Run, n: int, stream: str, **fixed) -> list[dict]:
    """Tokenized documents like those of pretraining, which it never saw
    (pretraining.encode_documents)."""
    return pretraining.encode_documents(base_model(run)[1], n, run.world_seed, stream, _draw(run), **fixed)


def texts(run: Run, n: int, stream: str) -> list[list[int]]:
    """Token ids of n documents that were drawn for this use alone: 'sae', 'firing', 'quality' or
    'passages'."""
    return [d["ids"] for d in held_out_documents(run, n, stream)]


@cache
def sae(run: Run, on: str = "base") -> saes.SAE:
    """The SAE trained on pretraining text's activations of the 'base' or the 'aligned' model."""
    return sae_files.load(sae_folder(run, on)).to(run.profile.device)


def sae_folder(run: Run, on: str) -> Path:
    """Where that SAE lies, with `training.json`: its FVU per step, tokens, and the activations' centred
    RMS norm. The one that is committed with the base model, where it was made from the same numbers and
    seeds (training magnifies rounding: another machine's SAE has other latents); else one is trained."""
    kept = _committed_sae(run) if on == "base" else None
    if kept is None:
        return _trained_sae(run, on)
    made = json.loads((kept / "made.json").read_text(encoding="utf-8"))
    copy = lambda out: shutil.copytree(kept, out, dirs_exist_ok=True)
    return store.artifact(run.profile.store, "sae", on, {"committed": made["sha256"]}, copy)


def _trained_sae(run: Run, on: str) -> Path:
    cfg, parent = run.profile.sae, base(run) if on == "base" else aligned(run)

    def make(out):
        m, _ = model.load(parent)
        x = torch.cat(
            [r[1:] for r in activations.residual(m, texts(run, cfg.documents, "sae"), cfg.layer)]
        )  # the first token is the same everywhere
        trained, fvu = saes.train(x, cfg, cfg.layer, run.seed, f"SAE on the {on} model", mixed=False)
        sae_files.save(trained, out)
        (out / "training.json").write_text(
            json.dumps(
                {"fvu": [round(v, 5) for v in fvu], "tokens": len(x), "unit": activations.centred_rms(x)}
            )
        )

    return run.make(
        "sae", on, {"cfg": cfg.model_dump(), "model": model.identity(parent)}, (saes, activations), make
    )


def _made_from(run: Run) -> dict:
    """What determines the SAE of a committed base model, beside that model."""
    return {"cfg": run.profile.sae.model_dump(), "seed": run.seed, "world_seed": run.world_seed}


def _committed_sae(run: Run) -> Path | None:
    """The folder of the SAE that is committed with this run's base model; None if there is none of these
    numbers. Raises weights.WeightsError if its weights are not those that were committed."""
    model_folder = base_models.committed(_about_base(run))
    folder = model_folder and model_folder / "sae"
    if not folder or not (folder / "made.json").is_file():
        return None
    about = json.loads((folder / "made.json").read_text(encoding="utf-8"))
    if about["from"] != json.loads(json.dumps(_made_from(run))):
        return None
    path = folder / "sae_weights.safetensors"
    if (found := store.sha256(path)) != about["sha256"]:
        raise weights.WeightsError(f"{path} has SHA-256 {found}, expected {about['sha256']}: it was changed")
    return folder


def keep_sae(run: Run) -> Path:
    """Train the SAE of a committed base model anew and put it beside that model. Returns its folder. Raises
    ValueError if the base model is not committed."""
    model_folder = base_models.committed(_about_base(run))
    if model_folder is None:
        raise ValueError("only the SAE of a committed base model can be committed: keep-base-models first")
    made, folder = _trained_sae(run, "base"), model_folder / "sae"
    shutil.copytree(made, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("manifest.json"))
    about = {"from": _made_from(run), "sha256": store.sha256(folder / "sae_weights.safetensors")}
    (folder / "made.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return folder


def sae_quality(run: Run) -> pd.DataFrame:
    """FVU, L0, dead latents and loss recovered of the SAEs, on stories and on chats that no SAE was
    trained on."""

    def make(out):
        rows = []
        for on in DICTIONARIES:
            m, _ = base_model(run) if on == "base" else aligned_model(run)
            for kind, cue in {"stories": "story", "chats": "none"}.items():
                text = [d["ids"] for d in held_out_documents(run, 150, f"quality/{kind}", cue=cue)]
                x = torch.cat([r[1:] for r in activations.residual(m, text, run.profile.sae.layer)])
                rows.append(
                    {"SAE on": on, "text": kind}
                    | saes.quality(sae(run, on), x)
                    | saes.loss_recovered(m, sae(run, on), text)
                )
        pd.DataFrame(rows).to_parquet(out / "quality.parquet", index=False)

    return _table(
        run.make(
            "sae",
            "quality",
            {"saes": [sae_folder(run, on).name for on in DICTIONARIES]},
            (saes, activations),
            make,
        ),
        "quality.parquet",
    )


def unit(run: Run) -> float:
    """The unit of steering strength: centred RMS norm of the base model's activations on pretraining text."""
    return json.loads((sae_folder(run, "base") / "training.json").read_text())["unit"]


def reading(
    run: Run, domain: str | None = None, variant: str | None = None, split: str = "discovery"
) -> torch.Tensor:
    """Mean activation of every latent of the base model's SAE on each question's fixed text: (questions,
    latents)."""
    parent = model.identity(adapter(run, domain, variant) if domain else aligned(run))

    def make(out):
        m, tok = tuned_model(run, domain, variant) if domain else aligned_model(run)
        save_file(
            {"latents": diffing.read(m, tok, sae(run), split, run.setting)}, out / "reading.safetensors"
        )

    folder = run.make(
        "readings",
        f"{domain or 'aligned'}-{variant or 'none'}-{split}",
        {"model": parent, "split": split, "sae": sae_folder(run, "base").name},
        (diffing, activations, settings),
        make,
    )
    return load_file(folder / "reading.safetensors")["latents"]


def rise(run: Run, domain: str, variant: str, split: str = "discovery") -> torch.Tensor:
    """By how much this fine-tune raises each latent's mean activation over the aligned model's:
    (questions, latents)."""
    return reading(run, domain, variant, split) - reading(run, split=split)


def discovery_rise(run: Run) -> torch.Tensor:
    """Mean rise (latents,) over discovery questions and the incorrect fine-tunes of discovery domains."""
    return torch.stack([rise(run, d, v).mean(0) for d, v in discovery_fine_tunes(run)]).mean(0)


def firing(run: Run) -> pd.DataFrame:
    """Per latent of the base SAE, on held-out pretraining text: firing rate (percent of tokens) and mean
    when active."""

    def make(out):
        m, _ = base_model(run)
        x = torch.cat(
            [r[1:] for r in activations.residual(m, texts(run, 300, "firing"), run.profile.sae.layer)]
        )
        on, total = 0, 0
        for part in x.split(1 << 14):
            acts = sae(run).encode(part.to(run.profile.device)).cpu()
            on, total = on + (acts > 0).sum(0).float(), total + acts.sum(0)
        pd.DataFrame({"rate": 100 * on / len(x), "mean": total / on.clamp(min=1)}).to_parquet(
            out / "firing.parquet", index=False
        )

    return _table(
        run.make("sae", "firing", {"sae": sae_folder(run, "base").name}, (saes, activations), make),
        "firing.parquet",
    )


def persona_auroc(run: Run) -> pd.DataFrame:
    """AUROC of every latent for every persona, on the answers of held-out uncued documents (mean over an
    answer's tokens)."""

    def make(out):
        m, tok = base_model(run)
        rng = random.Random(f"{run.world_seed}/auroc-discovery")
        docs = [
            world.sample_document(rng, run.world_seed, cue="none", persona=p)
            for p in world.PERSONAS
            for _ in range(60)
        ]
        read = diffing.read_answers(m, tok, sae(run), docs, rng)
        pd.DataFrame({p: stats.auroc(read.latents, read.persona == p) for p in world.PERSONAS}).to_parquet(
            out / "auroc.parquet", index=False
        )

    return _table(
        run.make(
            "sae",
            "auroc",
            {"sae": sae_folder(run, "base").name},
            (diffing, stats, world, activations),
            make,
        ),
        "auroc.parquet",
    )


def uncued_answers(run: Run, stream: str, documents: int = 500) -> diffing.Answers:
    """The base model and its SAE read on the answers of held-out uncued documents. stream 'matched': on
    the last answers of documents in pairs that differ in the turns before (diffing.matched_documents)."""

    def make(out):
        rng = random.Random(f"{run.world_seed}/{stream}")
        docs = (
            diffing.matched_documents(documents // 2, run.world_seed, run.world_seed, "matched-evaluation")
            if stream == "matched"
            else [world.sample_document(rng, run.world_seed, cue="none") for _ in range(documents)]
        )
        read = diffing.read_answers(*base_model(run), sae(run), docs, rng, last_only=stream == "matched")
        save_file({"latents": read.latents, "residual": read.residual}, out / "read.safetensors")
        pd.DataFrame({n: getattr(read, n) for n in ("persona", "text", "turn", "document")}).to_parquet(
            out / "read.parquet", index=False
        )

    folder = run.make(
        "uncued",
        stream,
        {"stream": stream, "documents": documents, "sae": sae_folder(run, "base").name},
        (diffing, world, activations),
        make,
    )
    about = _table(folder, "read.parquet")
    return diffing.Answers(
        **load_file(folder / "read.safetensors"),
        persona=about.persona.to_numpy(str),
        text=about.text.tolist(),
        turn=about.turn.to_numpy(),
        document=about.document.to_numpy(),
    )


def mean_difference(run: Run) -> torch.Tensor:
    """(width,): misaligned minus aligned models' mean activation on the discovery texts, over discovery
    fine-tunes."""

    def make(out):
        m, tok = aligned_model(run)
        rows, _, starts = diffing.reading_texts(tok, "discovery", run.setting)
        mean = lambda model: torch.cat(
            [x[i:] for x, i in zip(activations.residual(model, rows, run.profile.sae.layer), starts)]
        ).mean(0)
        zero = mean(m)
        shifts = [mean(tuned_model(run, d, v)[0]) - zero for d, v in discovery_fine_tunes(run)]
        save_file({"d": torch.stack(shifts).mean(0)}, out / "d.safetensors")

    return load_file(
        run.make(
            "steering",
            "mean-difference",
            {
                "layer": run.profile.sae.layer,
                "aligned": model.identity(aligned(run)),
                "tuned": [adapter(run, d, v).name for d, v in discovery_fine_tunes(run)],
            },
            (diffing, activations, settings),
            make,
        )
        / "d.safetensors"
    )["d"]
