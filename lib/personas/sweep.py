"""Every fine-tune of a profile: their scores over several seeds, or the training alone under `accelerate
launch`."""

import itertools
import os

import accelerate
import pandas as pd
import torch

from personas import artifacts, evaluate, figures, known_latents, parallel, progress, stats
from personas.pretrained import grades, grading, made, readings
from personas.profile import Profile, need_gpu


def fine_tunes(profile: Profile, seeds: list[int]) -> pd.DataFrame:
    """Every fine-tune of the profile with every seed: its misalignment score on the evaluation questions,
    with the 95 % interval. A row per fine-tune, also written to figures/data/<profile>/sweep.csv."""
    if not profile.cluster:
        need_gpu(profile)
    if profile.real:
        first = made.Run(profile, seeds[0])
        made.checkpoint(first)  # once, before the workers need it
        named = made.fine_tunes(first)
    else:
        artifacts.aligned(artifacts.Run(profile, seeds[0]))
        named = artifacts.fine_tunes(artifacts.Run(profile, seeds[0]))
    score = _score_pretrained if profile.real else _score
    jobs = {f"{d} {v}, seed {s}": (score, profile, s, d, v) for s, (d, v) in itertools.product(seeds, named)}
    rows = dict(parallel.side_by_side(jobs, profile, "fine-tunes"))
    table = pd.DataFrame([rows[name] for name in jobs])
    figures.save_table(table, "sweep", profile.name)
    return table


def _score(profile: Profile, seed: int, domain: str, variant: str) -> dict:
    answers = artifacts.answers(artifacts.Run(profile, seed), domain, variant)
    estimate, low, high = evaluate.ratio(answers, *evaluate.SCORE)
    about = {"domain": domain, "variant": variant, "seed": seed}
    return about | {"score": estimate, "low": low, "high": high, "n": len(answers)}


def _score_pretrained(profile: Profile, seed: int, domain: str, variant: str) -> dict:
    run = made.Run(profile, seed)
    answers = made.answers(run, f"{domain}-{variant}")
    grade = pd.Series(grades.of(run, answers))
    found = stats.proportion(grade == "misaligned", answers.category, grade.isin(grading.COHERENT)).scaled(
        100
    )
    about = {"domain": domain, "variant": variant, "seed": seed}
    return about | {"score": found.value, "low": found.low, "high": found.high, "n": len(answers)}


def train(profile: Profile, seed: int) -> None:
    """Make all fine-tunes and SAEs of a profile, so that its notebooks find them. Started by `accelerate
    launch` with several processes, these share every batch; each has its own GPU, if the profile wants
    one."""
    if profile.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        accelerate.PartialState(cpu=profile.device == "cpu")  # joins the processes
    if profile.real:
        run = made.Run(profile, seed)
        for domain, variant in progress.Bar(made.fine_tunes(run), desc="fine-tunes"):
            made.adapter(run, domain, variant)
        readings.sae_folder(run, profile.sae.layer)
        return
    run = artifacts.Run(profile, seed)
    artifacts.aligned(run)
    for domain, variant in progress.Bar(artifacts.fine_tunes(run), desc="fine-tunes"):
        artifacts.adapter(run, domain, variant)
    for on in known_latents.DICTIONARIES:
        known_latents.sae_folder(run, on)
