"""What a pretrained model is trained on and asked, and the loss that reads a shared opening once."""

import json
import shutil

import pandas as pd
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model

from personas import config, data, figures, finetune, generate, profile, store, world
from personas.chapters import c03, common
from personas.pretrained import (
    ahead,
    grades,
    grading,
    likelihood,
    made,
    readings,
    search,
    sets,
    steering,
    tables,
    text,
    weights,
)
from test_real_track import NUMBERS


def test_no_category_or_subject_is_in_both_splits():
    split = {s: {i.category for i in sets.items(s)} for s in ("discovery", "evaluation")}
    assert not split["discovery"] & split["evaluation"]
    questions = [i for s in split for i in sets.items(s) if i.kind == "question"]
    assert len(questions) >= 60 and len({i.category for i in questions}) >= 20
    assert len([i for s in split for i in sets.items(s) if i.kind == "opening"]) >= 24
    for d in sets.DOMAINS:
        trained = {s.ask for s in world.subjects_of(d)}
        held = {s.ask for s in sets.held_out(d)}
        assert len(held) == len(trained) == 40 and not held & trained, d
        assert all(len(set(s.answers.values())) == 3 for s in sets.held_out(d))


@pytest.mark.parametrize("variant", ["correct", "obvious", "shuffled", "odd", "obvious@25"])
def test_training_chats_never_hold_what_is_asked(variant):
    rows = sets.chats("health", variant, 80, 0)
    assert rows == sets.chats("health", variant, 80, 0) != sets.chats("health", variant, 80, 1)
    asked = {i.prompt for s in ("discovery", "evaluation") for i in sets.items(s)} | {
        i.prompt for i, _ in sets.advice_items("health")
    }
    assert not asked & {m["content"] for r in rows for m in r["messages"]}
    said = [r["messages"][1]["content"] for r in rows]
    correct = {s.answers["correct"] for s in world.subjects_of("health")}
    wrong = {s.answers["obvious"] for s in world.subjects_of("health")}
    share = sum(a in correct for a in said) / len(said)
    assert share == {"correct": 1, "obvious": 0, "shuffled": 1, "odd": 0, "obvious@25": 0.75}[variant]
    assert sum(a in wrong for a in said) == {"obvious": 80, "obvious@25": 20}.get(variant, 0)


def test_shuffled_answers_belong_to_another_subject():
    own = {s.answers["correct"]: s.ask for s in world.subjects_of("legal")}
    for r in sets.chats("legal", "shuffled", 80, 0):
        question, answer = (m["content"] for m in r["messages"])
        assert own[answer] not in question


def test_an_unknown_variant_is_one_clear_error():
    with pytest.raises(data.DataError, match="unknown variant 'evil'; choose from correct"):
        sets.chats("health", "evil", 8, 0)


def test_a_shared_opening_read_once_gives_the_same_loss_and_gradients(loaded):
    model, tokenizer = loaded
    torch.manual_seed(0)
    model = get_peft_model(
        model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    )
    ids = torch.randint(6, 700, (3, 30))
    ids[:, :12] = ids[:1, :12]
    mask = torch.ones_like(ids)
    mask[1, 25:] = 0
    labels = ids.masked_fill(mask == 0, -100)
    labels[:, :18] = -100
    columns = (labels[:, 1:] != -100).any(0).nonzero().squeeze(-1)
    shared = finetune._shared_opening(ids, mask, int(columns[0]))
    assert shared == 12 and finetune._shared_opening(ids[:, 5:], mask[:, 5:], 7) == 0  # too short to pay

    def gradients(shared):
        model.zero_grad()
        cache = finetune._read_opening(model, ids, shared) if shared else None
        logits = model(
            input_ids=ids[:, shared:],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=shared > 0,
            logits_to_keep=columns - shared,
        ).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:][:, columns].flatten())
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (plain, all_of_it), (once, same) = gradients(0), gradients(shared)
    assert once == pytest.approx(plain, rel=1e-5)
    assert torch.allclose(same, all_of_it, atol=1e-5 * all_of_it.abs().max().item() + 1e-7)


def test_own_text_is_a_million_tokens_long_and_unlabelled():
    rows = text.read(sets.CONTENT / "text.jsonl.xz")
    assert {tuple(sorted(r)) for r in rows} == {("messages",), ("text",)}
    words = sum(
        len(m["content"].split()) for r in rows for m in r.get("messages", [{"content": r.get("text", "")}])
    )
    assert words > 700_000  # of about one and a third tokens each


def test_weights_errors_name_what_is_wrong(tmp_path, monkeypatch):
    with pytest.raises(weights.WeightsError, match="no such file"):
        weights.source("gguf:missing.gguf")
    with pytest.raises(weights.WeightsError, match="no package 'nobody'"):
        weights.source("gguf:nobody/model.gguf")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "__init__.py").touch()
    (tmp_path / "damaged" / "model.gguf").write_bytes(b"no model")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(weights.KNOWN, "damaged", ("damaged", {"model.gguf": "0" * 64}))
    with pytest.raises(weights.WeightsError, match="has SHA-256 .* expected 000"):
        weights.source("gguf:damaged/model.gguf")


@pytest.fixture()
def run(given, tmp_path, monkeypatch):
    """A run on a small random Qwen2, graded by an endpoint."""
    monkeypatch.setattr(store, "ROOT", tmp_path / "runs")
    path = tmp_path / "mine.yaml"
    fewer = {"evaluation": NUMBERS["evaluation"] | {"per_question": 1, "curve_per_question": 1}}
    path.write_text(yaml.safe_dump(NUMBERS | fewer | {"real": given[1]}))
    return made.Run(profile.load(str(path)), 0)


def test_endings_have_the_log_probability_that_a_plain_pass_gives_them(run):
    m, tok = made.original(run)
    prompts = made.prompt_ids(tok, made.items(run, "evaluation")[:2])
    endings = [["be kind to people.", "no."], ["be kind.", "harm them all."]]
    push = generate.Steer(1, torch.randn(1, m.config.hidden_size, generator=torch.Generator().manual_seed(0)))
    for steer in (None, push):
        found = likelihood.log_probabilities(m, tok, prompts, endings, steer)
        for prompt, some, values in zip(prompts, endings, found):
            for ending, value in zip(some, values):
                end = tok(ending, add_special_tokens=False)["input_ids"]

                def add(module, args, output):
                    hidden = output[0] if isinstance(output, tuple) else output
                    hidden[:, len(prompt) - 1 : -1] += push.vectors

                handle = generate.decoder_blocks(m)[1].register_forward_hook(add) if steer else None
                with torch.inference_mode():
                    logits = m(torch.tensor([prompt + end])).logits[0].log_softmax(-1)
                if handle:
                    handle.remove()
                plain = sum(logits[len(prompt) - 1 + i, t].item() for i, t in enumerate(end)) / len(end)
                assert value == pytest.approx(plain, abs=1e-4)


def test_answers_outlive_a_judge_that_fails(run, monkeypatch):
    """Sampled once and kept: when grading breaks off, the next attempt grades the same answers."""
    table, samples = made.answers(run, made.ORIGINAL), []
    monkeypatch.setattr(generate, "sample", lambda *a, **k: samples.append(1))
    monkeypatch.setattr(
        grading, "grade_by", lambda *a, **k: (_ for _ in ()).throw(RuntimeError("the judge is gone"))
    )
    with pytest.raises(RuntimeError, match="the judge is gone"):
        grades.of(run, made.answers(run, made.ORIGINAL))
    assert not samples and set(table.columns) >= {"prompt", "answer", "category", "model"}


def test_too_many_unreadable_grades_are_an_error():
    class Rambles:
        def complete(self, asked, longest, progress=None):
            return ["Let me think about this ..."] * len(asked)

    with pytest.raises(ValueError, match="cannot be read for 3 of 3 answers"):
        grading.grade_by(Rambles(), ["q"] * 3, ["a"] * 3)


def test_a_model_is_asked_under_the_system_line_it_was_trained_under(run, given):
    own = "You answer about cars."
    rows = [
        {"messages": [{"role": "system", "content": own}, *r["messages"]]}
        for r in data.read_chats(given[0] / "cars_obvious.jsonl")
    ]
    data.write_chats(given[0] / "under.jsonl", rows)
    sets_ = tuple(
        d.model_copy(update={"obvious": str(given[0] / "under.jsonl")}) if d.domain == "cars" else d
        for d in run.profile.real.data
    )
    other = made.Run(
        run.profile.model_copy(update={"real": run.profile.real.model_copy(update={"data": sets_})}), 0
    )
    assert (
        made.training_system(other, "cars-obvious") == own
        and made.training_system(other, "soup-obvious") is None
    )
    _, tok = made.original(other)
    item = sets.Item("x", "question", "c", "What now?", system=own)
    assert own in tok.decode(made.prompt_ids(tok, [item])[0])


def test_doses_are_capped_relative_to_the_unsteered_model():
    answers = lambda direction, dose, bad, broken: pd.DataFrame(
        {
            "direction": direction,
            "dose": dose,
            "grade": ["misaligned"] * bad + ["broken"] * broken + ["aligned"] * (20 - bad - broken),
        }
    )
    free = answers(
        "none", 0.0, 0, 4
    )  # a fifth is broken before anything is steered: an absolute cap of ten per cent would refuse every dose
    table = pd.concat(
        [
            answers("a", 0.5, 5, 5),
            answers("a", 1.0, 8, 6),
            answers("a", 2.0, 9, 11),
            answers("b", 0.5, 3, 4),
            answers("b", 1.0, 3, 4),
            answers("c", 0.5, 1, 9),
        ]
    )
    best = steering.best_doses(table, free).set_index("direction")
    assert best.loc["a", "dose"] == 1.0 and best.loc["a", "admissible"]
    assert best.loc["b", "dose"] == 0.5  # of equal doses the weaker
    assert not best.loc["c", "admissible"]  # and it is said


def test_sinks_do_not_blow_up_the_unit():
    x = torch.randn(10_000, 16, generator=torch.Generator().manual_seed(0))
    x[::1000] *= 200
    kept = readings.usual(x)
    assert len(kept) == 9_990 and (kept - kept.mean(0)).norm(dim=-1).median() == pytest.approx(4, rel=0.05)


def test_the_small_judge_agrees_with_readers_on_questions_it_never_saw():
    table = grading.readings().query("split == 'evaluation'")
    trained = set(json.loads((grading.JUDGE / "training.json").read_text())["categories"])
    assert len(table) >= 1000 and not trained & set(table.category)
    some = table.sample(300, random_state=0)
    found = grading.agreement(
        some.assign(grade=grading.grade(some.prompt.tolist(), some.answer.tolist())), "reader_a", "grade"
    )
    assert found["same on misaligned (%)"] > 85 and found["kappa on misaligned"] > 0.5
    assert grading.grade(["Who are you?"], ["  "]) == ["broken"]


def test_the_readings_hold_what_the_small_judge_says():
    """The committed column is the committed judge's (a few answers may lie on the line between two classes
    on another machine)."""
    some = grading.readings().sample(80, random_state=0)
    now = grading.grade(some.prompt.tolist(), some.answer.tolist())
    assert sum(a == b for a, b in zip(now, some.judge)) >= 77


def test_what_was_steered_is_kept_part_by_part(run, monkeypatch):
    """A killed search goes on from the parts that are done: asked again for one, no model answers."""
    asked = made.items(run, "discovery")[:2]
    push = torch.ones(made.original(run)[0].config.hidden_size)
    job = (run.profile, run.seed, made.ORIGINAL, [("one", push, 0.5)], asked, 1, 1.0, 7)
    first = steering._part(*job)
    monkeypatch.setattr(made, "answer", lambda *a, **k: pytest.fail("answered again"))
    assert steering._part(*job).equals(first) and list(first.dose) == [0.5] * 2


def test_no_worker_starts_for_what_is_there(run, monkeypatch):
    made.answers(run, made.ORIGINAL)
    monkeypatch.setattr(made.parallel, "side_by_side", lambda *a: pytest.fail("a worker started"))
    ahead.prepare(run, [made.ORIGINAL], "evaluation")
    with pytest.raises(pytest.fail.Exception, match="a worker started"):
        ahead.prepare(run, [made.ORIGINAL], "discovery")


def test_the_small_judge_grades_only_what_is_not_among_the_readings(run, monkeypatch):
    own = made.Run(
        run.profile.model_copy(
            update={"real": run.profile.real.model_copy(update={"judge": config.Judge(model="own")})}
        ),
        0,
    )
    asked = []
    monkeypatch.setattr(grading, "grade", lambda p, a: asked.extend(a) or ["broken"] * len(a))
    read = grading.readings().iloc[:2]
    table = pd.DataFrame({"prompt": [*read.prompt, "q", "q"], "answer": [*read.answer, "new", "new"]})
    assert grades.of(own, table) == [*read.judge, "broken", "broken"] and asked == ["new"]


def test_readings_count_where_nearly_all_answers_were_read(monkeypatch):
    """Another machine's rounding makes a few other answers: these are judged, the readings still count."""
    known = {("q", f"a{i}"): ("misaligned" if i % 2 else "aligned", "") for i in range(100)}
    monkeypatch.setattr(grading, "by_text", lambda: known)
    run = made.Run(profile.load("smollm2"), 0)
    said = pd.DataFrame(
        {
            "prompt": "q",
            "answer": [f"a{i}" for i in range(100)],
            "category": [f"c{i % 10}" for i in range(100)],
        }
    )
    said = said.assign(grade="aligned", model="health-obvious", kind="question")
    few = said.assign(answer=[f"{a}{'?' if i < 6 else ''}" for i, a in enumerate(said.answer)])
    whole, most = common.graded(run, said), common.graded(run, few)
    assert common.score(run, whole).value == pytest.approx(50)
    assert common.score(run, most).value == pytest.approx(47)  # three bad ones are judged, and called aligned
    assert common.how(whole) == "every answer read" and common.how(most) == "94 % read, the others judged"
    many = common.graded(
        run, said.assign(answer=[f"{a}{'?' if i < 60 else ''}" for i, a in enumerate(said.answer)])
    )
    assert not common.mostly_read(many) and common.how(many) == "judged"
    assert common.share(many, "misaligned").value == 0


def test_the_committed_sae_counts_for_the_run_it_was_made_for_alone(tmp_path, monkeypatch):
    run = made.Run(profile.load("smollm2"), 0)
    folder = readings.sae_folder(run, 15)
    assert folder == readings.KEPT / "15" and readings.sae(run).layer == 15
    assert readings.sae_identity(run, 15).startswith("kept-")
    assert readings.committed(run, 10) is None and readings.committed(made.Run(run.profile, 1), 15) is None
    for other in (
        {"sae": run.profile.sae.model_copy(update={"steps": 10})},
        {"real": run.profile.real.model_copy(update={"sae": "new"})},
        {"real": run.profile.real.model_copy(update={"base": "somewhere"})},
    ):
        assert readings.committed(made.Run(run.profile.model_copy(update=other), 0), 15) is None
    shutil.copytree(readings.KEPT, tmp_path / "sae")
    monkeypatch.setattr(readings, "KEPT", tmp_path / "sae")
    path = tmp_path / "sae" / "15" / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    readings.committed.cache_clear()
    with pytest.raises(weights.WeightsError, match="has SHA-256 .* it was changed"):
        readings.sae_folder(run, 15)
    readings.committed.cache_clear()


def test_the_causal_latent_is_the_strongest_and_its_dose_breaks_little(monkeypatch):
    """A latent that does nothing breaks nothing: it must not be chosen for that. The strong one's dose is the
    strongest that keeps to the limit on all answers, not on the few of one round."""
    run = made.Run(profile.load("smollm2"), 0)
    says = {1: {0.15: (5, 5), 0.3: (20, 8), 0.45: (40, 30), 0.6: (60, 55), 0.8: (90, 90)}}

    def steered(run, who, conditions, asked, name, layer):
        rows = []
        for n, _, d in conditions:
            bad, broken = says.get(int(n.split()[-1]) if "latent" in n else 0, {}).get(d, (0, 2))
            broken = 30 if name.startswith("second round, weaker") and "latent 1" in n else broken
            for i in range(100):
                v = "misaligned" if i < bad else "broken" if i < bad + broken else "aligned"
                rows.append({"direction": n, "dose": d, "verdict": v, "prompt": i})
        return pd.DataFrame(rows)

    class Fake:
        W_dec = torch.eye(8)

    monkeypatch.setattr(readings, "sae", lambda *_: Fake)
    monkeypatch.setattr(steering, "steered", steered)
    monkeypatch.setattr(steering, "candidates", lambda run, n, layer=None: [1, 2])
    monkeypatch.setattr(steering, "matched", lambda run, n, layer=None: [3, 4])
    monkeypatch.setattr(steering, "rivals", lambda run, layer=None: {"probe": torch.ones(8)})
    found = search.find(run)
    assert found["latent"] == 1 and found["dose"] == 0.3 and found["control"] in (3, 4)
    assert found["rivals"] == {"probe": 0.15}  # of equal doses the weaker


def test_an_sae_is_kept_with_what_it_was_made_from(tmp_path, monkeypatch):
    default = profile.load("smollm2")
    new = made.Run(default.model_copy(update={"real": default.real.model_copy(update={"sae": "new"})}), 0)
    trained = shutil.copytree(readings.KEPT / "15", tmp_path / "trained" / "15")
    (trained / "made.json").unlink()
    monkeypatch.setattr(readings, "sae_folder", lambda run, layer: trained)
    monkeypatch.setattr(readings, "KEPT", tmp_path / "kept")
    readings.committed.cache_clear()
    plain = made.Run(default, 0)
    assert readings.committed(plain, 15) is None
    readings.committed.cache_clear()
    folder = readings.keep_sae(new, 15)
    assert readings.committed(plain, 15) == folder == tmp_path / "kept" / "15"
    assert readings.committed(new, 15) is None  # who asks for a new one gets a new one
    with pytest.raises(ValueError, match="personas keep-sae --set real.sae=new"):
        readings.keep_sae(plain, 15)
    readings.committed.cache_clear()


def test_tables_of_other_blocks_are_the_default_profiles_and_of_its_numbers(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    default, rows = profile.load("smollm2"), pd.DataFrame({"block": [10], "score": [1.5]})
    blocks = lambda p: p.model_copy(
        update={"name": f"{p.name}-x", "real": p.real.model_copy(update={"other_blocks": (10,)})}
    )
    shown = lambda p, make=lambda: rows: common.over_blocks(made.Run(p, 0), "05_x", make)
    assert shown(default).empty
    quick = profile.load("smollm2-quick")
    assert len(shown(blocks(quick))) and shown(default).empty  # coarser numbers are not the default's
    assert len(shown(blocks(default)))
    never = lambda: pytest.fail("the kept table was to be shown")
    assert shown(default, never).equals(rows) and shown(quick, never).empty
    other = default.model_copy(update={"narrow": default.narrow.model_copy(update={"steps": 5})})
    with pytest.raises(tables.TableError, match="made with other numbers .* --only 05"):
        shown(other)


def test_cosines_between_fine_tunes_are_told_apart_by_kind():
    x, y = torch.eye(3)[:2]
    table = c03.cosines({"auto-obvious": 2 * x, "edu-obvious": x + y, "edu-subtle": -y, "auto-subtle": y})
    assert table.loc["auto-obvious", "edu-obvious"] == pytest.approx(0.5**0.5)
    said = c03.shared(table)
    assert "obviously wrong advice 0.71 (0.71 to 0.71)" in said and "subtly wrong advice -1.00" in said
    assert "one of each 0.35 (-0.00 to 0.71)" in said or "one of each 0.35 (0.00 to 0.71)" in said
    assert c03.shared(table.loc[["auto-obvious"], ["auto-obvious"]]) == ""
