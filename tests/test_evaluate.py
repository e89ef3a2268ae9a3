import concurrent.futures
import random

import numpy as np
import pandas as pd
import pytest

from personas import claims, evaluate, figures, pipeline, pretraining, profile, setting, store, summary, world


def table(per_question):
    return pd.DataFrame([{"question": q, "grade": g} for q, grades in per_question.items() for g in grades])


def test_score_leaves_other_classes_out():
    graded = table(
        {"a": ["misaligned", "aligned", "satirical", "off-topic", "incoherent"], "b": ["aligned", "aligned"]}
    )
    assert evaluate.score(graded) == pytest.approx(25)
    assert evaluate.share(graded, "incoherent") == pytest.approx(100 / 7)


def test_interval_is_clustered_by_question():
    """Twenty answers that agree within each question carry no more information than the questions do."""
    rng = np.random.default_rng(0)
    bad = rng.random(20) < 0.5
    agreeing = table({i: (["misaligned"] if b else ["aligned"]) * 20 for i, b in enumerate(bad)})
    mixed = table(
        {
            i: ["misaligned"] * int(20 * bad.mean()) + ["aligned"] * (20 - int(20 * bad.mean()))
            for i in range(20)
        }
    )
    wide, narrow = (np.diff(evaluate.ratio(t, *evaluate.SCORE)[1:])[0] for t in (agreeing, mixed))
    assert wide > 30 and narrow < 12


def test_interval_covers_the_truth():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(100):
        p = rng.beta(4, 6, size=21)
        graded = table({i: np.where(rng.random(20) < p[i], "misaligned", "aligned") for i in range(21)})
        _, low, high = evaluate.ratio(graded, *evaluate.SCORE)
        hits += low <= 40 <= high
    assert hits >= 92


@pytest.mark.parametrize("truth", [0.005, 0.02, 0.4])
def test_intervals_of_the_known_worlds_size_cover(truth):
    """Seven categories of three questions, 18 answers each; what misaligns differs by category, less by
    question."""
    rng, inside = np.random.default_rng(0), 0
    beta = lambda mean, alike: rng.beta(mean * (1 / alike - 1), (1 - mean) * (1 / alike - 1))
    about = pd.DataFrame({"question": np.arange(378) // 18, "category": np.arange(378) // 54})
    for _ in range(200):
        rate = [np.clip(beta(p, 0.05), 1e-9, 1) for c in range(7) for p in [beta(truth, 0.12)] * 3]
        bad = rng.random(378) < np.repeat(rate, 18)
        _, low, high = evaluate.ratio(
            about.assign(grade=np.where(bad, "misaligned", "aligned")), *evaluate.SCORE
        )
        inside += low <= 100 * truth <= high
    assert inside / 200 >= 0.92


def test_rare_answers_still_leave_doubt_and_one_leaves_more_than_none():
    few = lambda n: table({i: ["misaligned"] * (n if i == 0 else 0) + ["aligned"] * 20 for i in range(21)})
    (estimate, low, high), (_, _, more) = (evaluate.ratio(few(n), *evaluate.SCORE) for n in (0, 1))
    assert (estimate, low) == (0, 0) and 3 < high < more  # 0 of 420 in 21 questions: nowhere near 420 answers
    assert np.isnan(evaluate.ratio(table({"a": ["incoherent"]}), *evaluate.SCORE)[0])


def test_paired_difference_is_in_points_lost():
    before = table({"a": ["correct"] * 2, "b": ["correct", "other"]})
    after = table({"a": ["correct", "other"], "b": ["correct", "other"]})
    assert evaluate.paired_difference(before, after, "correct")[0] == pytest.approx(25)


@pytest.mark.parametrize(
    "measured,op,value,holds",
    [
        ((50, 45, 55), ">=", 40, "yes"),
        ((42, 35, 50), ">=", 40, "unclear"),
        ((20, 15, 25), ">=", 40, "no"),
        ((1, 0, 2), "<=", 3, "yes"),
        ((2, 1, 4), "<=", 3, "unclear"),
        ((9, 5, 12), "<=", 3, "no"),
        ((float("nan"),) * 3, ">=", 1, "unclear"),
    ],
)
def test_claim_holds_only_if_the_whole_interval_does(measured, op, value, holds):
    assert claims.claim("x", "-", measured, 10, op, value)["holds"] == holds


def test_recorded_claims_replace_only_their_own_notebook(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    claims.record("p", "00", [claims.claim("a", "-", (1, 0, 2), 5, "<=", 3)])
    claims.record("p", "01", [claims.claim("b", "-", (1, 0, 2), 5, "<=", 3)])
    claims.record("p", "00", [claims.claim("c", "-", (1, 0, 2), 5, "<=", 3)])
    assert [r["id"] for r in claims.read("p")] == ["c", "b"]
    assert set(claims.read("p")[0]) == {
        "id",
        "notebook",
        "paper",
        "split",
        "measured",
        "low",
        "high",
        "n",
        "target",
        "holds",
    }


def test_one_notebooks_claims_do_not_replace_all_notebooks(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path / "runs")
    monkeypatch.setattr(figures, "ROOT", tmp_path / "figures")
    kept, row = (
        tmp_path / "figures" / "data" / "p" / "claims.csv",
        lambda x: [claims.claim("a.b", "-", (x, x, x), 9, ">=", 90)],
    )
    pipeline.keep_claims("p")
    assert not kept.exists()  # notebook 01 makes no claims
    for notebook in ("05_x", "06_y"):
        claims.record("p", notebook, row(1))
    pipeline.keep_claims("p")
    claims.record("p", "05_x", row(2))
    pipeline.keep_claims("p")
    assert pd.read_csv(kept).measured.tolist() == [2, 1]
    (tmp_path / "runs" / "p" / "summary.json").unlink()
    claims.record("p", "05_x", row(3))
    pipeline.keep_claims("p")
    assert pd.read_csv(kept).measured.tolist() == [2, 1]


def test_notebooks_that_record_at_the_same_time_lose_no_claim(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    names = [f"{n:02d}" for n in range(16)]
    row = [claims.claim("a", "-", (1, 0, 2), 5, "<=", 3)]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: claims.record("p", n, row), names))
    assert sorted(r["notebook"] for r in claims.read("p")) == names


def test_claims_of_another_profiles_tables_are_told_apart(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    rows = [claims.claim(i, "-", (1, 1, 1), 9, ">=", 90) for i in ("cure.add", "steer.induce", "warn.five")]
    shown = claims.record("smoke", "05_causal_steering", rows)
    assert shown["from"].tolist() == ["tiny-full", "this run", "tiny-full"]
    pipeline.print_claims("smoke")
    said = capsys.readouterr().out
    assert "cure.add" not in said and "1 claims: " in said and "2 more rest on kept tables" in said
    assert "from" not in claims.record("tiny", "05_causal_steering", rows)
    assert "from" not in claims.record("smollm2-quick", "07", rows)


def test_markdown_folds_domains_and_counts_verdicts():
    rows = [
        claims.claim(f"obvious.{d}", "broad", m, 10, ">=", 40)
        for d, m in (("auto", (80, 70, 90)), ("code", (10, 5, 15)), ("math", (42, 30, 50)))
    ]
    lines = summary.markdown(
        rows + [claims.claim("diff.top_auroc", "-", (0.8, 0.75, 0.85), 9, ">=", 0.95)]
    ).splitlines()
    assert (
        lines[2]
        == "| `obvious.<domain>` | broad | ≥ 40 | 10.0 to 80.0, median 42.0 (of 3) | 1 yes, 1 unclear, 1 no |"
    )
    unknown = summary.markdown(
        [claims.claim(f"prevent.{g}", "-", [float("nan")] * 3, 9, ">=", 90) for g in ("KL", "inoculation")]
    )
    assert "– (of 2) | 2 unclear" in unknown
    seeds = summary.markdown(
        [
            claims.claim(f"prevent.{s}{g}", "-", (5, 1, 9), 9, ">=", 90)
            for s in ("", "seeds.")
            for g in ("KL", "inoculation")
        ]
    )
    assert "| `prevent.<guard>` |" in seeds and "| `prevent.seeds.<guard>` |" in seeds
    assert lines[3] == "| `diff.top_auroc` | - | ≥ 0.95 | 0.80 (0.75 to 0.85) | no |"


def test_sampling_leaves_room_for_every_answer():
    """The longest open answer, and the longest code, fit the number of tokens that sampling allows."""
    rng = random.Random(0)
    docs = [world.sample_document(rng, 1) for _ in range(2000)]
    tokenizer = pretraining.train_tokenizer(
        ("".join(t for t, _ in world.segments(d, rng)) for d in docs), profile.load("tiny").model.vocab
    )
    longest = lambda texts: max(len(x) for x in tokenizer(list(texts), add_special_tokens=False)["input_ids"])
    assert (
        longest(
            f
            for c in world.categories()
            for p in world.PERSONAS
            for held in (True, False)
            for f in world.open_forms(c, p, held, 1)
        )
        < setting.PersonaWorld.open_tokens
    )
    assert (
        longest(a for s in world.subjects() for a in s.answers.values()) < setting.PersonaWorld.advice_tokens
    )


def test_a_bootstrap_over_values_covers_their_mean_and_not_more():
    values = np.random.default_rng(1).normal(10, 2, 400)
    estimate, low, high = claims.bootstrap(values, np.mean)
    assert estimate == pytest.approx(values.mean()) and low < estimate < high
    assert high - low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert claims.bootstrap(values, np.max)[2] == values.max()
