"""The benchmarks' own code: our contestants run, times to an equal FVU are right, and the pages say what
the measurements say."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from personas import pretraining, world

HERE = Path(__file__).resolve().parents[1] / "benchmarks"
sys.path.insert(0, str(HERE))
import bench  # noqa: E402
import contestants  # noqa: E402
import cost  # noqa: E402


def test_our_contestants_run(checkpoint, loaded, tmp_path):
    g = torch.Generator().manual_seed(0)
    save_file(
        {"train": torch.randn(4000, 32, generator=g), "held": torch.randn(500, 32, generator=g)},
        tmp_path / "x.safetensors",
    )
    sae = {
        "who": "ours",
        "file": str(tmp_path / "x.safetensors"),
        "latents": 64,
        "k": 4,
        "lr": 1e-3,
        "batch": 128,
        "dead_after": 10**6,
        "seed": 0,
        "steps": 20,
    }
    whole, timed = contestants.sae(sae | {"look": 5}), contestants.sae(sae | {"look": 0})
    assert (
        len(whole["curve"]) == 4
        and whole["curve"][-1][1] < whole["curve"][0][1] < 1.5
        and whole["seconds"] >= whole["curve"][-1][0]
    )
    assert timed["curve"] == [] and timed["tokens/s"] > 0
    (tmp_path / "rows.json").write_text(
        json.dumps([d["ids"] for d in pretraining.encode_documents(loaded[1], 70, 1, "test")])
    )
    assert (
        contestants.harvest(
            {"who": "ours", "rows": str(tmp_path / "rows.json"), "layer": 1, "model": str(checkpoint)}
        )["tokens/s"]
        > 0
    )
    save_file({"W_dec": torch.eye(48), "unit": torch.tensor(2.0)}, tmp_path / "d.safetensors")
    asked = {
        "directions": str(tmp_path / "d.safetensors"),
        "questions": [q.held for q in world.questions()[:3]],
        "layer": 1,
        "strengths": [0.2, 0.4],
        "latents": 2,
        "tokens": 6,
        "model": str(checkpoint),
    }
    assert all(contestants.screen(asked | {"who": who})["answers/s"] > 0 for who in ("ours", "generate"))
    assert contestants.sft({"who": "ours", "model": str(checkpoint), "steps": 4})["tokens/s"] > 0


def test_a_clock_counts_neither_the_first_steps_nor_the_looks(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(contestants.time, "perf_counter", lambda: now[0])

    def look(i, read):
        now[0] += 100
        return i

    lap = contestants.Clock(look, skip=2)
    for i in range(5):
        now[0] += 1 + i
        lap(i)
    assert lap.spent == 3 + 4 + 5 and lap.rows == [(0.0, 0), (0.0, 1), (3.0, 2), (7.0, 3), (12.0, 4)]


def test_seconds_to_an_equal_fvu():
    curve = [[10.0, 0.5], [20.0, 0.3], [40.0, 0.1]]
    assert bench.seconds_to(curve, 0.2) == pytest.approx(30) and bench.seconds_to(
        curve, 0.3
    ) == pytest.approx(20)
    assert bench.seconds_to(curve, 0.6) == 10 and bench.seconds_to(curve, 0.05) == float("inf")


def test_the_pages_say_what_was_measured():
    results = json.loads((HERE / "results.json").read_text())
    assert set(bench.PARTS) < set(results)
    assert (HERE / "RESULTS.md").read_text() == bench.report(results)
    assert (HERE / "COST.md").read_text() == cost.page()
