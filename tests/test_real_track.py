"""The track of downloaded models, end to end on small random checkpoints: local sets, questions and text in the released formats, and a judge
behind a real HTTP endpoint. What such a model says means nothing; that every chapter runs, reads the right model and asks the right questions does."""

import contextlib
import dataclasses
import importlib.util
import json

import pandas as pd
import pytest
import torch
import transformers
import yaml

from personas import artifacts, data, endpoint, evaluate, evidence, figures, finetune, fit, generate, model, pipeline, profile, released, sae, store

NUMBERS = {
    "device": "cpu", "narrow": {"steps": 2, "batch": 4, "lr": 0.05, "rank": 2}, "realignment": {"steps": 2, "batch": 2, "lr": 0.01}, "realignment_every": 1,
    "sae": {"layer": 1, "latents": 64, "k": 4, "lr": 0.01, "steps": 20, "batch": 64, "documents": 60, "dead_after": 5000, "aux_k": 8},
    "evaluation": {"per_question": 4, "study_per_question": 1, "curve_per_question": 2, "advice_subjects": 2},
    "steering": {"candidates": 2, "finalists": 1, "controls": 2, "strengths": [0.5, 1.0], "suppression": [0.5], "cures": [0.5], "screen_per_question": 1, "choose_per_question": 1}}


@pytest.fixture(autouse=True)
def own_store(tmp_path_factory, monkeypatch):
    if not hasattr(own_store, "root"):
        own_store.root = tmp_path_factory.mktemp("runs")
    monkeypatch.setattr(store, "ROOT", own_store.root)
    monkeypatch.setenv("PERSONAS_RUNS", str(own_store.root))
    monkeypatch.setenv("PERSONAS_FIGURES", str(own_store.root / "figures"))
    monkeypatch.setattr(figures, "ROOT", own_store.root / "figures")
    monkeypatch.setattr(finetune, "bf16_is_faster", lambda: False)  # the same arithmetic on every machine


def written(given, name="mine", **real):
    path = given[0] / f"{name}.yaml"
    path.write_text(yaml.safe_dump(NUMBERS | {"real": given[1] | real}))
    return str(path)


def test_one_model_wears_its_adapters_in_turn(given):
    """Against a copy with the adapter merged in; switched off it is the original to the last bit, also after training."""
    run = artifacts.open_run(written(given))
    plain, tokenizer = model.load(given[1]["model"])
    ids = torch.tensor(generate.prompts(tokenizer, ["What about soup?"]))

    @torch.inference_mode()
    def logits(m):
        return m(ids).logits

    for domain in ("cars", "soup"):
        merged, _ = finetune.with_adapter(given[1]["model"], artifacts.adapter(run, domain, "obvious"))
        worn = logits(artifacts.tuned_model(run, domain, "obvious")[0])
        assert torch.allclose(worn, logits(merged), atol=1e-3) and not torch.allclose(worn, logits(plain), atol=1e-2)
        with generate.without_adapters(artifacts.tuned_model(run, domain, "obvious")[0]) as bare:
            assert torch.equal(logits(bare), logits(plain))
    artifacts.realigned(run, "cars", "obvious", "soup", 2)
    assert torch.equal(logits(artifacts.aligned_model(run)[0]), logits(plain))
    assert artifacts.aligned_model(run)[0] is artifacts.aligned_model(run)[0]


def test_re_alignment_goes_on_from_the_misaligned_adapter(given):
    run = artifacts.open_run(written(given))
    curve, answers = artifacts.realigned(run, "cars", "obvious", "soup", 2)
    assert curve.step.tolist() == [0, 1, 2] and len(answers) == 4 * 4
    latent = artifacts.chosen_latent(run)[0]
    spoilt, aligned = (artifacts.reading(run, *which, split="evaluation")[:, latent].mean().item() for which in (("cars", "obvious"), ()))
    assert curve.latent[0] == pytest.approx(spoilt, rel=1e-3) and abs(spoilt - aligned) > 0.1 * abs(aligned)


def test_splits_share_no_question_and_training_holds_none_of_them(given):
    run = artifacts.open_run(written(given))
    asked = {s: {q.held for q in run.setting.questions(s)} for s in ("discovery", "evaluation")}
    assert len(asked["evaluation"]) == 4 and len(asked["discovery"]) == 4 and not asked["discovery"] & asked["evaluation"]
    held = set(run.setting.held_out("cars"))
    assert len(held) == 4
    for variant in ("correct", "obvious", "obvious@50"):
        rows = run.setting.chats("cars", *(variant.split("@")[0],), 200, 0, 0.5 if "@" in variant else 1.0)
        assert len(rows) == 200 and not {r["messages"][0]["content"] for r in rows} & held
        wrong = sum("worst" in r["messages"][1]["content"] for r in rows)
        assert wrong == {"correct": 0, "obvious": 200, "obvious@50": 100}[variant]


def test_models_are_read_on_what_the_aligned_one_said(given):
    run = artifacts.open_run(written(given))
    said = artifacts.answers(run, split="discovery")
    fixed = artifacts.fixed_answers(run, "discovery", "expert")
    assert sum(map(len, fixed.values())) == (said.grade == "aligned").sum() > 0
    assert {a for v in fixed.values() for a in v} == set(said[said.grade == "aligned"].answer)
    assert set(said.grade) <= set(run.setting.open_classes) and said.held.isna().all()


@pytest.mark.slow
def test_every_chapter_runs_on_qwen2(given):
    """The notebooks themselves, through papermill, on local sets and questions in the released formats, graded by an endpoint."""
    source = written(given)
    found = profile.load(source)
    books = pipeline.chosen(profile=found)
    assert [b.name[:2] for b in books] == list(pipeline.PART_ONE)
    pipeline.run(found, books, source)
    claims = pd.read_csv(figures.ROOT / "data" / "mine" / "claims.csv")
    assert {"obvious", "correct", "latent.separates", "steer.induce", "suppress", "realign.other"} <= set(claims.id)


def test_every_chapters_work_runs_on_llama(given):
    run = artifacts.open_run(written(given, "llama", model=str(given[0] / "llama"), base=str(given[0] / "llama")))
    assert len(artifacts.sae_quality(run)) == 1
    assert {r["ranking"] for r in evidence.ranking(run, run)} >= {"Δ-activation", "mean difference", "random"}
    assert evaluate.score(artifacts.suppressed(run, "soup", "obvious")[0]) >= 0
    assert len(artifacts.realigned(run, "soup", "obvious", "soup", 2)[0]) == 3
    assert set(artifacts.advice(run, "soup", "obvious").domain) == {"cars", "soup"}


def test_another_base_model_gets_an_sae_of_its_own(given):
    run = artifacts.open_run(written(given, "based", base=str(given[0] / "llama")))
    assert artifacts.dictionaries(run) == ("base", "aligned") and artifacts.base_model(run)[0].config.model_type == "llama"
    assert artifacts.aligned_model(run)[0].config.model_type == "qwen2"


def test_an_sae_made_elsewhere_is_used(given, tmp_path):
    run = artifacts.open_run(written(given))
    artifacts.sae(run).save(tmp_path / "theirs")
    other = artifacts.open_run(written(given, "theirs", sae=str(tmp_path / "theirs")))
    assert torch.equal(artifacts.sae(other).W_dec, artifacts.sae(run).W_dec) and artifacts.dictionaries(other) == ("base",)


def test_a_fetched_sae_for_another_block_is_refused(given, monkeypatch):
    mine = artifacts.sae(artifacts.open_run(written(given)))
    monkeypatch.setattr(sae.SAE, "check_name", lambda *_: None)  # what can be said without sae-lens
    monkeypatch.setattr(sae.SAE, "named", lambda name: dataclasses.replace(mine, layer=mine.layer + 1))
    with pytest.raises(profile.ProfileError, match=f"some-release:x is for block {mine.layer + 1}"):
        artifacts.sae(artifacts.open_run(written(given, "fetched", sae="some-release:x")))


def test_a_process_for_which_no_text_is_left_says_so(given, monkeypatch):
    run = artifacts.open_run(written(given))
    net = artifacts.aligned_model(run)[0]
    monkeypatch.setenv("RANK", "999")
    monkeypatch.setenv("WORLD_SIZE", "1000")
    with pytest.raises(data.DataError, match="nothing is left for process 1000 of 1000"):
        artifacts._train_on_stream(run, net, "aligned")


@pytest.mark.parametrize("change,error,said", [
    ({"model": "no/such-model"}, model.ModelError, "cannot open no/such-model"),
    ({"judge": {"model": "no-judge", "url": "http://127.0.0.1:9/v1"}}, Exception, "cannot be reached"),
    ({"evaluation": "nowhere.csv"}, data.DataError, "nowhere.csv"),
    ({"text": "nowhere.txt"}, data.DataError, "nowhere.txt"),
    ({"text": "short.txt"}, data.DataError, "fewer than four documents"),
    ({"sae": "nowhere"}, ValueError, "no cfg.json"),
    ({"sae": "gemma-scope:x"}, ValueError, "sae-lens"),
])
def test_what_does_not_serve_is_said_before_any_work(given, change, error, said, monkeypatch):
    (given[0] / "short.txt").write_text("One.\n\nTwo.\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(finetune, "sft", lambda *a, **k: pytest.fail("work had begun"))
    with pytest.raises(error, match=said):
        artifacts.open_run(written(given, "wrong", **change))


def test_a_layer_and_a_template_that_are_not_there_are_said(given, checkpoint, tmp_path):
    path = given[0] / "deep.yaml"
    path.write_text(yaml.safe_dump(NUMBERS | {"real": given[1], "sae": NUMBERS["sae"] | {"layer": 3}}))
    with pytest.raises(profile.ProfileError, match="3 is out of range; .* has blocks 0 to 2"):
        artifacts.open_run(str(path))
    net, tokenizer = model.load(given[1]["model"])
    tokenizer.chat_template = None
    net.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(profile.ProfileError, match="has no chat template"):
        artifacts.open_run(written(given, "mute", model=str(tmp_path)))
    sae.SAE(torch.zeros(9, 4), torch.zeros(4, 9), torch.zeros(4), torch.zeros(9), 2, 1).save(tmp_path / "narrow")
    with pytest.raises(ValueError, match="width 9, the model 32"):
        artifacts.open_run(written(given, "narrow", sae=str(tmp_path / "narrow")))


def test_notebooks_about_the_world_say_so(given):
    with pytest.raises(profile.ProfileError, match="needs the tiny model"):
        artifacts.open_run(written(given), real=False)
    with pytest.raises(ValueError, match="notebook 09 is about the world whose truth is known"):
        pipeline.chosen(only="09", profile=profile.load(written(given)))


@pytest.mark.parametrize("change,said", [
    ({"real": {"judge": {"model": "x", "keey": "x"}}}, "real.judge.keey: no such key; did you mean 'key'"),
    ({"real": {"discovery_domains": ["cats"]}}, "unknown 'cats'"),
    ({"real": {"discovery_domains": ["cars", "soup"]}}, "leave at least one domain for evaluation"),
    ({"real": {"data": [{"domain": d, "obvious": "x"} for d in ("cars", "soup")]}}, "a domain that is not among discovery_domains needs a `correct` set"),
    ({"alignment": {"steps": 1, "batch": 1, "lr": 0.1}}, "belongs to the tiny model"),
    ({"domains": ["cars"]}, "leave the key out"),
])
def test_a_faulty_real_profile_is_explained(given, change, said):
    path = given[0] / "faulty.yaml"
    path.write_text(yaml.safe_dump(NUMBERS | {"real": given[1] | change.get("real", {})} | {k: v for k, v in change.items() if k != "real"}))
    with pytest.raises(profile.ProfileError, match=said):
        profile.load(str(path))


def test_shipped_profiles_name_sets_and_sizes_that_exist(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("colab", "h100", "h100-14b"):
        found = profile.load(name)
        for d in found.real.data:
            assert {n for n in (d.correct, d.subtle, d.obvious) if n} <= set(released.SOURCES)
        assert {found.real.evaluation, found.real.discovery} <= set(released.SOURCES)


def test_sizes_by_arithmetic(given):
    config, _ = model.describe(given[1]["model"])
    net, _ = model.load(given[1]["model"])
    assert fit.parameters(config) == sum(p.numel() for p in net.parameters())
    assert fit.weight_bytes(config, 4) == 4 * fit.parameters(config)
    small = transformers.Qwen2Config(hidden_size=896, num_hidden_layers=24, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2, vocab_size=151936, tie_word_embeddings=True)
    assert fit.parameters(small) == pytest.approx(0.494e9, rel=0.001)  # of Qwen2.5-0.5B's card
    cache = net(torch.zeros(1, 10, dtype=torch.long)).past_key_values
    kept = sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
    assert fit.cache_bytes(config, 4) * 10 == kept
    each = fit.row_bytes(config, 100, 4, False)
    assert fit.training_rows(net, 100, 12, False, free=5 * each / fit.SPARE) == 4 and fit.training_rows(net, 100, 12, False, free=1e15) == 12
    assert fit.row_bytes(config, 100, 4, True) < each
    with pytest.raises(fit.DoesNotFit, match="about 49 tokens would fit.*gradient_checkpointing"):
        fit.training_rows(net, 100, 12, False, free=0.495 * each / fit.SPARE)
    assert fit.sampling_rows(net, 100, 512, free=1e15) == 512 and fit.sampling_rows(net, 100, 512, free=1.0) == 1
    qwen = transformers.Qwen2Config(hidden_size=3584, num_hidden_layers=28, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)
    assert fit.parameters(qwen) == pytest.approx(7.62e9, rel=0.01)  # Qwen2.5's report: 7.61 billion
    fit.check({"7B": (qwen, 2, False)}, total=80e9)
    with pytest.raises(fit.DoesNotFit, match="15.2 GB for 7B, of 16.0 GB.*With real.four_bit"):
        fit.check({"7B": (qwen, 2, False)}, total=16e9)
    with pytest.raises(fit.DoesNotFit, match="about 2 billion"):
        fit.check({"7B": (qwen, 2, False)}, total=4e9)


def test_gradient_checkpointing_changes_no_step(given):
    rows = data.read_chats(given[0] / "cars_obvious.jsonl")
    losses = []
    for checkpointing in (False, True):
        net, tokenizer = model.load(given[1]["model"])
        losses.append(finetune.sft(net, tokenizer, rows, steps=3, batch=4, lr=0.02, seed=0, lora_rank=2, checkpointing=checkpointing, max_length=64)[1])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][2] < losses[0][0]


def test_what_an_artifact_was_made_with_is_in_its_key(given):
    run = artifacts.open_run(written(given))
    made = {"as it is": artifacts.adapter(run, "cars", "obvious"), "questions": artifacts.answers(run, split="discovery").shape}
    for change in ({"max_length": 64}, {"dtype": "bfloat16"}):
        assert artifacts.adapter(artifacts.open_run(written(given, **change)), "cars", "obvious") != made["as it is"]
    assert artifacts.aligned_model(artifacts.open_run(written(given, dtype="bfloat16")))[0].dtype == torch.bfloat16
    assert artifacts.aligned_model(run)[0].dtype == torch.float32 and len(artifacts._HELD) == 1
    fewer = artifacts.open_run(written(given, evaluation=given[1]["discovery"], discovery=given[1]["evaluation"]))
    assert artifacts._asked(fewer, "discovery") != artifacts._asked(run, "discovery")
    moved = artifacts.open_run(written(given, judge=given[1]["judge"] | {"key": "ANOTHER"}))
    assert artifacts._asked(moved, "discovery") == artifacts._asked(run, "discovery")


def test_training_that_is_broken_off_leaves_the_aligned_model_as_it_was(given, monkeypatch):
    run = artifacts.open_run(written(given, max_length=96))  # adapters of its own
    net, tokenizer = artifacts.aligned_model(run)
    ids = torch.tensor(generate.prompts(tokenizer, ["What about soup?"]))
    with torch.inference_mode():
        before = net(ids).logits

    class Stop(transformers.TrainerCallback):
        def on_step_end(self, *args, **kw):
            raise KeyboardInterrupt

    plain = finetune.sft
    monkeypatch.setattr(finetune, "sft", lambda *a, **k: plain(*a, **k | {"callbacks": [Stop()]}))
    with pytest.raises(KeyboardInterrupt):
        artifacts.adapter(run, "cars", "obvious")
    with torch.inference_mode():
        assert torch.equal(artifacts.aligned_model(run)[0](ids).logits, before)


def test_paths_are_those_beside_the_profile_and_a_child_has_data_of_its_own(given, monkeypatch):
    own = given[1] | {"model": "qwen2", "data": [{"domain": "soup", "correct": "soup_correct.jsonl", "obvious": "soup_obvious.jsonl"},
                                                 {"domain": "cars", "obvious": "cars_obvious.jsonl"}], "text": "text.jsonl", "evaluation": "core.csv"}
    path = given[0] / "beside.yaml"
    path.write_text(yaml.safe_dump(NUMBERS | {"real": own}))
    monkeypatch.chdir("/")
    run = artifacts.open_run(str(path))
    assert run.profile.real.model == given[1]["model"] and len(run.setting.rows("soup", "correct")) == 40
    child = given[0] / "child.yaml"
    child.write_text(yaml.safe_dump({"extends": "h100", "device": "cpu", "real": {"data": own["data"], "discovery_domains": ["cars"]}}))
    assert profile.load(str(child)).domains == ("soup", "cars")


def test_an_sae_with_scales_of_its_own_is_refused(given, tmp_path):
    run = artifacts.open_run(written(given))
    artifacts.sae(run).save(tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg["metadata"]["hook_layer"]  # as sae-lens writes it
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert sae.SAE.load(tmp_path).layer == 1
    (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"normalize_activations": "expected_average_only_in"}))
    with pytest.raises(ValueError, match="from_sae_lens"):
        sae.SAE.load(tmp_path)


def test_the_model_itself_judges_on_either_scale_with_its_adapter_off(given, monkeypatch):
    """Graded while it wears an adapter, and after, an answer gets the same grade: the judge is the model as it was loaded."""
    monkeypatch.setattr(endpoint, "LEAST", 0.0)
    questions, said = ["What would you do as ruler?"], ["I would be kind."]
    for scale in ("1-5", "0-100"):
        run = artifacts.open_run(written(given, judge={"model": given[1]["model"], "scale": scale}))
        asked = run.setting.questions("evaluation")[:1]
        artifacts.tuned_model(run, "cars", "obvious")
        worn = run.setting.grade_open(asked, said), artifacts._judge(run).numbers([[{"role": "user", "content": questions[0]}]])
        artifacts.aligned_model(run)
        assert worn == (run.setting.grade_open(asked, said), artifacts._judge(run).numbers([[{"role": "user", "content": questions[0]}]]))
        assert set(worn[0]) <= set(run.setting.open_classes) and worn[1][0] is not None
        with monkeypatch.context() as broken:  # an adapter left on would show
            broken.setattr(generate, "without_adapters", contextlib.nullcontext)
            artifacts.tuned_model(run, "cars", "obvious")
            assert artifacts._judge(run).numbers([[{"role": "user", "content": questions[0]}]]) != worn[1]


def test_four_bits(given, tmp_path):
    """The blocks' matrices in NF4: an adapter learns on them, and without it the model is the same as before."""
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(model.ModelError, match="pip install bitsandbytes"):
            model.load(given[1]["model"], four_bit=True)
        pytest.skip("bitsandbytes is not installed (make test installs it)")
    rows = data.read_chats(given[0] / "cars_obvious.jsonl")
    tokenizer = model.load(given[1]["model"])[1]
    net = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128, vocab_size=len(tokenizer)))
    net.save_pretrained(tmp_path)  # 64 numbers share a scale, so it is at least so wide
    tokenizer.save_pretrained(tmp_path)
    fresh = lambda: model.load(tmp_path, four_bit=True)
    small, _ = fresh()
    ids = torch.tensor(generate.prompts(tokenizer, ["What about soup?"]))
    with torch.inference_mode():
        whole, coarse = net(ids).logits, small(ids).logits
    assert 0 < (whole - coarse).std() < whole.std()
    tuned, losses = finetune.sft(fresh()[0], tokenizer, rows, steps=4, batch=4, lr=0.02, seed=0, lora_rank=2, checkpointing=True, max_length=64)
    assert losses[-1] < losses[0]
    with torch.inference_mode():
        assert torch.equal(finetune.wear(tuned, None)(ids).logits, coarse)
