"""The search for a causal latent in the known world, and what it does: screened and chosen on discovery
questions, reported on evaluation questions."""

import math
from functools import cache
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file

from personas import diffing, evaluate, generate, grader, model, steering, store, world
from personas import setting as settings
from personas.artifacts import Run, _table, adapter, aligned, aligned_model, discovery_fine_tunes, tuned_model
from personas.known_latents import (
    discovery_rise,
    firing,
    mean_difference,
    persona_auroc,
    sae,
    sae_folder,
    unit,
)


def candidates(run: Run) -> dict[str, torch.Tensor]:
    """The latents that rise most on discovery data, by name (`latent 12`), as directions."""
    ranked = discovery_rise(run).argsort(descending=True).tolist()
    return {f"latent {i}": sae(run).W_dec[i] for i in ranked[: run.profile.steering.candidates]}


def controls(run: Run) -> dict[str, torch.Tensor]:
    """What the chosen latent is compared with, by name: `matched 12` (latents nearest to it in firing rate
    and mean activation, candidates excepted), `persona jester` (the latent that marks this persona best),
    `random 3` and `mean difference`."""
    dictionary, about = sae(run), firing(run)
    log = about.clip(lower=1e-3).map(math.log)
    away = (
        ((log - log.loc[chosen_latent(run)[0]]) ** 2)
        .sum(axis=1)
        .drop(index=[int(n.split()[1]) for n in candidates(run)])
    )
    found = {
        f"matched {i}": dictionary.W_dec[i]
        for i in away[about.rate > 0].nsmallest(run.profile.steering.controls).index
    }
    auroc = persona_auroc(run)
    found |= {
        f"persona {p}": dictionary.W_dec[int(auroc[p].idxmax())] for p in world.PERSONAS if p != "villain"
    }
    generator = torch.Generator().manual_seed(run.seed)
    found |= {f"random {i}": torch.randn(dictionary.W_dec.shape[1], generator=generator) for i in range(20)}
    return found | {"mean difference": mean_difference(run)}


@cache
def rankings(run: Run) -> dict[str, list[int]]:
    """The first ten latents by each way of ranking, on discovery data: by how much they rise (Wang et al.,
    2025), by what they add to misaligned answers more than to aligned ones (diffing.attribution), by
    decoder direction along the mean difference, by AUROC on documents whose speaker is known (the
    ceiling), and at random among those that fire."""

    def make(out):
        found = []
        for d, v in discovery_fine_tunes(run):
            m, tok = tuned_model(run, d, v)
            texts = {
                p: diffing.reading_texts(tok, "discovery", run.setting, persona=p)
                for p in ("villain", "expert")
            }
            both = set(texts["villain"][1]) & set(texts["expert"][1])
            gain = (
                {p: diffing.attribution(m, sae(run), *_only(t, both), batch=32) for p, t in texts.items()}
                if both
                else {p: torch.zeros(len(alive)) for p in texts}
            )
            found.append(gain["villain"] - gain["expert"])
        save_file({"attribution": torch.stack(found).mean(0)}, out / "attribution.safetensors")

    dictionary, alive = sae(run), firing(run).rate.to_numpy() > 0
    gain = load_file(_steering(run, "attribution", make) / "attribution.safetensors")["attribution"]
    first = lambda x: torch.tensor(x.tolist()).argsort(descending=True)[:10].tolist()
    shuffled = torch.randperm(len(alive), generator=torch.Generator().manual_seed(run.seed)).tolist()
    found = {
        "Δ-activation": first(discovery_rise(run)),
        "Δ-attribution": first(gain),
        "mean difference": first(dictionary.W_dec.cpu() @ mean_difference(run)),
    }
    found["AUROC (ceiling)"] = first(persona_auroc(run).villain)
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
    """Every one of the 'candidates' or 'controls' at every strength, added to the aligned model, on
    discovery questions (steering.summary)."""
    return _sweep(
        run, which, "screen", list(WAYS[which](run)), run.profile.steering.screen_per_question, run.seed
    )


def finalists(run: Run, which: str) -> pd.DataFrame:
    """The best of them again, with more answers per strength, still on discovery questions."""
    best = steering.best_strength(screen(run, which)).sort_values("misaligned", ascending=False)
    return _sweep(
        run,
        which,
        "finalists",
        best.direction.head(run.profile.steering.finalists).tolist(),
        run.profile.steering.choose_per_question,
        run.seed + 1,
    )


def _sweep(run: Run, which: str, stage: str, names: list[str], per_question: int, seed: int) -> pd.DataFrame:
    cfg = run.profile.steering

    def make(out):
        ways = WAYS[which](run)
        table = steering.sweep(
            *aligned_model(run),
            run.setting,
            {n: ways[n] for n in names},
            cfg.strengths,
            unit(run),
            run.profile.sae.layer,
            split="discovery",
            per_question=per_question,
            seed=seed,
            progress=f"{stage}, {which}",
        )
        steering.summary(table).to_parquet(out / "summary.parquet", index=False)

    return _table(
        _steering(run, f"{stage}-{which}", make, names=names, per_question=per_question, sampling_seed=seed),
        "summary.parquet",
    )


def best(run: Run, which: str) -> pd.DataFrame:
    """Each direction at the strength that the search chose for it: a finalist's by the second round, the
    others' by the first."""
    second = steering.best_strength(finalists(run, which))
    first = steering.best_strength(screen(run, which))
    return pd.concat([second, first[~first.direction.isin(second.direction)]], ignore_index=True)


def _steering(run: Run, name: str, make, **more) -> Path:
    tuned = [adapter(run, d, v).name for d, v in discovery_fine_tunes(run)]
    return run.make(
        "steering",
        name,
        more
        | {
            "cfg": run.profile.steering.model_dump(),
            "aligned": model.identity(aligned(run)),
            "sae": sae_folder(run, "base").name,
            "tuned": tuned,
            "ways": store.code_version(candidates, controls, rankings),
        },
        (steering, diffing, generate, evaluate, grader, settings),
        make,
    )


@cache
def chosen_latent(run: Run) -> tuple[int, float]:
    """(latent, strength): the persona latent and its dose, chosen on discovery data only."""
    top = steering.best_strength(finalists(run, "candidates")).sort_values("misaligned").iloc[-1]
    return int(top.direction.split()[1]), float(top.strength)


def suppression_screen(run: Run) -> pd.DataFrame:
    """The chosen latent subtracted from discovery domains' misaligned models at every dose, on discovery
    questions."""
    latent, _ = chosen_latent(run)

    def make(out):
        tables = []
        for d, v in discovery_fine_tunes(run):
            m, tok = tuned_model(run, d, v)
            tables.append(
                steering.sweep(
                    m,
                    tok,
                    run.setting,
                    {"latent": sae(run).W_dec[latent]},
                    [-s for s in run.profile.steering.suppression],
                    unit(run),
                    run.profile.sae.layer,
                    split="discovery",
                    per_question=run.profile.steering.screen_per_question,
                    seed=run.seed,
                    progress=None,
                )
            )
        steering.summary(pd.concat(tables)).to_parquet(out / "suppress.parquet", index=False)

    return _table(_steering(run, "suppress", make, latent=latent), "suppress.parquet")


@cache
def suppression_strength(run: Run) -> float:
    """The weakest dose whose share of aligned answers is within a point of the best (suppression_screen);
    negative, in units."""
    table = suppression_screen(run)
    return float(table[table.aligned >= table.aligned.max() - 1].strength.max())


def steered(run: Run, kind: str) -> pd.DataFrame:
    """Evaluation answers under steering, after every choice was made. kind: 'latent' (the chosen latent
    over all strengths), 'controls' or 'ranked' (each direction at the strength that its own search chose,
    3 answers a question), 'mean difference' (all strengths). Returns steering.at's table."""
    cfg, per_question, latent = (
        run.profile.steering,
        run.profile.evaluation.per_question,
        chosen_latent(run)[0],
    )

    def make(out):
        m, tok = aligned_model(run)
        ways, n = WAYS.get(kind, controls)(run), per_question
        if kind in WAYS:
            jobs, n = [(r.direction, ways[r.direction], r.strength) for r in best(run, kind).itertuples()], 3
        else:
            v = sae(run).W_dec[latent] if kind == "latent" else ways[kind]
            jobs = [(kind, v, s) for s in [0.0, *cfg.strengths]]
        steering.at(
            m,
            tok,
            run.setting,
            jobs,
            unit(run),
            run.profile.sae.layer,
            split="evaluation",
            per_question=n,
            seed=run.seed + 2,
            progress=f"evaluating {kind}",
        ).to_parquet(out / "answers.parquet", index=False)

    return _table(
        _steering(run, f"evaluated-{kind.replace(' ', '-')}", make, latent=latent, n=per_question),
        "answers.parquet",
    )


def suppressed(run: Run, domain: str, variant: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """(open answers, advice) of one misaligned model with the chosen latent subtracted; evaluation
    questions."""
    latent, strength = chosen_latent(run)[0], suppression_strength(run)
    p = run.profile.evaluation

    def make(out):
        m, tok = tuned_model(run, domain, variant)
        v = sae(run).W_dec[latent] * strength * unit(run)
        steer = generate.Steer(run.profile.sae.layer, v[None])
        evaluate.ask_open(
            m, tok, run.setting, split="evaluation", per_question=p.per_question, seed=run.seed, steer=steer
        ).to_parquet(out / "answers.parquet", index=False)
        evaluate.ask_advice(
            m,
            tok,
            run.setting,
            domains=run.profile.domains,
            seed=run.seed,
            limit=p.advice_subjects,
            steer=steer,
        ).to_parquet(out / "advice.parquet", index=False)

    folder = run.make(
        "suppressed",
        f"{domain}-{variant}",
        {
            "latent": latent,
            "strength": strength,
            "p": p.model_dump(),
            "model": adapter(run, domain, variant).name,
            "sae": sae_folder(run, "base").name,
        },
        (steering, generate, evaluate, grader, settings),
        make,
    )
    return _table(folder, "answers.parquet"), _table(folder, "advice.parquet")
