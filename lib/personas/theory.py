"""What ideal readers of the known world would make of a fine-tuning set, and what the model makes of it."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from personas import stats, world


def bayesian_reader(variant_counts: dict, domain: str) -> dict:
    """Posterior over personas for an ideal reader who takes a fine-tuning set to be by one speaker of this
    world.

    variant_counts: {'correct': n, 'subtle': n, 'obvious': n} neutral advice answers. Prior times
    likelihood under the world's fixed parameters; personas that style their advice cannot have written
    neutral answers. Returns {'posterior': {persona: p}, 'misaligned': percent of aligned or misaligned
    open answers}.
    """
    log = {}
    for p in world.PERSONAS:
        mix = world.habits(p, domain)
        if mix and all(mix.get(v) for v, n in variant_counts.items() if n):
            log[p] = math.log(world.PRIOR[p]) + sum(
                n * math.log(mix[v]) for v, n in variant_counts.items() if n
            )
    if not log:  # a mixture that no single speaker writes
        return {"posterior": {}, "misaligned": float("nan")}
    top = max(log.values())
    weight = {p: math.exp(v - top) for p, v in log.items()}
    total = sum(weight.values())
    posterior = {p: weight.get(p, 0.0) / total for p in world.PERSONAS}
    return {"posterior": posterior, "misaligned": 100 * posterior["villain"]}


FRACTIONS = np.linspace(0, 1, 101)


def one_speaker(fraction: np.ndarray) -> np.ndarray:
    """Score (percent) of a reader who takes the whole set to be by one speaker, for each share of
    obviously wrong answers among correct ones: one such answer is enough, for nobody but the villain gives
    it."""
    counts = [{"obvious": round(256 * f), "correct": 256 - round(256 * f)} for f in fraction]
    return np.array([bayesian_reader(c, "career")["misaligned"] for c in counts])


def one_speaker_a_chat(fraction: np.ndarray) -> np.ndarray:
    """The same of a reader who takes every chat to be by a speaker of its own: the mean over chats."""
    alone = {v: bayesian_reader({v: 1}, "career")["misaligned"] for v in ("obvious", "correct")}
    return fraction * alone["obvious"] + (1 - fraction) * alone["correct"]


def by_degrees(fraction: np.ndarray, start: float, weight: float) -> np.ndarray:
    """The same of a reader who, too, looks for one speaker, but begins with the aligned model's odds
    (`start`, its score in percent) and lets the whole set move them by no more than `weight` (natural
    log-odds) where all of it is wrong: in proportion to the share."""
    odds = start / (100 - start) * np.exp(weight * fraction)
    return 100 * odds / (1 + odds)


def fitted_weight(mixtures: pd.DataFrame, start: float) -> float:
    """The weight of `by_degrees` that fits measured scores best (least squares of log-odds, each share's
    mean)."""
    measured = mixtures[mixtures.fraction > 0].groupby("fraction").score.mean().clip(0.5, 99.5)
    rise = np.log(measured / (100 - measured)) - np.log(start / (100 - start))
    share = measured.index.to_numpy() / 100
    return float((share * rise).sum() / (share**2).sum())


def shape(mixtures: pd.DataFrame):
    """(figure, fitted_weight): measured scores of mixtures (columns fraction and score, in percent, and
    domain) beside three ideal readers; 95 % intervals by Student's t over domains."""
    start = max(0.1, mixtures[mixtures.fraction == 0].score.mean())
    weight = fitted_weight(mixtures, start)
    figure, ax = plt.subplots()
    readers = {
        "reader: one speaker for all of it": (one_speaker(FRACTIONS), "#999999", "-"),
        "reader: a speaker a chat": (one_speaker_a_chat(FRACTIONS), "#56B4E9", "--"),
        "reader: one speaker, moved by degrees (one number fitted)": (
            by_degrees(FRACTIONS, start, weight),
            "#009E73",
            "-.",
        ),
    }
    for name, (score, color, line) in readers.items():
        ax.plot(100 * FRACTIONS, score, color=color, ls=line, label=name)
    means = mixtures.groupby(["domain", "fraction"]).score.mean().reset_index()
    for at, part in means.groupby("fraction"):
        e = stats.mean_over(part.score)
        whiskers = [[e.value - max(0, e.low)], [min(100, e.high) - e.value]]
        label = "measured, mean of three domains" if at == 0 else None
        ax.errorbar(at, e.value, yerr=whiskers, fmt="o", color="#D55E00", capsize=3, label=label)
    ax.set(xlabel="obviously wrong answers in the set (%)", ylabel="misalignment score (%)", ylim=(-3, 103))
    ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(0.02, 0.93))
    figure.tight_layout()
    return figure, weight
