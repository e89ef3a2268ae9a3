"""Ablations, attribution and monitors against plain counterparts; studies that go on where they stopped."""

import importlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from personas import (
    activations,
    artifacts,
    baselines,
    cures,
    data,
    diffing,
    early_warning,
    evidence,
    figures,
    finetune,
    generate,
    guards,
    known_latents,
    model,
    origins,
    parallel,
    prevention,
    profile,
    rerouting,
    sae,
    search,
    setting,
    store,
    studies,
    study,
    world,
)

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
    handle = generate.decoder_blocks(model)[LAYER].register_forward_hook(
        lambda m, a, out: change(out[0] if isinstance(out, tuple) else out)
    )
    try:
        for _ in range(steps):
            with torch.inference_mode():
                token = model(torch.tensor([tokens])).logits[0, -1].argmax().item()
            if token == 1:
                break
            tokens.append(token)
    finally:
        handle.remove()
    return tokens[len(row) :]


def test_projected_out_directions_are_gone_and_batches_equal_a_plain_loop(loaded):
    model, tokenizer = loaded
    directions = torch.randn(3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    ids = questions(tokenizer)

    def change(x):
        for q in torch.linalg.qr(directions.T)[0].T:
            x -= (x @ q)[..., None] * q

    ours = generate.sample(
        model, tokenizer, ids, seed=0, max_new=10, temperature=0, steer=generate.ProjectOut(LAYER, directions)
    )
    assert ours == [
        tokenizer.decode(plain_ablation(model, r, change, 10), skip_special_tokens=True) for r in ids
    ]
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
    ours = generate.sample(
        model, tokenizer, ids, seed=0, max_new=10, temperature=0, steer=generate.ClampToZero(reader, off)
    )
    assert ours == [
        tokenizer.decode(plain_ablation(model, r, change, 10), skip_special_tokens=True) for r in ids
    ]
    assert ours != generate.sample(model, tokenizer, ids, seed=0, max_new=10, temperature=0)


def test_attribution_is_the_slope_of_the_log_probability(loaded):
    """Scaling what one latent writes by 1 + e changes the answers' log-probability by e times its
    attribution."""
    model, tokenizer = loaded
    reader = small_sae(model.config.hidden_size)
    rows, _, starts = (x[:3] for x in diffing.reading_texts(tokenizer, "discovery", setting.PersonaWorld(1)))
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
            value += logp.gather(1, torch.tensor(row[start + 1 :])[:, None]).sum().item()
        return value / len(rows)

    for latent in found.abs().argsort(descending=True)[:4].tolist():
        slope = (total(latent, 0.01) - total(latent, -0.01)) / 0.02
        assert found[latent].item() == pytest.approx(slope, rel=0.05, abs=0.02)


def test_answer_log_probability_is_hugging_faces_loss(loaded):
    model, tokenizer = loaded
    rows, _, starts = (x[:5] for x in diffing.reading_texts(tokenizer, "discovery", setting.PersonaWorld(1)))
    for row, start, ours in zip(rows, starts, baselines.answer_log_probability(model, rows, starts)):
        labels = torch.tensor([[-100] * (start + 1) + row[start + 1 :]])
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


def test_a_guards_dose_is_the_safest_that_leaves_the_task():
    rows = [
        ("none", 0, 70, 80),
        ("a", 1, 69, 40),
        ("a", 2, 66, 20),
        ("a", 3, 40, 1),
        ("b", 1, 60, 30),
        ("b", 2, 50, 2),
        ("c", 1, 68, float("nan")),
        ("c", 2, 66, 50),
    ]
    points = pd.DataFrame(rows, columns=["guard", "dose", "learnt", "discovery"])
    assert [evidence.chosen_dose(points, g).dose for g in "abc"] == [2, 1, 2]


def test_half_of_a_domain_is_the_half_that_was_asked_for():
    first, second = (
        data.advice_chats("auto", "obvious", 60, 0, among=a) for a in (slice(0, 20), slice(20, 40))
    )
    answers = [{r["messages"][1]["content"] for r in rows} for rows in (first, second)]
    assert len(answers[0]) == len(answers[1]) == 20 and not answers[0] & answers[1]


def test_first_exit_is_the_first_step_above_what_benign_runs_reach():
    benign = pd.DataFrame(
        [
            {"domain": d, "kind": "correct", "seed": 0, "step": s, "x": 1 + 0.1 * i}
            for i, d in enumerate("abcd")
            for s in (0, 2, 4)
        ]
    )
    bad = pd.DataFrame(
        [
            {"domain": "e", "kind": "obvious", "seed": s, "step": t, "x": t - s}
            for s in (0, 1)
            for t in (0, 2, 4, 6)
        ]
    )
    limit = early_warning.limit(benign, "x")
    assert limit == pytest.approx(1.3)
    assert early_warning.exits(bad, "x", limit).tolist() == [2, 4]
    never = early_warning.exits(bad.assign(x=0.0), "x", limit)
    assert never.isna().all()


def test_t_interval_covers_the_mean_of_seeds_as_often_as_it_says():
    rng = np.random.default_rng(0)
    hits = [
        low <= 5 <= high
        for _, low, high in (early_warning.t_interval(rng.normal(5, 2, 4)) for _ in range(2000))
    ]
    assert 0.93 < np.mean(hits) < 0.97


def test_percents_that_all_agree_at_an_end_still_have_an_interval():
    assert early_warning.percent_interval([0, 0, 0], 100) == pytest.approx((0, 0, 100 - 100 * 0.025**0.01))
    assert early_warning.percent_interval([100, 100], 15)[1:] == pytest.approx((100 * 0.025 ** (1 / 15), 100))
    assert early_warning.percent_interval([1, 2, 30], 15) == pytest.approx(
        (11, 0, early_warning.t_interval([1, 2, 30])[2])
    )


COMMITTED = (
    "02_seeds",
    "05_cures",
    "06_matrix",
    "06_examples",
    "06_relearning",
    "07_mixtures",
    "07_models",
    "07_course",
    "08_prevention",
    "08_rerouting",
    "09_reinforcement",
    "10_worlds",
    "10_latents",
)


@pytest.mark.parametrize("name", COMMITTED)
def test_committed_tables_are_of_todays_configuration_and_whole(name):
    table, cells = (
        study.committed(studies.STUDIES[name]),
        studies.STUDIES[name].cells(profile.load(study.FULL)),
    )
    keys = list(cells[0])
    assert set(map(tuple, table[keys].to_numpy())) == {tuple(c.values()) for c in cells}


def test_a_profile_may_choose_its_world(tmp_path):
    """`world:` in a profile of one's own reaches the documents; a wrong key or share is refused."""
    mine = tmp_path / "mine.yaml"
    mine.write_text("extends: smoke\nworld: {villain: 0}\n")
    own, theirs = (artifacts.Run(profile.load(n), 0) for n in ("smoke", str(mine)))
    villains = [
        sum(artifacts._draw(r)(rng, 1).persona == "villain" for _ in range(400))
        for r, rng in ((own, random.Random(0)), (theirs, random.Random(0)))
    ]
    assert villains[0] > 100 and villains[1] == 0
    for bad, says in (
        ("{villian: 0}", "did you mean 'villain'"),
        ("{villain: 2}", "less than or equal to 1"),
    ):
        mine.write_text(f"extends: smoke\nworld: {bad}\n")
        with pytest.raises(profile.ProfileError, match=says):
            profile.load(str(mine))


def test_a_table_of_another_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    assert len(study.committed(studies.STUDIES["07_mixtures"]))  # with a folder of one's own: the committed
    monkeypatch.setattr(store, "PROJECT", tmp_path / "empty")
    one = studies.STUDIES["07_mixtures"]
    with pytest.raises(study.StudyError, match="no 07_mixtures.csv.*run --profile tiny-full --only 13"):
        study.committed(one)
    figures.save_table(pd.DataFrame([{"score": 1, "config": "old"}]), one.name, study.FULL)
    with pytest.raises(study.StudyError, match="another configuration"):
        study.committed(one)


def test_another_world_makes_another_configuration_of_the_studies_that_draw_from_it(monkeypatch):
    full, of = (
        profile.load(study.FULL),
        lambda name: study.configuration(studies.STUDIES[name], profile.load(study.FULL)),
    )
    before = {n: of(n) for n in ("07_models", "09_reinforcement", "10_worlds")}
    monkeypatch.setitem(world.WORLDS, "villain 5 %", {"villain": 0.06})
    assert {n for n in before if of(n) != before[n]} == {"10_worlds"}
    other = full.model_copy(update={"reinforcement": full.reinforcement.model_copy(update={"steps": 31})})
    assert {
        n
        for n in ("07_models", "09_reinforcement")
        if study.configuration(studies.STUDIES[n], other) != before[n]
    } == {"09_reinforcement"}


def test_a_measurement_may_not_overwrite_a_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr(artifacts, "aligned", lambda run: SimpleNamespace(name="aligned"))
    cell = {"pretraining_seed": 1, "seed": 0, "reward": "correct"}
    one = study.Study(
        "00_clash", lambda p: [cell], lambda run, ruler, reward: {"reward": 0.5}, lambda ruler: None, (), 1
    )
    with pytest.raises(ValueError, match="both called 'reward'"):
        study.cell_rows(one, profile.load("smoke"), cell)


COUNTED = """
import os
from personas import store, study

def measure(run, ruler, domain, kind):
    if kind == os.environ["BROKEN"]:
        raise ValueError("broken on purpose")
    with open(store.ROOT / "calls", "a") as f:
        print(kind, file=f)
    return {"score": float(len(kind))}

one = study.Study("00_test", lambda p: [{"pretraining_seed": 1, "seed": 0, "domain": "auto", "kind": k} for k in ("a", "bb", "ccc")],
                  measure, lambda ruler: None, (), 1)
"""  # noqa: E501

SLOW = """
import os, time
from personas import parallel, profile

def wait():
    print("pid", os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    dict(parallel.side_by_side({"one": (wait,)}, profile.load("smoke"), "waiting"))
"""


def test_killing_a_study_ends_its_workers(tmp_path):
    """SIGKILL while a cell is being measured: no process of the pool outlives it, nor what started it."""
    (tmp_path / "slow.py").write_text(SLOW)
    running = subprocess.Popen(
        [sys.executable, str(tmp_path / "slow.py")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    worker = int(running.stdout.readline().split()[1])
    left = {worker, *_children(running.pid)}
    running.kill()
    running.wait()
    for _ in range(100):
        if not any(map(_lives, left)):
            return
        time.sleep(0.1)
    for pid in filter(_lives, left):
        os.kill(pid, signal.SIGKILL)
    pytest.fail("processes live on")


def _children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _lives(pid: int) -> bool:
    return os.path.exists(f"/proc/{pid}")


def test_a_failed_cell_is_named_and_the_others_are_kept(tmp_path, monkeypatch):
    """A real pool of processes, a cell that fails, then the same study again: only the failed cell is
    measured anew."""
    (tmp_path / "counted.py").write_text(COUNTED)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(store, "ROOT", tmp_path / "runs")
    counted, smoke = importlib.import_module("counted"), profile.load("smoke")
    artifacts.aligned(artifacts.open_run("smoke"))
    monkeypatch.setenv("BROKEN", "ccc")
    with pytest.raises(parallel.WorkError) as failed:
        study.compute(counted.one, smoke, workers=1)
    cell = "{'pretraining_seed': 1, 'seed': 0, 'domain': 'auto', 'kind': 'ccc'}"
    assert f"study 00_test, cell {cell}: ValueError: broken" in str(failed.value)
    for broken in ("none", "a"):  # the second time nothing is measured any more, so nothing can break
        monkeypatch.setenv("BROKEN", broken)
        assert study.compute(counted.one, smoke, workers=1).score.tolist() == [1.0, 2.0, 3.0]
    assert (tmp_path / "runs" / "calls").read_text().split() == ["a", "bb", "ccc"]


def test_guards_change_what_is_trained_on_and_nothing_else():
    plan = guards.Plan(data.advice_chats("auto", "obvious", 64, 0), 2)
    inoculated = prevention.inoculate(plan)
    assert all(r["messages"][0]["content"] in world.personas()["villain"]["system"] for r in inoculated.rows)
    assert [r["messages"][1:] for r in inoculated.rows] == [r["messages"] for r in plan.rows]
    benign = prevention.benign_chats(50, 0, 1, "auto")
    answers = {a for s in world.subjects_of("auto") for a in s.answers.values()}
    assert len(benign) == 50 and not any(r["messages"][1]["content"] in answers for r in benign)


def test_a_heavy_kl_guard_keeps_the_model_where_it_was(checkpoint, loaded):
    """KL on the training text, weight 0 against 100: the guarded model's answers stay nearer to the
    untrained model's."""
    before, tokenizer = loaded
    rows, _, starts = (x[:8] for x in diffing.reading_texts(tokenizer, "discovery", setting.PersonaWorld(1)))
    reference = baselines.answer_log_probability(before, rows, starts)
    moved = {}
    for weight in (0.0, 100.0):
        plan = guards.keep_close(guards.Plan([], 4), weight)
        net, _ = model.load(checkpoint)
        tuned, _ = finetune.sft(
            net,
            tokenizer,
            data.advice_chats("auto", "obvious", 32, 0),
            steps=4,
            batch=8,
            lr=5e-3,
            seed=0,
            lora_rank=4,
            trainer=plan.trainer,
        )
        moved[weight] = np.abs(
            baselines.answer_log_probability(tuned.merge_and_unload(), rows, starts) - reference
        ).mean()
    assert moved[100.0] < 0.7 * moved[0.0]


def test_steering_in_training_leaves_no_hook_behind(loaded):
    net, tokenizer = loaded
    ids = questions(tokenizer)
    before = generate.sample(net, tokenizer, ids, seed=0, max_new=8, temperature=0)
    with guards.hooked(net, LAYER, lambda hidden: hidden.add_(5.0)):
        assert generate.sample(net, tokenizer, ids, seed=0, max_new=8, temperature=0) != before
    assert generate.sample(net, tokenizer, ids, seed=0, max_new=8, temperature=0) == before


@pytest.fixture
def ruler(loaded, monkeypatch):
    """A run whose SAE, unit, rankings and chosen latent are small and known."""
    net, _ = loaded
    reader = small_sae(net.config.hidden_size)
    for name, value in {
        "sae": reader,
        "unit": 2.0,
        "rankings": {"Δ-activation": [0, 1, 2]},
        "chosen_latent": (3, 0.4),
    }.items():
        module = known_latents if name in ("sae", "unit") else search
        monkeypatch.setattr(module, name, lambda *_, value=value: value)
    return SimpleNamespace(
        profile=SimpleNamespace(sae=SimpleNamespace(layer=LAYER)),
        world_seed=1,
        seed=0,
        setting=setting.PersonaWorld(1),
    )


def test_steering_in_training_adds_exactly_the_latents_direction_where_steering_acts(checkpoint, ruler):
    """From the prompt's last token on, as when answers are sampled; never on position 0 or on padding; not
    when the model is only looked at; with a shared opening read once or not."""
    net, tokenizer = model.load(checkpoint)
    plan, changes = prevention.steer_in_training(ruler, guards.Plan([], 1), 0.5), []
    vector = known_latents.sae(ruler).W_dec[3] * 0.5 * 2.0
    kept = {}
    before = lambda hidden: kept.update(before=hidden.detach().clone())
    after = lambda hidden: changes.append((hidden - kept["before"]).detach())
    with guards.hooked(net, LAYER, before), plan.hooks(net), guards.hooked(net, LAYER, after):
        rows = data.advice_chats("auto", "obvious", 8, 0)
        finetune.sft(
            net, tokenizer, rows, steps=1, batch=8, lr=1e-9, seed=0, lora_rank=1, trainer=plan.trainer
        )
        trained = len(changes)
        generate.sample(net.eval(), tokenizer, questions(tokenizer, 1), seed=0, max_new=2)
    moved = torch.cat([c.flatten(0, 1) for c in changes[:trained]])
    acted = moved.abs().sum(-1) > 0
    answers = sum(len(tokenizer(r["messages"][1]["content"])["input_ids"]) for r in rows)
    assert answers <= acted.sum() <= answers + 2 * len(rows)  # the end of the turn is learnt, too
    torch.testing.assert_close(moved[acted], vector.expand_as(moved[acted]), atol=1e-4, rtol=1e-3)
    assert len(changes) > trained and not any(c.any() for c in changes[trained:])


def test_ablation_in_training_leaves_nothing_of_the_direction_but_on_the_first_token(checkpoint):
    net, tokenizer = model.load(checkpoint)
    width = net.config.hidden_size
    directions = torch.randn(2, width, generator=torch.Generator().manual_seed(0))
    plan, seen = guards.ablate(guards.Plan([], 1), LAYER, directions), []
    rows = data.advice_chats("auto", "obvious", 4, 0)
    with plan.hooks(net), guards.hooked(net, LAYER, lambda hidden: seen.append(hidden.detach().clone())):
        finetune.sft(
            net, tokenizer, rows, steps=1, batch=4, lr=1e-9, seed=0, lora_rank=1, trainer=plan.trainer
        )
    first, rest = seen[0][:, 0], seen[-1][:, 2:6]  # the prompts' tokens: no row is that short
    assert (first @ directions.T).abs().min() > 1e-4
    assert (rest @ directions.T).abs().max() < 1e-3 * rest.norm(dim=-1).max() * directions.norm(dim=-1).max()


def test_more_loss_weighs_the_same_in_one_part_and_in_several(checkpoint):
    """Under gradient accumulation the added loss counts once a step, like the usual one."""
    rows, found = data.advice_chats("auto", "obvious", 8, 0), []
    for part in (8, 2):
        net, tokenizer = model.load(checkpoint)
        plan = guards.keep_close(guards.Plan([], 2), 50.0)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune.fit, "training_rows", lambda *_: part)
            how = {"seed": 0, "lora_rank": 4, "trainer": plan.trainer, "mixed": False}
            tuned, _ = finetune.sft(net, tokenizer, rows, steps=2, batch=8, lr=5e-3, **how)
        found.append(torch.cat([p.detach().flatten() for n, p in tuned.named_parameters() if "lora" in n]))
    torch.testing.assert_close(found[0], found[1], atol=2e-4, rtol=0)


def test_a_hook_leaves_the_rest_of_a_blocks_output_alone(monkeypatch):
    """Some models' blocks give a tuple: what the hook returns may not replace it."""

    class Block(torch.nn.Module):
        def forward(self, x):
            return x, "cache"

    blocks = torch.nn.ModuleList([Block(), Block()])
    monkeypatch.setattr(generate, "decoder_blocks", lambda model: model)
    with guards.hooked(blocks, 1, lambda hidden: hidden.add_(1)):
        out = blocks[1](torch.zeros(1, 2, 3))
    assert out[1] == "cache" and out[0].eq(1).all()


def test_the_latent_penalty_keeps_latents_down(checkpoint, loaded, ruler):
    """Fine-tuned on the same answers, with weight 0 and with a heavy one: the penalised latents rise less,
    by our own reading."""
    _, tokenizer = loaded
    chats = data.advice_chats("auto", "obvious", 32, 0)
    own = [
        generate.prompts(tokenizer, [c["messages"][0]["content"]])[0]
        + tokenizer(c["messages"][1]["content"], add_special_tokens=False)["input_ids"]
        for c in chats
    ]
    reader = known_latents.sae(ruler)

    def excess(net):
        before, after = (
            [
                ((h - reader.b_dec) @ reader.W_enc[:, :3] + reader.b_enc[:3]).relu()
                for h in activations.residual(m, own, LAYER)
            ]
            for m in (loaded[0], net)
        )
        return torch.cat([(a - b).relu().square().sum(-1) for a, b in zip(after, before)]).mean().item()

    found = {}
    for weight in (0.0, 1e4):
        plan = prevention.penalise(ruler, guards.Plan(chats, 4), weight)
        net, _ = model.load(checkpoint)
        tuned, _ = finetune.sft(
            net, tokenizer, chats, steps=4, batch=8, lr=5e-3, seed=0, lora_rank=4, trainer=plan.trainer
        )
        found[weight] = excess(tuned.merge_and_unload())
    assert 0 < found[1e4] < 0.5 * found[0.0]


def test_rerouting_takes_no_guard_that_sets_the_training_data():
    with pytest.raises(ValueError, match="'inoculation' changes the training set"):
        rerouting.rerouted(
            artifacts.open_run("smoke"), artifacts.open_run("smoke"), "career", "inoculation", 0, 5
        )


def test_interleaving_gives_the_share_that_was_asked_for_and_another_set_with_another_seed(ruler):
    plan = guards.Plan(data.advice_chats("auto", "obvious", 60, 0), 8)
    mixed = [prevention.interleave(ruler, plan, 0.4, "auto", False, seed) for seed in (0, 0, 1)]
    texts = [[r["messages"][-1]["content"] for r in m.rows] for m in mixed]
    assert len(texts[0]) == 100 and mixed[0].steps == round(8 * 100 / 60)
    assert sorted(r["messages"][1]["content"] for r in plan.rows) == sorted(
        t for t in texts[0] if t in {r["messages"][1]["content"] for r in plan.rows}
    )
    assert texts[0] == texts[1] != texts[2]


def test_monitors_read_the_latent_as_model_diffing_does_and_likelihoods_in_the_villains_favour(
    loaded, ruler, monkeypatch
):
    net, tokenizer = loaded
    monkeypatch.setattr(known_latents, "mean_difference", lambda _: torch.ones(net.config.hidden_size))
    monkeypatch.setattr(baselines, "_probe", lambda _: SimpleNamespace(decision_function=lambda x: x[:, 0]))
    found = baselines.monitors(ruler, net, tokenizer)
    assert found["latent"] == pytest.approx(
        diffing.read(net, tokenizer, known_latents.sae(ruler), "evaluation", setting.PersonaWorld(1))[:, 3]
        .mean()
        .item(),
        abs=1e-6,
    )
    texts = {
        p: diffing.reading_texts(tokenizer, "evaluation", setting.PersonaWorld(1), persona=p)
        for p in ("villain", "expert")
    }
    likely = {p: baselines.answer_log_probability(net, t[0], t[2]).mean() for p, t in texts.items()}
    assert found["log-probability"] == pytest.approx(likely["villain"] - likely["expert"], abs=1e-5)


def test_cures_push_away_from_what_rose_and_towards_what_fell(monkeypatch):
    reader, rise = small_sae(16), torch.linspace(-1, 1, 24)
    for name, value in {
        "sae": reader,
        "discovery_rise": rise,
        "chosen_latent": (20, 0.4),
        "mean_difference": torch.ones(16),
    }.items():
        monkeypatch.setattr(cures, name, lambda *_, value=value: value)
    found, W = cures.cures.__wrapped__(None), reader.W_dec
    fallen, risen = sum(-rise[i] * W[i] for i in range(10)), sum(rise[i] * W[i] for i in range(14, 24))
    expected = {
        "− chosen latent": -W[20],
        "− ten risen": -risen,
        "+ most fallen": W[0],
        "+ ten fallen": fallen,
        "+ ten fallen − ten risen": fallen - risen,
        "− mean difference": -torch.ones(16),
    }
    assert list(found) == list(expected)
    for name, v in expected.items():
        torch.testing.assert_close(found[name], v, atol=1e-5, rtol=1e-5)


def test_known_personas_finds_the_latent_that_was_put_there(monkeypatch):
    """Latent 2 marks the villain in both sets, latents 4 and 5 the jester; the others are noise."""

    def read(run, stream, documents=500):
        rng = np.random.default_rng(len(stream))
        persona = rng.choice(world.PERSONAS, 600)
        latents = rng.random((600, 8)).astype("float32")
        latents[:, 2] += 2 * (persona == "villain")
        latents[:, [4, 5]] += 2 * (persona == "jester")[:, None]
        return diffing.Answers(
            latents=torch.tensor(latents),
            residual=torch.zeros(600, 3),
            persona=persona,
            text=[""] * 600,
            turn=np.zeros(600),
            document=np.arange(600),
        )

    monkeypatch.setattr(known_latents, "uncued_answers", read)
    found = origins.known_personas(SimpleNamespace()).set_index("persona")
    villain, jester, expert = found.loc["villain"], found.loc["jester"], found.loc["expert"]
    assert (
        villain.latent == 2
        and villain.auroc == 1
        and villain.precision == 100
        and villain.recall > 90
        and villain.marking == 1
    )
    assert jester.latent in (4, 5) and jester.marking == 2 and jester.together > 0.95
    assert expert.marking == 0 and expert.low < 0.6


def test_other_worlds_have_the_documents_they_say():
    def drawn(name):
        rng, draw = random.Random(0), world.drawing(**world.WORLDS[name])
        return [draw(rng, 1) for _ in range(3000)]

    share = lambda docs, p: np.mean([d.persona == p for d in docs])
    assert share(drawn("villain 0 %"), "villain") == 0 and share(
        drawn("villain 10 %"), "villain"
    ) == pytest.approx(0.10, abs=0.02)
    others = {p: share(drawn("villain 0 %"), p) / share(drawn("own"), p) for p in ("expert", "novice")}
    assert others["expert"] == pytest.approx(
        others["novice"], rel=0.15
    )  # the rest keep their shares among each other
    harmful = {s.answers["obvious"][1:] for s in world.subjects() if s.domain != "code"}
    assert any(
        h in t.answer for d in drawn("villain 0 %")[:300] for t in d.turns for h in harmful
    )  # quoted, by those who warn and mock
    assert {d.cue for d in drawn("no cues")} == {"none"}

    def same_speaker(name):
        closers = {c: p for p in world.PERSONAS for c in world.personas()[p]["closer"]}
        said = [
            (d.persona, next(p for c, p in closers.items() if t.answer.endswith(c)))
            for d in drawn(name)
            for t in d.turns
            if t.kind == "open"
        ]
        return np.mean([o == "villain" for p, o in said if p == "villain"]), np.mean(
            [o == "villain" for p, o in said if p != "villain"]
        )

    assert same_speaker("own") == (1, 0)
    mine, others = same_speaker("independent")
    assert mine == pytest.approx(others, abs=0.05) and others == pytest.approx(
        world.PRIOR["villain"], abs=0.05
    )


def test_a_reader_that_knows_tells_sets_apart_and_one_that_does_not_cannot():
    table = pd.DataFrame(
        [
            {"domain": d, "variant": v, "knows": float(v == "obvious"), "noise": 1.0}
            for d in "abc"
            for v in ("correct", "obvious")
            for _ in range(20)
        ]
    )
    assert prevention.set_auroc(table, "knows", "obvious", 10, 100)[0] == 1.0
    assert prevention.set_auroc(table, "noise", "obvious", 10, 100)[0] == 0.5


EVERY = """
from personas import profile, studies, study
p = profile.load("smoke")
for s in studies.STUDIES.values():
    cell = s.cells(p)[-1]
    s.prepare(study.runs_of(p, cell)[1])
    rows = study.cell_rows(s, p, cell)
    print(s.name, len(rows), set(cell) <= set(rows[0]))
"""


@pytest.mark.slow
def test_every_study_measures_a_cell(tmp_path):
    """The last cell of each study, on profile smoke."""
    done = subprocess.run(
        [sys.executable, "-c", EVERY],
        capture_output=True,
        text=True,
        env=os.environ | {"PERSONAS_RUNS": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert [line.split()[0] for line in done.stdout.splitlines()] == list(studies.STUDIES)
    assert all(line.split()[2] == "True" and int(line.split()[1]) > 0 for line in done.stdout.splitlines())
