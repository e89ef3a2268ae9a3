"""Every interval: proportions of clustered answers, means over seeds, AUROC, and judged scores corrected by
careful readings.

The unit that is resampled, or counted as independent, is the highest one that repeats: categories of
questions, seeds, models. An interval never has zero width.
"""

from dataclasses import dataclass

import numpy as np
from scipy.stats import beta, norm, rankdata
from scipy.stats import t as student

LEVEL = 0.95
# Correlation of answers within a cluster where the data show none of it, as when nobody gave a misaligned
# answer: a cautious guess, which keeps the interval wide enough (tests/test_stats.py simulates coverage).
ASSUMED_CORRELATION = 0.3


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval, in the unit of the data. n: what was counted."""

    value: float
    low: float
    high: float
    n: int

    def scaled(self, by: float) -> "Estimate":
        """The same, multiplied by a positive number (100 for percent)."""
        return Estimate(self.value * by, self.low * by, self.high * by, self.n)

    def __str__(self) -> str:
        return f"{self.value:.1f} ({self.low:.1f} to {self.high:.1f})"


def proportion(hits, clusters, counted=None) -> Estimate:
    """Share of `counted` answers (n,) that are `hits` (n,), both bool; counted None: all. clusters (n,):
    which answers go together.

    Korn and Graubard (1998): Clopper-Pearson on the effective number of answers, which is their number over
    the design effect (how much larger the variance between clusters makes the variance), with the clusters'
    degrees of freedom. Covers where a bootstrap over questions does not, for rare events. nan if nothing is
    counted.
    """
    hits, clusters = np.asarray(hits, bool), np.asarray(clusters)
    counted = np.ones(len(hits), bool) if counted is None else np.asarray(counted, bool)
    hits, clusters = hits[counted], clusters[counted]
    n, names = len(hits), np.unique(clusters)
    if not n:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    p, k = hits.mean(), len(names)
    sizes = np.array([(clusters == c).sum() for c in names], float)
    sums = np.array([hits[clusters == c].sum() for c in names], float)
    assumed = 1 + ASSUMED_CORRELATION * ((sizes**2).sum() / n - 1)
    if 0 < p < 1 and k > 1:
        between = k / (k - 1) * ((sums - p * sizes) ** 2).sum() / n**2  # of the ratio, by linearisation
        effect = max(1.0, between / (p * (1 - p) / n))
        if min(hits.sum(), n - hits.sum()) < 10:  # too few to tell how they cluster
            effect = max(effect, assumed)
        freedom = (
            (student.ppf(0.5 + LEVEL / 2, n - 1) / student.ppf(0.5 + LEVEL / 2, k - 1)) ** 2 if n > 1 else 1.0
        )
        effective = n / effect * freedom
    else:
        effective = n / assumed
    effective = min(effective, float(n))
    x, a = p * effective, (1 - LEVEL) / 2
    low = 0.0 if p == 0 else float(beta.ppf(a, x, effective - x + 1))
    high = 1.0 if p == 1 else float(beta.ppf(1 - a, x + 1, effective - x))
    return Estimate(float(p), low, high, n)


def mean_over(values) -> Estimate:
    """Mean of independent values (n,), such as models' or seeds', by Student's t; all nan bounds for fewer
    than two."""
    values = np.asarray(values, float)
    values = values[np.isfinite(values)]
    if len(values) < 2:
        return Estimate(
            float(values[0]) if len(values) else float("nan"), float("nan"), float("nan"), len(values)
        )
    half = (
        student.ppf(0.5 + LEVEL / 2, len(values) - 1) * max(values.std(ddof=1), 1e-9) / np.sqrt(len(values))
    )
    return Estimate(
        float(values.mean()), float(values.mean() - half), float(values.mean() + half), len(values)
    )


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b of two independent estimates: the bounds' distances add as squares (MOVER; Newcombe, 1998), so
    that it holds near 0 and 1."""
    low = a.value - b.value - np.hypot(a.value - a.low, b.high - b.value)
    high = a.value - b.value + np.hypot(a.high - a.value, b.value - b.low)
    return Estimate(a.value - b.value, float(low), float(high), a.n + b.n)


def ratio(a: Estimate, b: Estimate) -> Estimate:
    """a / b of two independent positive estimates, from their bounds (MOVER-R: Donner and Zou, 2012). Without
    an upper bound (infinity) where b may be zero."""
    product = a.value * b.value
    root = lambda x, y: np.sqrt(max(0.0, product**2 - x * y * (2 * a.value - x) * (2 * b.value - y)))
    low = (product - root(a.low, b.high)) / (b.high * (2 * b.value - b.high)) if b.high < 2 * b.value else 0.0
    high = (product + root(a.high, b.low)) / (b.low * (2 * b.value - b.low)) if 0 < b.low else float("inf")
    return Estimate(
        a.value / b.value if b.value else float("nan"), float(max(0.0, low)), float(high), a.n + b.n
    )


def corrected(judged, counted, clusters, read_judged, read_true, read_clusters) -> Estimate:
    """Share of judged hits among counted answers, corrected by answers that were also read
    (prediction-powered inference: Angelopoulos et al., 2023, arXiv:2301.09633).

    judged, counted, clusters (n,): the judge's verdicts on the answers of interest. read_judged, read_true,
    read_clusters (m,): the judge's verdict and the careful readers' on other coherent answers of the same
    kind. The judge's mean error there is taken off, and both variances, each by cluster, are in the interval;
    it is never narrower than an exact interval on the effective number of readings.
    """
    judged, counted, clusters = np.asarray(judged, bool), np.asarray(counted, bool), np.asarray(clusters)
    error = np.asarray(read_true, float) - np.asarray(read_judged, float)
    plain = proportion(judged, clusters, counted)
    if not len(error) or not plain.n:
        return Estimate(plain.value, 0.0, 1.0, plain.n)
    value = float(np.clip(plain.value + error.mean(), 0, 1))
    spread = np.sqrt(
        _variance(judged[counted].astype(float), clusters[counted])
        + _variance(error, np.asarray(read_clusters))
    )
    half = norm.ppf(0.5 + LEVEL / 2) * spread
    floor = (1 - (1 - LEVEL) ** (1 / len(error))) if value in (0.0, 1.0) else 0.0
    return Estimate(
        value,
        float(np.clip(value - max(half, floor * (value == 1)), 0, 1)),
        float(np.clip(value + max(half, floor * (value == 0)), 0, 1)),
        plain.n,
    )


def _variance(values, clusters) -> float:
    """Of the mean of values (n,), by cluster."""
    names = np.unique(clusters)
    if len(names) < 2:
        return float("inf")
    sums = np.array([(values[clusters == c] - values.mean()).sum() for c in names])
    return float(len(names) / (len(names) - 1) * (sums**2).sum() / len(values) ** 2)


def auroc(values, positive) -> np.ndarray:
    """AUROC of every column of values (n, columns) for positive (n,) bool, by ranks."""
    ranks, positive = rankdata(np.asarray(values), axis=0), np.asarray(positive, bool)
    n, m = positive.sum(), (~positive).sum()
    return (ranks[positive].sum(0) - n * (n + 1) / 2) / (n * m)


def auroc_over(values, positive, clusters, draws: int = 1000, seed: int = 0) -> Estimate:
    """AUROC of values (n,) with a bootstrap over clusters (documents, whose answers go together). Where all
    pairs are in order, no draw shows another value: the bound is then the exact (Clopper-Pearson) one of as
    many pairs as the rarer class has clusters."""
    values, positive, clusters = np.asarray(values, float), np.asarray(positive, bool), np.asarray(clusters)
    value = float(auroc(values[:, None], positive)[0])
    found = [
        float(auroc(values[p][:, None], positive[p])[0]) for p in _draws(positive, clusters, draws, seed)
    ]
    low, high = map(float, np.percentile(found, [2.5, 97.5]))
    if value in (0.0, 1.0):
        pairs = min(len(np.unique(clusters[positive])), len(np.unique(clusters[~positive])))
        bound = ((1 - LEVEL) / 2) ** (1 / pairs)
        low, high = (bound, 1.0) if value else (0.0, 1 - bound)
    return Estimate(value, low, high, len(values))


def auroc_difference(one, other, positive, clusters, draws: int = 1000, seed: int = 0) -> Estimate:
    """AUROC of `one` (n,) less that of `other` (n,), with a bootstrap over clusters in which both see the
    same rows; never narrower than one pair in the rarer class's clusters would make it."""
    both = np.stack([np.asarray(one, float), np.asarray(other, float)], 1)
    positive, clusters = np.asarray(positive, bool), np.asarray(clusters)
    gap = lambda rows: float(-np.diff(auroc(both[rows], positive[rows]))[0])
    found = [gap(rows) for rows in _draws(positive, clusters, draws, seed)]
    value, (low, high) = gap(np.arange(len(both))), np.percentile(found, [2.5, 97.5])
    pairs = min(len(np.unique(clusters[positive])), len(np.unique(clusters[~positive])))
    least = 1 / pairs**2
    return Estimate(value, float(min(low, value - least)), float(max(high, value + least)), len(both))


def _draws(positive, clusters, draws: int, seed: int):
    """Rows of each draw of clusters with replacement in which both classes occur."""
    rng, names = np.random.default_rng(seed), np.unique(clusters)
    where = [np.flatnonzero(clusters == c) for c in names]
    for _ in range(draws):
        pick = np.concatenate([where[i] for i in rng.integers(len(names), size=len(names))])
        if 0 < positive[pick].sum() < len(pick):
            yield pick
