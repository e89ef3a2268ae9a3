"""Early warning: when does a monitor leave what benign fine-tunes read, and how long before the
misalignment score?"""

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from personas import stats

RUN = ["domain", "kind", "seed"]  # what names one training run in a table


def t_interval(values) -> tuple[float, float, float]:
    """(mean, low, high) by Student's t over independent values, such as seeds' means; nan bounds for a
    single one, all nan for none, and where one of them is nan."""
    values = np.asarray(values, float)
    e = stats.mean_over(values if np.isfinite(values).all() else [])
    return e.value, e.low, e.high


def percent_interval(values, answers: int) -> tuple[float, float, float]:
    """t_interval of percentages (n,), kept within 0 to 100. Where all are 0 (or all 100) they show no
    spread, and the exact binomial (Clopper-Pearson) interval of the `answers`, or models, that were
    counted is given instead."""
    mean, low, high = (float(x) for x in np.clip(t_interval(values), 0, 100))
    if mean in (0, 100):
        low, high = (100 * x for x in binomtest(answers if mean else 0, answers).proportion_ci())
    return mean, low, high


def limit(benign: pd.DataFrame, column: str) -> float:
    """The highest reading of any benign run, at any time. No distribution is assumed: kinds of benign data
    form clusters."""
    return float(benign[column].max())


def exits(runs: pd.DataFrame, column: str, above: float) -> pd.Series:
    """Per run the first step at which `column` is above the limit; nan if it never is."""
    first = runs[runs[column] > above].groupby(RUN).step.min()
    return first.reindex(runs.groupby(RUN).size().index)


def discrimination(
    models: pd.DataFrame, column: str, misaligned: np.ndarray, draws: int = 1000, seed: int = 0
) -> tuple[float, float, float]:
    """(AUROC, low, high) of one monitor over models; the bootstrap resamples domains and seeds together
    (fine-tunes that share both)."""
    groups = models.groupby(["domain", "seed"]).ngroup().to_numpy()
    e = stats.auroc_over(models[column], misaligned, groups, draws, seed)
    return e.value, e.low, e.high
