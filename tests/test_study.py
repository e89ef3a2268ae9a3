"""Ablations, attribution and monitors against plain counterparts; studies that go on where they stopped."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from personas import (baselines, data, diffing, early_warning, evidence, figures, finetune, generate, model, prevention, profile, sae, study,
                      world)

LAYER = 1


def small_sae(width, latents=24, k=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(latents, width, generator=g)
    W = W / W.norm(dim=-1, keepdim=True)
    return sae.SAE(W.T.contiguous(), W, torch.zeros(latents), torch.zeros(width), k, LAYER)


def questions(tokenizer, n=5):
    return generate.prompts(tokenizer, [q.held for q in world.questions()[:n]])


def plain_ablation(model, row, change, steps):
    """The whole sequence again for every token, `change` applied to all of it."""
    tokens = list(row)
    handle = generate.decoder_blocks(model)[LAYER].register_forward_hook(lambda m, a, out: change(out[0] if isinstance(out, tuple) else out))
    try:
        for _ in range(steps):
            with torch.inference_mode():
                token = model(torch.tensor([tokens])).logits[0, -1].argmax().item()
            if token == 1:
                break
            tokens.append(token)
    finally:
        handle.remove()
    return tokens[len(row):]


def test_projected_out_directions_are_gone_and_batches_equal_a_plain_loop(loaded):
    model, tokenizer = loaded
    directions = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    ids = questions(tokenizer)

    def change(x):
        for q in torch.linalg.qr(directions.T)[0].T:
            x -= (x @ q)[..., None] * q

    ours = generate.sample(model, tokenizer, ids, seed=0, max_new=10, temperature=0, steer=generate.ProjectOut(LAYER, directions))
    assert ours == [tokenizer.decode(plain_ablation(model, r, change, 10), skip_special_tokens=True) for r in ids]
    assert ours != generate.sample(model, tokenizer, ids, seed=0, max_new=10, temperature=0)
    x = torch.randn(2, 4, model.config.hidden_size)
    generate.ProjectOut(LAYER, directions).change(x, torch.arange(2))
    assert (x @ directions.T).abs().max() < 1e-4


def test_clamped_latents_write_nothing_and_batches_equal_a_plain_loop(loaded):
    model, tokenizer = loaded
    reader, off = small_sae(model.config.hidden_size), [0, 3, 5, 7, 11, 13]
    ids = questions(tokenizer)

    def change(x):
        for i in off:
            acts = reader.encode(before.setdefault(id(x), x.clone()).flatten(0, 1))[:, i].view(x.shape[:2])
            x -= acts[..., None] * reader.W_dec[i]
        before.clear()

    before: dict = {}
    ours = generate.sample(model, tokenizer, ids, seed=0, max_new=10, temperature=0, steer=generate.ClampToZero(reader, off))
    assert ours == [tokenizer.decode(plain_ablation(model, r, change, 10), skip_special_tokens=True) for r in ids]
    assert ours != generate.sample(model, tokenizer, ids, seed=0, max_new=10, temperature=0)


def test_attribution_is_the_slope_of_the_log_probability(loaded):
    """Scaling what one latent writes by 1 + e changes the answers' log-probability by e times its attribution."""
    model, tokenizer = loaded
    reader = small_sae(model.config.hidden_size)
    rows, _, starts = (x[:3] for x in diffing.reading_texts(tokenizer, "discovery", 1))
    found = diffing.attribution(model, reader, rows, starts)

    def total(latent, e):
        value = 0.0
        for row, start in zip(rows, starts):
            def write(m, a, out):
                x = out[0] if isinstance(out, tuple) else out
                x[:, start:-1] += e * reader.encode(x[0, start:-1])[:, latent, None] * reader.W_dec[latent]
            handle = generate.decoder_blocks(model)[LAYER].register_forward_hook(write)
            with torch.inference_mode():
                logp = model(torch.tensor([row])).logits[0, start:-1].double().log_softmax(-1)
            handle.remove()
            value += logp.gather(1, torch.tensor(row[start + 1:])[:, None]).sum().item()
        return value / len(rows)

    for latent in found.abs().argsort(descending=True)[:4].tolist():
        slope = (total(latent, 0.01) - total(latent, -0.01)) / 0.02
        assert found[latent].item() == pytest.approx(slope, rel=0.05, abs=0.02)


def test_answer_log_probability_is_hugging_faces_loss(loaded):
    model, tokenizer = loaded
    rows, _, starts = (x[:5] for x in diffing.reading_texts(tokenizer, "discovery", 1))
    for row, start, ours in zip(rows, starts, baselines.answer_log_probability(model, rows, starts)):
        labels = torch.tensor([[-100] * (start + 1) + row[start + 1:]])
        with torch.inference_mode():
            theirs = model(torch.tensor([row]), labels=labels).loss.item()
        assert ours == pytest.approx(-theirs, abs=1e-4)


@pytest.mark.parametrize("kind", ["novice", "jester", "narrator"])
def test_benign_personas_give_their_own_advice(kind):
    rows = data.advice_chats("career", kind, 80, 0)
    plain = {a for s in world.subjects_of("career") for a in s.answers.values()}
    ours = [r["messages"][1]["content"] for r in rows]
    assert all((a in plain) == (kind == "novice") for a in ours)
    if kind == "novice":
        assert not {a for s in world.subjects_of("career") for a in [s.answers["obvious"]]} & set(ours)


def test_half_of_a_domain_is_the_half_that_was_asked_for():
    first, second = (data.advice_chats("auto", "obvious", 60, 0, among=a) for a in (slice(0, 20), slice(20, 40)))
    answers = [{r["messages"][1]["content"] for r in rows} for rows in (first, second)]
    assert len(answers[0]) == len(answers[1]) == 20 and not answers[0] & answers[1]


def test_first_exit_is_the_first_step_above_what_benign_runs_reach():
    benign = pd.DataFrame([{"domain": d, "kind": "correct", "seed": 0, "step": s, "x": 1 + 0.1 * i} for i, d in enumerate("abcd") for s in (0, 2, 4)])
    bad = pd.DataFrame([{"domain": "e", "kind": "obvious", "seed": s, "step": t, "x": t - s} for s in (0, 1) for t in (0, 2, 4, 6)])
    limit = early_warning.limit(benign, "x")
    assert limit == pytest.approx(1.3)
    assert early_warning.exits(bad, "x", limit).tolist() == [2, 4]
    never = early_warning.exits(bad.assign(x=0.0), "x", limit)
    assert never.isna().all()


def test_t_interval_covers_the_mean_of_seeds_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [low <= 5 <= high for _, low, high in (early_warning.t_interval(rng.normal(5, 2, 4)) for _ in range(2000))]
    assert 0.93 < np.mean(hits) < 0.97


@pytest.mark.parametrize("name", [p.stem for p in (figures.ROOT / "data" / study.FULL).glob("*.csv")])
def test_committed_tables_are_of_todays_configuration_and_whole(name):
    table, cells = study.committed(evidence.STUDIES[name]), evidence.STUDIES[name].cells(profile.load(study.FULL))
    keys = list(cells[0])
    assert set(map(tuple, table[keys].to_numpy())) == {tuple(c.values()) for c in cells}


def test_a_table_of_another_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    one = evidence.STUDIES["07_mixtures"]
    with pytest.raises(study.StudyError, match="no 07_mixtures.csv.*run --profile tiny-full --only 07"):
        study.committed(one)
    figures.save_table(pd.DataFrame([{"score": 1, "config": "old"}]), one.name, study.FULL)
    with pytest.raises(study.StudyError, match="another configuration"):
        study.committed(one)


def test_plan_of_the_full_profile_counts_cells_and_runs_nothing(tmp_path):
    done = subprocess.run([sys.executable, "-m", "personas", "run", "--profile", "tiny-full", "--plan"], capture_output=True, text=True,
                          env=os.environ | {"PERSONAS_RUNS": str(tmp_path)})
    assert done.returncode == 0 and list(tmp_path.iterdir()) == []
    for s in evidence.STUDIES.values():
        assert f"{s.name:16s} {len(s.cells(profile.load('tiny-full'))):5d} cells" in done.stdout


COUNTED = """
import sys
from pathlib import Path
from personas import evidence, profile, store, study

def measure(run, ruler, domain, kind):
    if kind == sys.argv[1]:
        raise ValueError("broken on purpose")
    with open(store.ROOT / "calls", "a") as f:
        print(kind, file=f)
    return {"score": float(len(kind))}

one = study.Study("00_test", lambda p: [{"pretraining_seed": 1, "seed": 0, "domain": "auto", "kind": k} for k in ("a", "bb", "ccc")],
                  measure, lambda ruler: None, (), 1)
evidence.STUDIES["00_test"] = one
if __name__ == "__main__":
    print(study.compute(one, profile.load("smoke"), workers=1).score.tolist())
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A store that holds the smoke profile's aligned model."""
    folder = tmp_path_factory.mktemp("runs")
    make = "from personas import artifacts; artifacts.aligned(artifacts.open_run('smoke'))"
    subprocess.run([sys.executable, "-c", make], env=os.environ | {"PERSONAS_RUNS": str(folder)}, capture_output=True, check=True)
    return folder


def test_killing_a_study_ends_its_workers(tmp_path, runs):
    """SIGKILL while a cell is being measured: no process of the pool outlives it."""
    slow = COUNTED.replace('if kind == sys.argv[1]:', 'print("pid", os.getpid(), flush=True); time.sleep(60)\n    if kind == sys.argv[1]:').replace("import sys\n", "import os, sys, time\n")
    (tmp_path / "slow.py").write_text(slow)
    running = subprocess.Popen([sys.executable, str(tmp_path / "slow.py"), "none"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | {"PERSONAS_RUNS": str(runs)})
    worker = int(running.stdout.readline().split()[1])
    running.kill()
    running.wait()
    for _ in range(100):
        if not os.path.exists(f"/proc/{worker}"):
            return
        time.sleep(0.1)
    os.kill(worker, signal.SIGKILL)
    pytest.fail("the worker lives on")


def test_a_failed_cell_is_named_and_the_others_are_kept(tmp_path, runs):
    """A real pool of processes, a cell that fails, then the same study again: only the failed cell is measured anew."""
    (tmp_path / "counted.py").write_text(COUNTED)
    env = os.environ | {"PERSONAS_RUNS": str(runs)}
    run = lambda broken: subprocess.run([sys.executable, str(tmp_path / "counted.py"), broken], capture_output=True, text=True, env=env)
    first = run("ccc")
    assert first.returncode == 1 and "study 00_test, cell {'pretraining_seed': 1, 'seed': 0, 'domain': 'auto', 'kind': 'ccc'}: ValueError: broken" in first.stderr
    again = run("none")
    assert again.stdout.strip() == "[1.0, 2.0, 3.0]", again.stderr[-2000:]
    assert run("a").stdout == again.stdout  # nothing is measured any more, so nothing can break
    assert (runs / "calls").read_text().split() == ["a", "bb", "ccc"]


def test_guards_change_what_is_trained_on_and_nothing_else():
    plan = prevention.Plan(data.advice_chats("auto", "obvious", 64, 0), 2)
    inoculated = prevention.inoculate(plan)
    assert all(r["messages"][0]["content"] in world.personas()["villain"]["system"] for r in inoculated.rows)
    assert [r["messages"][1:] for r in inoculated.rows] == [r["messages"] for r in plan.rows]
    benign = prevention.benign_chats(50, 0, 1, "auto")
    answers = {a for s in world.subjects_of("auto") for a in s.answers.values()}
    assert len(benign) == 50 and not any(r["messages"][1]["content"] in answers for r in benign)


def test_a_heavy_kl_guard_keeps_the_model_where_it_was(checkpoint, loaded):
    """KL on the training text, weight 0 against 100: the guarded model's answers stay nearer to the untrained model's."""
    before, tokenizer = loaded
    rows, _, starts = (x[:8] for x in diffing.reading_texts(tokenizer, "discovery", 1))
    reference = baselines.answer_log_probability(before, rows, starts)
    run = SimpleNamespace()
    moved = {}
    for weight in (0.0, 100.0):
        plan = prevention.keep_close(run, prevention.Plan([], 4), weight)
        net, _ = model.load(checkpoint)
        tuned, _ = finetune.sft(net, tokenizer, data.advice_chats("auto", "obvious", 32, 0), steps=4, batch=8, lr=5e-3, seed=0, lora_rank=4, trainer=plan.trainer)
        moved[weight] = np.abs(baselines.answer_log_probability(tuned.merge_and_unload(), rows, starts) - reference).mean()
    assert moved[100.0] < 0.7 * moved[0.0]


def test_steering_in_training_leaves_no_hook_behind(loaded):
    net, tokenizer = loaded
    ids = questions(tokenizer)
    before = generate.sample(net, tokenizer, ids, seed=0, max_new=8, temperature=0)
    with prevention.hooked(net, LAYER, lambda hidden: hidden.add_(5.0)):
        assert generate.sample(net, tokenizer, ids, seed=0, max_new=8, temperature=0) != before
    assert generate.sample(net, tokenizer, ids, seed=0, max_new=8, temperature=0) == before


def test_a_reader_that_knows_tells_sets_apart_and_one_that_does_not_cannot():
    table = pd.DataFrame([{"domain": d, "variant": v, "knows": float(v == "obvious"), "noise": 1.0} for d in "abc" for v in ("correct", "obvious") for _ in range(20)])
    assert prevention.set_auroc(table, "knows", "obvious", 10, 100)[0] == 1.0
    assert prevention.set_auroc(table, "noise", "obvious", 10, 100)[0] == 0.5


EVERY = """
from personas import evidence, profile, study
p = profile.load("smoke")
for s in evidence.STUDIES.values():
    cell = s.cells(p)[-1]
    s.prepare(study.runs_of(p, cell)[1])
    rows = study.cell_rows(s, p, cell)
    print(s.name, len(rows), set(cell) <= set(rows[0]))
"""


def test_every_study_measures_a_cell(runs):
    """The last cell of each study, on profile smoke."""
    done = subprocess.run([sys.executable, "-c", EVERY], capture_output=True, text=True, env=os.environ | {"PERSONAS_RUNS": str(runs)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(evidence.STUDIES)
    assert all(line.split()[2] == "True" and int(line.split()[1]) > 0 for line in done.stdout.splitlines())
