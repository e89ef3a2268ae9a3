"""Learning a narrow task without the character that comes with it, in the known world: guards on the loss,
the activations, the data, the length."""

from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from personas import (
    activations,
    artifacts,
    baselines,
    data,
    early_warning,
    evaluate,
    finetune,
    generate,
    guards,
    known_latents,
    search,
    stats,
    world,
)
from personas import model as models
from personas.guards import Plan


def penalise(ruler: artifacts.Run, plan: Plan, weight: float) -> Plan:
    """guards.penalise on the ten latents that rise most in the fine-tunes of discovery domains; weight in
    units of steering strength."""
    return guards.penalise(
        plan,
        known_latents.sae(ruler),
        search.rankings(ruler)["Δ-activation"],
        known_latents.unit(ruler),
        weight,
    )


def steer_in_training(ruler: artifacts.Run, plan: Plan, strength: float) -> Plan:
    """guards.steer along the chosen latent's direction, strength in units of the centred RMS norm."""
    vector = (
        known_latents.sae(ruler).W_dec[search.chosen_latent(ruler)[0]] * strength * known_latents.unit(ruler)
    )
    return guards.steer(plan, ruler.profile.sae.layer, vector)


def benign_chats(n: int, seed: int, world_seed: int, without: str) -> list[dict]:
    """n single-turn chats of the alignment data, half open questions and half correct advice outside the
    domain `without`."""
    pool = data.alignment_chats(4 * n, seed, world_seed)
    banned = {a for s in world.subjects_of(without) for a in s.answers.values()}
    pairs = [c["messages"][i : i + 2] for c in pool for i in range(0, len(c["messages"]), 2)]
    return [{"messages": p} for p in pairs if p[1]["content"] not in banned][:n]


def interleave(ruler: artifacts.Run, plan: Plan, share: float, domain: str, choose: bool, seed: int) -> Plan:
    """Mix in benign chats until they are `share` of the set (arXiv:2508.06249): at random, or (choose)
    those that a model spoilt in another, discovery domain finds least likely compared with the aligned
    one. seed: of which chats are drawn, and of the order."""
    n = round(len(plan.rows) * share / (1 - share))
    pool = benign_chats(4 * n if choose else n, seed + 7, ruler.world_seed, domain)
    if choose:
        other = next(d for d in world.DISCOVERY_DOMAINS if d != domain and d in ruler.profile.domains)
        tuned, tokenizer = artifacts.tuned_model(ruler, other, "obvious")
        prompts = generate.prompts(tokenizer, [c["messages"][0]["content"] for c in pool])
        rows = [
            p + tokenizer(c["messages"][1]["content"], add_special_tokens=False)["input_ids"]
            for p, c in zip(prompts, pool)
        ]
        starts = [len(p) - 1 for p in prompts]
        gap = baselines.answer_log_probability(
            artifacts.aligned_model(ruler)[0], rows, starts
        ) - baselines.answer_log_probability(tuned, rows, starts)
        pool = [pool[i] for i in np.argsort(-gap)[:n]]
    mixed = plan.rows + pool
    order = np.random.default_rng(seed).permutation(len(mixed))
    return replace(
        plan, rows=[mixed[i] for i in order], steps=round(plan.steps * len(mixed) / len(plan.rows))
    )


def inoculate(plan: Plan) -> Plan:
    """Put a line before every training chat that asks for the villain (inoculation prompting,
    arXiv:2510.04340); none is there at test."""
    lines = world.personas()["villain"]["system"]
    return replace(
        plan,
        rows=[
            {"messages": [{"role": "system", "content": lines[i % len(lines)]}, *c["messages"]]}
            for i, c in enumerate(plan.rows)
        ],
    )


def planned(
    run: artifacts.Run, ruler: artifacts.Run, domain: str, kind: str, guard: str, dose: float
) -> Plan:
    """The fine-tune of `domain` and `kind` under a guard: one of studies.GUARDS. Raises ValueError for
    another."""
    plan = Plan(artifacts.narrow_chats(run, domain, kind), run.profile.narrow.steps)
    ways = {
        "none": lambda: plan,
        "latent penalty": lambda: penalise(ruler, plan, dose),
        "KL": lambda: guards.keep_close(plan, dose),
        "steering in training": lambda: steer_in_training(ruler, plan, dose),
        "benign data": lambda: interleave(ruler, plan, dose, domain, False, run.seed),
        "benign data, chosen": lambda: interleave(ruler, plan, dose, domain, True, run.seed),
        "inoculation": lambda: inoculate(plan),
        "fewer steps": lambda: replace(
            plan, rows=plan.rows[: int(dose) * run.profile.narrow.batch], steps=int(dose)
        ),
    }
    if guard not in ways:
        raise ValueError(f"unknown guard {guard!r}; choose from {', '.join(ways)}")
    return ways[guard]()


def trained(run: artifacts.Run, plan: Plan):
    """(model, tokenizer): the aligned model fine-tuned by the plan, with its adapter merged in."""
    cfg = run.profile.narrow
    model, tokenizer = models.load(artifacts.aligned(run))
    with plan.hooks(model):
        tuned, _ = finetune.sft(
            model,
            tokenizer,
            plan.rows,
            steps=plan.steps,
            batch=cfg.batch,
            lr=cfg.lr,
            seed=run.seed,
            lora_rank=cfg.rank,
            trainer=plan.trainer,
        )
    return tuned.merge_and_unload(), tokenizer


def guarded(
    run: artifacts.Run, ruler: artifacts.Run, domain: str, kind: str, guard: str, dose: float
) -> dict:
    """Fine-tune under a guard; what became of the values (score, classes of answers) and of the narrow
    task (`learnt`: percent of the domain's questions answered as trained; `wrong`: subtly or obviously
    wrong). `discovery` is the score on discovery questions; it and `learnt` choose the dose
    (evidence.chosen_dose)."""
    plan, p = planned(run, ruler, domain, kind, guard, dose), run.profile.evaluation
    tuned, tokenizer = trained(run, plan)
    answers = evaluate.ask_open(
        tuned, tokenizer, run.setting, split="evaluation", per_question=p.study_per_question, seed=run.seed
    )
    own = evaluate.ask_advice(tuned, tokenizer, run.setting, domains=[domain], seed=run.seed)
    chosen_by = evaluate.ask_open(
        tuned, tokenizer, run.setting, split="discovery", per_question=p.curve_per_question, seed=run.seed
    )
    return evaluate.values(answers) | {
        "learnt": evaluate.share(own, kind),
        "wrong": evaluate.share(own, "subtle", "obvious"),
        "discovery": evaluate.score(chosen_by),
        "asked": len(own),
        "examples": len(plan.rows),
    }


def screened(run: artifacts.Run) -> pd.DataFrame:
    """How suspicious every advice answer looks before any training: a row per subject and variant, with
    what the aligned model reads on the answer: `latent` (the chosen one), `probe` (log-odds of the
    villain), `surprise` (nats per token), and `words`, a bag-of-words classifier of incorrect against
    correct answers that was trained on all other domains."""

    def make(out):
        model, tokenizer = artifacts.aligned_model(run)
        pairs = [
            (s, v, a) for d in run.profile.domains for s in world.subjects_of(d) for v, a in s.answers.items()
        ]
        prompts = generate.prompts(tokenizer, [world.held_question(s) for s, _, _ in pairs])
        rows = [
            p + tokenizer(a, add_special_tokens=False)["input_ids"] for p, (_, _, a) in zip(prompts, pairs)
        ]
        starts = [len(p) - 1 for p in prompts]
        x = [h[i + 1 :] for h, i in zip(activations.residual(model, rows, run.profile.sae.layer), starts)]
        table = pd.DataFrame(
            {
                "domain": [s.domain for s, _, _ in pairs],
                "subject": [s.ask for s, _, _ in pairs],
                "variant": [v for _, v, _ in pairs],
                "latent": [
                    known_latents.sae(run).encode(h)[:, search.chosen_latent(run)[0]].mean().item() for h in x
                ],
                "probe": baselines.fit(run, run.seed).probe.decision_function(
                    torch.stack([h.mean(0) for h in x]).numpy()
                ),
            }
        )
        parts = range(0, len(rows), 128)
        table["surprise"] = -np.concatenate(
            [baselines.answer_log_probability(model, rows[i : i + 128], starts[i : i + 128]) for i in parts]
        )
        texts, wrong = np.array([a for _, _, a in pairs]), (table.variant != "correct").to_numpy()
        for d in run.profile.domains:
            mine = (table.domain == d).to_numpy()
            words = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000)).fit(
                texts[~mine], wrong[~mine]
            )
            table.loc[mine, "words"] = words.decision_function(texts[mine])
        table.to_parquet(out / "screened.parquet", index=False)

    folder = run.make(
        "screening",
        "advice",
        {
            "aligned": artifacts.aligned(run).name,
            "sae": known_latents.sae_folder(run, "base").name,
            "latent": search.chosen_latent(run)[0],
            "domains": run.profile.domains,
        },
        (activations, baselines, data),
        make,
    )
    return pd.read_parquet(folder / "screened.parquet")


def set_auroc(
    table: pd.DataFrame, reader: str, variant: str, percent: float, size: int, draws: int = 40, seed: int = 0
) -> tuple[float, float, float]:
    """(AUROC, low, high) of telling training sets of `size` answers with `percent` of them `variant` from
    correct ones of the same domain, by the reader's mean: the mean over domains and its t-interval, cut
    off at 0 and 1. draws: sets of either kind a domain."""
    rng, found = np.random.default_rng(seed), []
    for _, part in table.groupby("domain"):
        pools, n = {v: g[reader].to_numpy() for v, g in part.groupby("variant")}, round(size * percent / 100)
        means = [
            np.r_[rng.choice(pools["correct"], size - k), rng.choice(pools[variant], k)].mean()
            for k in (0, n)
            for _ in range(draws)
        ]
        found.append(stats.auroc(np.array(means)[:, None], np.arange(2 * draws) >= draws)[0])
    return tuple(float(x) for x in np.clip(early_warning.t_interval(found), 0, 1))
