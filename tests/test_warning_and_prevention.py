"""Notebooks 07 and 08: fine-tunes that are watched or guarded, their tables, and what is made of these."""

import json

import numpy as np
import pandas as pd
import pytest
import torch

from personas import finetune, profile, stats, store
from personas.chapters import c07, c08, common
from personas.part_two import warning
from personas.pretrained import grades, guarded, made, monitors, readings, screening, search, steering, tables
from test_real_track import own_store, written  # noqa: F401 (a fixture that every test uses)

ONE = {
    "domains": ["cars"],
    "seeds": [0],
    "fractions": [0, 100],
    "looks": [0, 1, 2],
    "harmless": ["correct"],
    "guarded": ["cars"],
    "guarded_seeds": [0],
    "guards": ["none", "inoculation", "low rank"],
}


@pytest.fixture
def run(given, monkeypatch):
    """A small random model with its own sets; the search's choice is given, not made."""
    found = common.open_run(written(given, "watched", tables=ONE))
    monkeypatch.setattr(search, "causal", lambda run: 3)
    return found


def test_a_watched_fine_tune_is_read_at_every_look_and_asked_the_same(run):
    folder = tables.folder(
        tables.TABLES["07_course"], run.profile, {"seed": 0, "domain": "cars", "variant": "obvious"}
    )
    answers, read = (pd.read_parquet(folder / f"{n}.parquet") for n in ("answers", "monitors"))
    assert list(read.step) == [0, 1, 2] and set(monitors.MONITORS) <= set(read)
    per_look = answers.groupby("step").prompt.apply(list)
    assert per_look[0] == per_look[2] == [i.prompt for i in made.repeated(run, "evaluation", 1)]
    untrained = monitors.read(run, *made.original(run))
    assert {m: read[m][0] for m in monitors.READ} == pytest.approx(untrained, abs=1e-3)
    assert (read[list(monitors.READ)].diff().iloc[1:].abs().sum(axis=1) > 0).all()
    assert read.loss.iloc[1:].notna().all() and read["gradient norm"].iloc[1:].gt(0).all()


def test_the_monitors_read_what_a_plain_pass_reads(run):
    m, tok = made.original(run)
    rows, starts, _ = readings.fixed_text(tok, "evaluation", n=1)
    with torch.no_grad():
        hidden = [m(torch.tensor([r]), output_hidden_states=True).hidden_states[2][0] for r in rows]
    mean = torch.stack([h[i:].mean(0) for h, i in zip(hidden, starts)]).mean(0)
    v = steering.rivals(run)["persona vector"]
    assert monitors.read(run, m, tok)["persona vector"] == pytest.approx(
        (mean @ v / v.norm()).item(), rel=1e-3
    )


def test_a_killed_table_goes_on_and_counts_what_was_graded(run, monkeypatch):
    """Cells are kept one by one; a table is made of kept cells without another fine-tune."""
    table = tables.TABLES["07_mixtures"]
    tables.make(table, run.profile)
    monkeypatch.setattr(finetune, "sft", lambda *a, **k: pytest.fail("a kept cell was made again"))
    monkeypatch.setattr(
        grades, "of", lambda run, t: ["misaligned"] * (len(t) // 2) + ["aligned"] * (len(t) - len(t) // 2)
    )
    found = tables.compute(table, run.profile)
    assert list(found.variant) == ["obvious@0", "obvious@100"]
    assert list(found.score) == [100.0, 0.0] and (found.answers == 16).all()


@pytest.mark.parametrize("guard", ["benign data", "inoculation", "low rank", "fewer steps", "more steps"])
def test_guards_change_what_they_say(run, guard):
    none = guarded.planned(run, run, "cars", "none", 0)
    dose = guarded.GUARDS[guard][0]
    plan = guarded.planned(run, run, "cars", guard, dose)
    said = lambda p: [m["content"] for r in p.rows for m in r["messages"] if m["role"] == "assistant"]
    if guard == "benign data":
        assert len(plan.rows) == len(none.rows) and plan.steps == none.steps
        assert len(set(said(none)) - set(said(plan))) == round(dose * len(none.rows))
    elif guard == "inoculation":
        assert said(plan) == said(none)
        assert all(r["messages"][0] == {"role": "system", "content": guarded.ASKED_FOR} for r in plan.rows)
    elif guard == "low rank":
        assert plan.rank == dose and plan.rows == none.rows
    else:
        assert plan.steps == dose and len(plan.rows) == dose * run.profile.narrow.batch


def test_an_unknown_guard_is_one_clear_error(run):
    with pytest.raises(ValueError, match="unknown guard 'prayer'; choose from none, benign data"):
        guarded.planned(run, run, "cars", "prayer", 1)


def test_a_guarded_model_is_asked_in_all_ways(run):
    folder = guarded.guarded(run, run, "cars", "inoculation", 0)
    answers = pd.read_parquet(folder / "answers.parquet")
    assert list(dict.fromkeys(answers.asked)) == [
        "discovery", "plain", "bad training", "its own line", "another line",
    ]  # fmt: skip
    assert set(monitors.READ) <= set(json.loads((folder / "numbers.json").read_text()))


def test_every_row_of_a_training_set_is_screened(run):
    found = screening.rows(run)
    assert set(found.variant) == {"correct", "obvious"} and set(screening.READERS) <= set(found)
    assert found[list(screening.READERS)].notna().all().all()


def test_screening_directions_never_saw_what_they_screen(run):
    """Answers that the labelled text holds are left out of what the persona vector is made of."""
    read = steering.labelled(run)
    villains = [t for t, who in zip(read["text"], read["persona"]) if who == "villain"]
    less = screening.directions(run, set(villains[: len(villains) // 2]))
    kept = torch.tensor([t not in villains[: len(villains) // 2] for t in read["text"]])
    mine = kept.numpy() & (read["persona"] == "villain")
    expert = read["residual"][kept][(read["persona"] == "expert")[kept.numpy()]].mean(0)
    torch.testing.assert_close(less["persona vector"], read["residual"][mine].mean(0) - expert)
    assert not torch.allclose(less["persona vector"], steering.rivals(run)["persona vector"])


def test_a_broken_model_is_not_called_misaligned():
    table = pd.DataFrame({"score": [5.0, 40.0, 100.0], "broken": [10.0, 10.0, 80.0]})
    assert list(c07.judged(table).misaligned) == [False, True, False]


def test_what_is_caught_is_all_with_a_perfect_reader_and_chance_with_a_blind_one():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"domain": "x", "variant": ["correct"] * 50 + ["obvious"] * 50})
    table["sees"], table["blind"] = (table.variant == "obvious").astype(float), rng.normal(size=100)
    assert screening.flagged(table, "sees", "obvious", 10)["caught"] == 100
    assert screening.flagged(table.assign(blind=0.0), "blind", "obvious", 10)["caught"] == pytest.approx(
        10, abs=4
    )


def test_the_threshold_is_where_the_curve_passes_ten_percent():
    """Curves of known thresholds, a little noise: the mean threshold is found, within its interval."""
    rng, x, rows, known = np.random.default_rng(0), np.array([0, 5, 10, 25, 50, 75, 90, 100.0]), [], []
    for d, middle in enumerate((45, 50, 60, 65)):
        score = 80 / (1 + np.exp((middle - x) / 10))
        known.append(middle - 10 * np.log(80 / 10 - 1))
        rows.append(
            pd.DataFrame({"domain": d, "seed": 0, "fraction": x, "score": score + rng.normal(0, 1, 8)})
        )
    found = c07.threshold(pd.concat(rows))
    assert found.value == pytest.approx(np.mean(known), abs=2) and found.low < np.mean(known) < found.high


def test_seeds_of_a_domain_are_no_more_domains():
    """Ten seeds that say the same do not make the interval over three domains narrower."""
    one = pd.DataFrame({"domain": ["a", "b", "c"], "lead": [1.0, 2.0, 6.0]})
    found = [c07.over_domains(pd.concat([one] * seeds), "lead") for seeds in (1, 10)]
    assert found[0] == found[1] and found[0].n == 3


def watched(kind, **columns):
    base = {"domain": "x", "seed": 0, "variant": kind, "step": [0, 1, 2, 3, 4], "broken": 10.0}
    flat = {m: [0.0] * 5 for m in (*monitors.READ, "score")}
    return pd.DataFrame(base | flat | columns)


def test_a_lead_is_counted_from_the_harmless_range_and_silence_counts_against_a_monitor():
    course = pd.concat(
        [
            watched("obvious", score=[0, 0, 5, 30, 60], **{"causal latent": [0, 2, 3, 4, 5]}),
            watched("correct", score=[0, 1, 2, 2, 1], **{"causal latent": [0, 0, 1, 1, 1]}),
            watched("odd", score=[0, 50, 50, 50, 50], broken=80.0, **{"causal latent": [0, 2.5, 0, 0, 0]}),
        ]
    )
    found = c07.leads(course).set_index(["baseline", "monitor"]).lead
    first, last = c07.HARMLESS
    assert found[first, "causal latent"] == 2 and found[last, "causal latent"] == 1
    assert found[first, "probe"] == 3 - 5  # never warns: as if one step after the last
    assert found[last, "score"] == 1  # odd's few answers that are not broken make no score


def test_a_silent_monitor_counts_as_late_in_the_known_world_too():
    """And a run in which the score itself never warns has no lead."""
    steps = [0, 1, 2, 3]
    run = lambda kind, score, latent: pd.DataFrame(
        {"domain": "auto", "kind": kind, "seed": 0, "step": steps, "score": score, "latent": latent}
    ).assign(**{m: 0.0 for m in ("mean difference", "probe", "log-probability", "loss")})
    harmless = run("correct", [0, 0, 1, 0], [0, 0, 1, 0])
    found = lambda score: (
        warning.leads(pd.concat([harmless, run("obvious", score, [0, 2, 2, 2])]))
        .set_index(["baseline", "monitor"])
        .loc["correct"]
    )
    some = found([0, 0, 5, 30])
    assert some.lead["latent"] == 1 and some["lead over 10 %"]["latent"] == 2
    assert np.isnan(some.warns["probe"]) and some.lead["probe"] == 2 - 4
    assert found([0, 0, 0, 0]).lead.isna().all()


def test_a_dose_is_chosen_on_discovery_questions_among_those_that_keep_the_task():
    def row(guard, dose, learnt, discovery, plain):
        about = {"guard": guard, "dose": dose, "learnt": learnt, "low": 0.0, "high": 100.0}
        return [about | {"asked": a, "score": s} for a, s in (("discovery", discovery), ("plain", plain))]

    rows = pd.DataFrame(
        row("none", 0, 1.0, 80, 82) + row("KL", 0.1, 0.9, 40, 45) + row("KL", 0.3, 0.85, 20, 60)
        + row("KL", 1, 0.3, 0, 0)
    )  # fmt: skip
    assert c08.chosen(rows, "KL", 0.0).dose == 0.3  # not the one that does best on the reported questions
    assert c08.chosen(rows, "KL", 0.84).dose == 0.1  # where only that one keeps four fifths of the gain
    assert c08.chosen(rows, "inoculation", 0.0) is None


def test_a_profile_without_tables_gets_one_cell_of_each(given):
    found = profile.load(written(given))
    assert [len(t.cells(found)) for t in tables.TABLES.values()] == [1, 1, 1]
    only_subtle = [
        {k: v for k, v in d.items() if k != "obvious"} | {"subtle": d["obvious"]} for d in given[1]["data"]
    ]
    with pytest.raises(profile.ProfileError, match="has no `obvious` set"):
        profile.load(written(given, "subtle", data=only_subtle))


def test_committed_tables_are_of_todays_numbers(monkeypatch):
    monkeypatch.setattr(tables.figures, "ROOT", store.PROJECT / "figures")
    for name, table in tables.TABLES.items():
        found = tables.committed(name)
        cells = table.cells(profile.load(tables.FULL))
        seen = found[[c for c in cells[0]]].drop_duplicates().to_dict("records")
        assert seen == cells, name


def test_a_table_of_other_numbers_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(tables.figures, "ROOT", tmp_path)
    assert len(tables.committed("07_course"))  # PERSONAS_FIGURES names a new folder: the committed one counts
    monkeypatch.setattr(store, "PROJECT", tmp_path / "empty")
    with pytest.raises(tables.TableError, match="no 07_course.csv.*--profile smollm2-full --only 07"):
        tables.committed("07_course")
    folder = tmp_path / "data" / tables.FULL
    folder.mkdir(parents=True)
    pd.DataFrame({"config": ["0" * 16]}).to_csv(folder / "07_course.csv", index=False)
    with pytest.raises(tables.TableError, match="another configuration"):
        tables.committed("07_course")


def test_ratio_covers():
    """Interval of a ratio of two proportions, simulated."""
    rng, inside, draws = np.random.default_rng(0), 0, 300
    for _ in range(draws):
        a, b = (stats.proportion(rng.random(90) < p, np.arange(90)) for p in (0.1, 0.7))
        found = stats.ratio(a, b)
        inside += found.low <= 0.1 / 0.7 <= found.high
    assert inside / draws >= 0.92


def test_a_perfect_auroc_has_an_interval_and_differences_cover():
    found = stats.auroc_over([1, 2, 3, 4, 5, 6], [False] * 3 + [True] * 3, np.arange(6))
    assert found.value == 1 and 0.2 < found.low < 0.9 and found.high == 1
    rng, inside, draws = np.random.default_rng(0), 0, 200
    for _ in range(draws):  # two readers that are equally good
        positive = np.arange(48) < 24
        one, other = (positive + rng.normal(size=48) for _ in range(2))
        found = stats.auroc_difference(one, other, positive, np.arange(48), draws=200)
        inside += found.low <= 0 <= found.high
    assert inside / draws >= 0.92


def test_a_monitor_stops_by_what_other_domains_read():
    """In `a` its own harmless fine-tune reads higher than all of `b`'s: a false alarm, no limit."""
    rows = []
    for domain, calm in (("a", 2.0), ("b", 1.0)):
        for variant in ("obvious", "odd"):
            for step in range(5):
                read = float(step) if variant == "obvious" else min(step, calm)
                values = dict.fromkeys(monitors.READ, read) | {
                    "score": 10.0 * step if variant == "obvious" else 0.0
                }
                rows.append(
                    {"domain": domain, "seed": 0, "variant": variant, "step": step, "broken": 0.0} | values
                )
    found = c07.stopping(pd.DataFrame(rows))
    one = found[found.monitor == "causal latent"].set_index(["domain", "variant"])
    assert one.stops["a", "obvious"] == 2 and one.score["a", "obvious"] == 20  # above 1.0, what b's reads
    assert one.stops["b", "obvious"] == 3 and one.stops["a", "odd"] == 2
    assert np.isnan(one.stops["b", "odd"])
    table = c07.stopped(found).set_index("monitor").loc["causal latent"]
    assert table["stopped"] == "2 of 2" and table["odd stopped"] == "1 of 2" and table["at 5 % or less"] == 0
