"""All cases of the bench, side by side, and the table: `python -m personas bench [my_method.py]`."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import save_file
from scipy.stats import permutation_test, spearmanr

from personas import artifacts, figures, known_latents, parallel, sae, stats, store
from personas.bench import case as cases
from personas.bench import methods, outputs, score
from personas.profile import Profile, ProfileError

RANGE = {
    "auroc": (0, 1),
    "separates": (0, 1),
    "induced": (0, 100),
    "advice": (0, 100),
    "suppressed": (-np.inf, 100),
}
PART_ONE = {  # what notebook 05 steers with -> the method that finds it here
    "causal latent": "rise_screened",
    "top riser": "rise",
    "difference of means": "mean_difference",
    "persona vector": "persona_vector",
    "probe": "linear_probe",
    "random": "random_direction",
}
CEILING = "truth"  # the one method that is told the target: what a direction can reach


def cells(profile: Profile, base_models: int | None = None) -> list[dict]:
    """The cases of the bench. Methods that leave nothing to chance meet those of the first dictionary
    seed."""
    return [
        {"base model": p, "domain": d, "target": t, "dictionary seed": s}
        for p in profile.study.pretraining_seeds[:base_models]
        for d in profile.study.domains
        for t in cases.TARGETS
        for s in profile.study.seeds
    ]


def measured(profile: Profile, named: list[str], cell: dict) -> list[dict]:
    """One row for each of these methods: what it finds in this case, scored. Kept in the store by its
    code."""
    run, kept = cases.runs(profile, cell["base model"]), {}

    def one():  # made only if a method has not met it yet
        if not kept:
            kept["case"] = cases.case(run, cell["domain"], cell["target"], cell["dictionary seed"])
        return kept["case"]

    return [_row(run, m, cell, one) for m in named]


def _row(run: artifacts.Run, method: str, cell: dict, case) -> dict:
    profile, name = run.profile, Path(method).stem

    def make(out):
        found = methods.direction(method, case())
        save_file({"direction": found.contiguous()}, out / "direction.safetensors")
        row = score.scored(run, cell["domain"], cell["target"], found)
        (out / "row.json").write_text(json.dumps(row))

    about = cell | {
        "layer": profile.sae.layer,
        "doses": [profile.steering.strengths, profile.steering.suppression],
        "evaluation": profile.evaluation.model_dump(),
        "model": artifacts.adapter(run, cell["domain"], cases.kind(cell["target"])).name,
        "sae": known_latents.sae_folder(replace(run, seed=cell["dictionary seed"]), "base").name,
        "method": store.code_version(methods.load(method)),
    }
    label = "-".join([name, cell["domain"], cell["target"], str(cell["dictionary seed"])])
    folder = run.make("bench", label, about, (score, cases, outputs, sae, *score.CODE), make)
    return {"method": name} | cell | json.loads((folder / "row.json").read_text())


def prepared(profile: Profile, pretraining_seed: int) -> None:
    """What all methods need of one base model: its fine-tunes and dictionaries."""
    run = cases.runs(profile, pretraining_seed)
    for seed in profile.study.seeds:
        known_latents.sae_folder(replace(run, seed=seed), "base")
    for d in profile.study.domains:
        for t in (*cases.TARGETS, *cases.HARMLESS):
            score.shift(run, d, t)


def rows(profile: Profile, named: list[str], base_models: int | None = None) -> pd.DataFrame:
    """Every case of these methods, computed side by side where the store lacks them."""
    for method in named:
        methods.load(method)  # a file that does not serve is refused before any work
    if len(profile.study.domains) < 2:
        raise ProfileError(
            "study.domains: the bench needs two or more; it scores a direction on fine-tunes in other domains"
        )
    seeds = profile.study.pretraining_seeds[:base_models]
    for _ in parallel.side_by_side(
        {f"base model {p}": (prepared, profile, p) for p in seeds}, profile, "fine-tunes and dictionaries"
    ):
        pass
    first = profile.study.seeds[0]
    meets = lambda m, c: c["dictionary seed"] == first or getattr(methods.load(m), "CHANCE", False)
    jobs = {}
    for cell in cells(profile, base_models):
        if some := [m for m in named if meets(m, cell)]:
            jobs[", ".join(map(str, cell.values()))] = (measured, profile, some, cell)
    return pd.DataFrame([r for _, found in parallel.side_by_side(jobs, profile, "bench") for r in found])


def estimate(rows: pd.DataFrame, question: str) -> stats.Estimate:
    """One method's mean with its 95 % interval over base models: for `named`, a yes or no, that of a
    proportion with base models as clusters; else Student's t over base models, each the mean of its cases."""
    if question == "named":
        return stats.proportion(rows.named == 1, rows["base model"])
    e = stats.mean_over(rows.groupby("base model")[question].mean().to_numpy())
    least, most = RANGE[question]
    return replace(e, low=float(np.clip(e.low, least, most)), high=float(np.clip(e.high, least, most)))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Per method and question: the mean with its interval (estimate), and the method's rank by that mean, 1
    being best. Cases whose fine-tune hardly became the target (score.EFFECT) do not count."""
    table = table[table.effect >= score.EFFECT]
    if table.empty:
        raise ValueError(
            "no case counts: in none did the fine-tune become its target. Take more base models or another "
            "profile than this"
        )
    found = [
        {"method": m, "question": q, "value": e.value, "low": e.low, "high": e.high, "n": e.n}
        for m, rows in table.groupby("method")
        for q in score.QUESTIONS
        for e in [estimate(rows, q)]
    ]
    out = pd.DataFrame(found)
    ours = out.method != CEILING
    out.loc[ours, "rank"] = out[ours].groupby("question").value.rank(ascending=False, method="average")
    return out


def agreement(table: pd.DataFrame) -> pd.DataFrame:
    """Spearman's correlation of the methods' scores between every pair of questions: do they reward the same
    methods?"""
    wide = (
        summary(table).query("method != @CEILING").pivot(index="method", columns="question", values="value")
    )
    return wide[list(score.QUESTIONS)].corr(method="spearman")


def beside_part_one(table: pd.DataFrame, curves: pd.DataFrame, down: pd.DataFrame) -> pd.DataFrame:
    """A row per method that both parts have: percent of answers that it induces, and of the target's answers
    that it suppresses, here and in Part I; nan where Part I did not try it. curves, down: Part I's tables
    05_curves and 05_suppression. There `induced` is the largest percent of misaligned answers at a dose that
    breaks at most score.CAP points more than no steering does, 0 if every dose breaks more; `suppressed` is
    the percent of the score that goes, a mean over models. Part I's dose is picked on these very answers."""
    here = summary(table).pivot(index="method", columns="question", values="value")
    most = curves.broken[curves.direction == "none"].iloc[0] + score.CAP
    whole = curves.score.where(curves.broken <= most, 0.0)
    induced = whole.groupby(curves.direction).max()
    gone = 100 - down.groupby("direction").kept.mean()
    return pd.DataFrame(
        [
            {
                "Part I": name,
                "bench": method,
                "induced, Part I": induced.get(name),
                "induced, bench": here.induced[method],
                "suppressed, Part I": gone.get(name),
                "suppressed, bench": here.suppressed[method],
            }
            for name, method in PART_ONE.items()
        ]
    )


def rank_correlation(a: pd.Series, b: pd.Series) -> tuple[float, float]:
    """(Spearman's correlation of a and b, a value a method each, and its two-sided p value over every
    permutation: for ten values at most, or it takes for ever). Methods without both values do not count."""
    both = pd.DataFrame({"a": a, "b": b}).dropna()
    spearman = lambda x: spearmanr(x, both.b).statistic
    found = permutation_test((both.a.to_numpy(),), spearman, permutation_type="pairings", n_resamples=np.inf)
    return float(found.statistic), float(found.pvalue)


def shown(table: pd.DataFrame, mine: str | None = None) -> str:
    """The table as text, a method a row, best mean rank first; `mine` is marked."""
    s = summary(table)
    s["text"] = [
        f"{v:.2f}" if q in ("named", "auroc", "separates") else f"{v:.0f}"
        for v, q in zip(s.value, s.question)
    ]
    wide = s.pivot(index="method", columns="question", values="text")[list(score.QUESTIONS)]
    wide["mean rank"] = s.groupby("method")["rank"].mean().round(1)
    wide = wide.sort_values("mean rank", na_position="first").rename(
        index=lambda m: f"> {m}" if m == mine else m
    )
    return wide.to_string()


def kept(profile: str) -> pd.DataFrame:
    """The committed rows of the methods that ship; none for a profile that has no committed table."""
    path = figures.table(profile, "bench")
    return pd.read_csv(path) if path.exists() else pd.DataFrame(columns=["method", "base model"])


def run(profile: Profile, method: str | None = None, base_models: int | None = None) -> None:
    """Score one method beside the committed rows of those that ship; without one, score these and commit
    their rows to figures/data/<profile>/bench.csv."""
    store.writable(need_gb=1.0)
    most = len(profile.study.pretraining_seeds)
    if base_models is not None and not 1 <= base_models <= most:
        raise ValueError(f"--base-models takes 1 to {most}, not {base_models}")
    if method is None:
        table = rows(profile, methods.names(), base_models)
        order = ["method", "base model", "domain", "target", "dictionary seed"]
        table = table.sort_values(order).round(4)
        if base_models is None:
            figures.save_table(table, "bench", profile.name)
        print(shown(table))
        return
    mine = rows(profile, [method], base_models)
    others = kept(profile.name)
    others = others[others["base model"].isin(mine["base model"]) & (others.method != Path(method).stem)]
    print(shown(pd.concat([mine, others], ignore_index=True), Path(method).stem))
    print("\n" + mine.drop(columns=["method"]).round(2).to_string(index=False))
