"""Intervals that cover: simulated at the rates and correlations of clustered answers."""

import numpy as np
import pytest

from personas import stats


def clustered(rng, rate, correlation, clusters, each):
    """Answers (clusters * each,) whose clusters' rates follow a beta distribution of this mean and
    intra-class correlation."""
    a, b = (s * (1 - correlation) / correlation for s in (rate, 1 - rate))
    return (rng.random((clusters, each)) < rng.beta(a, b, clusters)[:, None]).ravel(), np.repeat(
        np.arange(clusters), each
    )


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
@pytest.mark.parametrize("correlation", [0.05, 0.2])
def test_proportion_covers(rate, correlation):
    rng, inside, draws = np.random.default_rng(0), 0, 400
    for _ in range(draws):
        found = stats.proportion(*clustered(rng, rate, correlation, 15, 9))
        inside += found.low <= rate <= found.high
        assert found.high > found.low
    assert inside / draws >= 0.92


def test_proportion_counts_only_what_is_counted():
    hits, counted = np.array([1, 1, 0, 0], bool), np.array([1, 0, 1, 0], bool)
    found = stats.proportion(hits, [0, 0, 1, 1], counted)
    assert found.value == 0.5 and found.n == 2
    assert np.isnan(stats.proportion(hits, [0, 0, 1, 1], np.zeros(4, bool)).value)


def test_corrected_removes_the_judges_bias_and_covers():
    rng, inside, plain_inside, draws = np.random.default_rng(1), 0, 0, 300
    for _ in range(draws):
        truth, where = clustered(rng, 0.4, 0.1, 15, 9)
        read, read_where = clustered(rng, 0.4, 0.1, 15, 9)
        judge = lambda t: np.where(
            rng.random(len(t)) < 0.3, True, t
        )  # calls three tenths of the good answers bad
        judged = judge(truth)
        found = stats.corrected(judged, np.ones(len(judged), bool), where, judge(read), read, read_where)
        plain = stats.proportion(judged, where)
        inside += found.low <= 0.4 <= found.high
        plain_inside += plain.low <= 0.4 <= plain.high
    assert inside / draws >= 0.92 > plain_inside / draws


def test_auroc_is_that_of_scikit_learn():
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    values, positive = rng.integers(0, 5, size=(200, 3)), rng.random(200) < 0.4
    assert stats.auroc(values, positive) == pytest.approx([roc_auc_score(positive, v) for v in values.T])
