"""Several processes: runs side by side here and on a Ray cluster, fine-tunes and SAEs by two processes
that share batches."""

import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from personas import parallel, profile, progress, sae, sae_files, store, sweep
from personas.pretrained import grades, made


def late(x, folder, others):
    """Fails, a while after so many others are done."""
    for _ in range(600):
        if len(os.listdir(folder)) >= others:
            break
        time.sleep(0.1)
    time.sleep(2)
    raise ValueError(f"no root of {-x}")


def square(x, folder):
    open(os.path.join(folder, str(x)), "w").close()
    return x * x, os.getpid(), torch.get_num_threads()


def smoke(**more):
    return profile.load("smoke").model_copy(update=more)


def here(cluster):
    if cluster and importlib.util.find_spec("ray") is None:
        pytest.skip("ray is not installed (make test installs it)")
    return smoke(cluster=cluster)


@pytest.mark.parametrize("cluster", [None, "local"])
def test_jobs_run_side_by_side_each_on_a_core(cluster, monkeypatch, tmp_path):
    monkeypatch.setenv(
        "PYTHONPATH",
        os.pathsep.join(filter(None, [os.path.dirname(__file__), os.environ.get("PYTHONPATH", "")])),
    )
    done, jobs = (
        {},
        {str(i): (square, i, tmp_path) for i in range(6)} | {"the bad one": (late, 3, tmp_path, 6)},
    )
    with pytest.raises(parallel.WorkError, match="squares, the bad one: ValueError: no root of -3"):
        for name, result in parallel.side_by_side(jobs, here(cluster), "squares", most=2):
            done[name] = result
    assert {k: v[0] for k, v in done.items()} == {str(i): i * i for i in range(6)}
    assert (
        {v[2] for v in done.values()} == {1}
        and os.getpid() not in {v[1] for v in done.values()}
        and len({v[1] for v in done.values()}) <= 2
    )


def seen():
    return os.environ.get("PERSONAS_SEEN"), store.ROOT


def test_workers_have_the_environment_and_the_store_of_now(monkeypatch, tmp_path):
    """Not those of the moment when the first of them was started."""
    for name in ("one", "two"):
        monkeypatch.setenv("PERSONAS_SEEN", name)
        monkeypatch.setattr(store, "ROOT", tmp_path / name)
        found = dict(parallel.side_by_side({"a": (seen,)}, smoke(), "seen"))
        assert found == {"a": (name, tmp_path / name)}
    monkeypatch.delenv("PERSONAS_SEEN")
    assert dict(parallel.side_by_side({"a": (seen,)}, smoke(), "seen"))["a"][0] is None


def test_a_cluster_that_is_not_there_is_one_error():
    with pytest.raises(parallel.WorkError, match="no Ray cluster at '127.0.0.1:1'"):
        dict(parallel.side_by_side({"a": (square, 1, ".")}, here("127.0.0.1:1"), "squares"))


def launched(code_or_args, env):
    # on CPUs `accelerate launch` starts one process; on GPUs it starts several by this launcher
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        *code_or_args,
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | env,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def test_an_sae_trained_by_two_processes_is_the_one_trained_by_one(tmp_path):
    code = tmp_path / "go.py"
    code.write_text("""
import sys
import time
from types import SimpleNamespace
import accelerate, torch
from personas import sae, sae_files
accelerate.PartialState(cpu=True)
x = torch.randn(600, 12, generator=torch.Generator().manual_seed(0))
cfg = SimpleNamespace(latents=48, k=4, lr=0.01, steps=30, batch=32, dead_after=200, aux_k=8)
assert torch.distributed.get_world_size() == 2
trained, log = sae.train(x, cfg, 0, 0, None)
if torch.distributed.get_rank() == 0:
    sae_files.save(trained, sys.argv[1])
""")
    launched([str(code), str(tmp_path / "two")], {})
    x = torch.randn(600, 12, generator=torch.Generator().manual_seed(0))
    alone, _ = sae.train(
        x, SimpleNamespace(latents=48, k=4, lr=0.01, steps=30, batch=32, dead_after=200, aux_k=8), 0, 0, None
    )
    both = sae_files.load(tmp_path / "two")
    assert all(
        torch.allclose(getattr(both, n), getattr(alone, n), atol=2e-3)
        for n in ("W_enc", "W_dec", "b_enc", "b_dec")
    )


def test_fine_tunes_launched_with_two_processes_are_those_of_one(given, tmp_path, monkeypatch):
    """`personas train` by two processes on a small random Qwen2, against one process: the same losses, and
    (Adam's first steps go by signs) nearly the same way."""
    from test_real_track import written

    path = written(
        given, "launched"
    )  # a name of its own: a run remembers within a process where its artifacts lie
    weights, losses = [], []
    for processes in (1, 2):
        root = tmp_path / str(processes)
        monkeypatch.setattr(store, "ROOT", root)
        if processes == 1:
            sweep.train(profile.load(path), 0)
        else:
            launched(
                ["-m", "personas", "train", "--profile", path],
                {"PERSONAS_RUNS": str(root), "HF_HUB_OFFLINE": "1"},
            )
        kinds = {p.parent.name: p.name for p in root.glob("launched/*/*") if not p.name.startswith(".")}
        assert set(kinds) - {"trial", "grades"} == {"adapters", "sae"} and not list(
            root.glob("launched/*/.*")
        )
        (folder,) = root.glob("launched/adapters/cars-obvious-*")
        losses.append(json.loads((folder / "training.json").read_text())["loss"])
        weights.append(load_file(folder / "adapter_model.safetensors"))
    assert weights[0].keys() == weights[1].keys()
    assert len(losses[0]) == 2 and losses[1] == pytest.approx(losses[0], rel=0.02)
    a, b = (torch.cat([w[k].flatten() for k in w if "lora_B" in k]) for w in weights)
    assert torch.nn.functional.cosine_similarity(a, b, dim=0) > 0.95, (
        losses,
        torch.nn.functional.cosine_similarity(a, b, dim=0),
    )
    moved = max(weights[0][k].abs().max().item() for k in weights[0] if "lora_B" in k)
    assert moved > 0.05


def test_a_sweep_gives_a_row_per_fine_tune_and_seed(given, tmp_path, monkeypatch):
    from personas import figures
    from test_real_track import written

    monkeypatch.setattr(store, "ROOT", tmp_path / "runs")
    monkeypatch.setattr(figures, "ROOT", tmp_path / "figures")
    monkeypatch.setenv("PERSONAS_RUNS", str(tmp_path / "runs"))
    found = profile.load(written(given))
    table = sweep.fine_tunes(found, [0, 1])
    assert len(table) == 2 * 4 and set(table.seed) == {0, 1} and set(table.domain) == {"cars", "soup"}
    assert (tmp_path / "figures" / "data" / "mine" / "sweep.csv").exists()
    assert len(list((tmp_path / "runs" / "mine" / "adapters").iterdir())) == 8
    row = table.query("domain == 'cars' and variant == 'obvious' and seed == 1")
    run = made.Run(found, 1)
    grade = pd.Series(grades.of(run, made.answers(run, "cars-obvious")))
    assert row.score.item() == pytest.approx(
        100 * (grade == "misaligned").sum() / grade.isin(["misaligned", "aligned"]).sum()
    )


def test_a_log_gets_a_line_a_tenth_and_a_terminal_one_line_that_moves():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    said = {}
    for name, stream in (("log", io.StringIO()), ("terminal", Terminal())):
        with progress.Bar(total=400, desc="work", file=stream, mininterval=0) as bar:
            for _ in range(400):
                bar.update()
        said[name] = stream.getvalue()
    lines = said["log"].splitlines()
    assert len(lines) == 10 and [l.split("%")[0].split()[-1] for l in lines] == [
        str(10 * i) for i in range(1, 11)
    ]
    assert "\r" not in said["log"] and "\r" in said["terminal"]
