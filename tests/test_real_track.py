"""A model of the user's own in Part I, end to end on small random checkpoints: local sets, questions and
text in the released formats, and a judge behind a real HTTP endpoint. What such a model says means
nothing; that every chapter runs, reads the right model and asks the right questions does."""

import dataclasses
import importlib.util
import json
import re
import shutil

import pandas as pd
import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file

from personas import (
    artifacts,
    data,
    endpoint,
    explore,
    figures,
    finetune,
    fit,
    generate,
    model,
    pipeline,
    profile,
    released,
    sae,
    sae_files,
    store,
)
from personas.chapters import common, other_blocks
from personas.pretrained import checks, grades, grading, made, readings, steering
from test_exercises import solved

NUMBERS = {
    "device": "cpu",
    "narrow": {"steps": 2, "batch": 4, "lr": 0.05, "rank": 2},
    "realignment": {"steps": 2, "batch": 2, "lr": 0.01},
    "realignment_every": 1,
    "sae": {
        "layer": 1,
        "latents": 64,
        "k": 4,
        "lr": 0.01,
        "steps": 20,
        "batch": 64,
        "documents": 60,
        "dead_after": 5000,
        "aux_k": 8,
    },
    "evaluation": {"per_question": 4, "study_per_question": 1, "curve_per_question": 2, "advice_subjects": 2},
    "steering": {
        "candidates": 2,
        "finalists": 1,
        "controls": 2,
        "strengths": [0.5, 1.0],
        "suppression": [0.5],
        "cures": [0.5],
        "screen_per_question": 1,
        "choose_per_question": 1,
    },
}


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


def test_re_alignment_goes_on_from_the_misaligned_adapter(given):
    run = common.open_run(written(given))
    both = [
        load_file(f / "adapter_model.safetensors")
        for f in (made.adapter(run, "cars", "obvious"), made.realigned(run, "cars", "soup"))
    ]
    before, after = (torch.cat([w[k].flatten() for k in sorted(w)]) for w in both)
    assert 0 < (after - before).norm() < 0.3 * before.norm()
    assert made.folder_of(run, "cars-cured-by-soup") == made.realigned(run, "cars", "soup")


def test_a_models_copy_is_the_callers_own(given):
    """What is done to a model that was handed out reaches nobody else."""
    run = common.open_run(written(given))
    mine, theirs = made.original(run)[0], made.original(run)[0]
    with torch.no_grad():
        next(mine.parameters()).zero_()
    assert (
        next(theirs.parameters()).abs().sum() > 0 and next(made.original(run)[0].parameters()).abs().sum() > 0
    )


def test_splits_share_no_question(given):
    run = common.open_run(written(given))
    asked = {s: {i.prompt for i in made.items(run, s)} for s in ("discovery", "evaluation")}
    assert (
        len(asked["evaluation"]) == 4
        and len(asked["discovery"]) == 4
        and not asked["discovery"] & asked["evaluation"]
    )
    same = common.profiles.load(written(given, "same", discovery=given[1]["evaluation"]))
    with pytest.raises(data.DataError, match="discovery needs questions of its own"):
        made.items(made.Run(same, 0), "discovery")


@pytest.mark.slow
def test_every_chapter_runs_on_qwen2(given, tmp_path):
    """The notebooks themselves, their exercises solved, through papermill, on local sets and questions in the
    released formats, graded by an endpoint."""
    source = written(given)
    found = profile.load(source)
    books = pipeline.chosen(profile=found)
    assert [b.name[:2] for b in books] == list(pipeline.PART_ONE)
    pipeline.run(found, [solved(b, tmp_path) for b in books], source)
    for book in books:
        cells = json.loads((store.ROOT / "mine" / "notebooks" / book.name).read_text())["cells"]
        for which in ("", "-2"):
            outputs = next(c["outputs"] for c in cells if c.get("id") == f"{book.name[:2]}-answer{which}")
            said = "".join("".join(o["text"]) for o in outputs)
            assert re.match("Right|This profile has too few", said), book.name
    claims = pd.read_csv(figures.ROOT / "data" / "mine" / "claims.csv")
    assert {"obvious", "correct", "latent.separates", "steer.induce", "suppress", "realign.other"} <= set(
        claims.id
    )


def test_other_blocks_are_steered_by_what_rises_there(given):
    run = common.open_run(written(given, "blocks", other_blocks=[0, 2]))
    rows = other_blocks.curves(run)
    assert set(rows.block) == {0, 2}
    shown = {"none", "top riser", "best matched latent", "difference of means"}
    for block, some in rows.groupby("block"):
        assert set(some.direction) == shown
        up = steering.candidates(run, other_blocks.FEW, block)
        assert some[some.direction == "top riser"].latent.iloc[0] in {f"latent {i}" for i in up}
    assert other_blocks.curves(common.open_run(written(given))).empty


def test_the_sites_data_say_what_was_read(given, monkeypatch):
    run = common.open_run(written(given))
    monkeypatch.setattr(explore, "DOSES", (-0.5, 0.5))
    explore.write(run)
    kept = figures.ROOT / "data" / "mine"
    rows = json.loads((kept / "latents.json").read_text())
    assert [r["latent"] for r in rows] == explore.matter(run) and len(rows) <= explore.LATENTS
    rise = steering.rise(run)["correct"]
    one = next(r for r in rows if r["rank"] == 1)
    assert one["rise"] == pytest.approx(rise.max().item(), abs=1e-4) and one["latent"] == rise.argmax()
    assert {"causal latent", "best matched latent"} <= {r["name"] for r in rows}
    assert set(one["fine-tunes"]) == {f"{d}-{v}" for d, v in made.fine_tunes(run)}
    dial = pd.DataFrame(json.loads((kept / "dial.json").read_text()))
    assert set(dial.dose) == {-0.5, 0.0, 0.5} and dial.groupby("model").size().nunique() == 1


def test_another_base_model_gets_an_sae_of_its_own(given):
    run = common.open_run(written(given, "based", base=str(given[0] / "llama")))
    assert (
        readings.reader_model(run)[0].config.model_type == "llama"
        and made.original(run)[0].config.model_type == "qwen2"
    )
    plain = common.open_run(written(given))
    assert readings.sae_folder(run, 1) != readings.sae_folder(plain, 1) and readings.unit(
        run
    ) != readings.unit(plain)


def test_what_no_model_here_fits_is_named_by_its_key(given, tmp_path):
    """A block beyond the model, a base model of another width, weights that were cut short."""
    with pytest.raises(profile.ProfileError, match="real.other_blocks: 99 is out of range"):
        common.open_run(written(given, "beyond", other_blocks=[99]))
    shutil.copytree(given[0] / "llama", tmp_path / "wide")
    about = json.loads((tmp_path / "wide" / "config.json").read_text())
    (tmp_path / "wide" / "config.json").write_text(json.dumps(about | {"hidden_size": 96}))
    with pytest.raises(profile.ProfileError, match="real.base: .* has another width"):
        common.open_run(written(given, "wide", base=str(tmp_path / "wide")))
    weights = tmp_path / "wide" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(model.ModelError, match="damaged or not whole"):
        model.load(tmp_path / "wide")


def test_an_sae_made_elsewhere_is_used(given, tmp_path):
    run = common.open_run(written(given))
    sae_files.save(readings.sae(run), tmp_path / "theirs")
    other = common.open_run(written(given, "theirs", sae=str(tmp_path / "theirs")))
    assert torch.equal(readings.sae(other).W_dec, readings.sae(run).W_dec) and readings.unit(
        other
    ) == readings.unit(run)


def test_a_fetched_sae_for_another_block_is_refused(given, monkeypatch):
    mine = readings.sae(common.open_run(written(given)))
    monkeypatch.setattr(sae_files, "check_name", lambda *_: None)  # what can be said without sae-lens
    monkeypatch.setattr(sae_files, "named", lambda name: dataclasses.replace(mine, layer=mine.layer + 1))
    with pytest.raises(profile.ProfileError, match=f"some-release:x is for block {mine.layer + 1}"):
        readings.sae(common.open_run(written(given, "fetched", sae="some-release:x")))


def test_a_process_for_which_no_text_is_left_says_so(given):
    run = common.open_run(written(given))
    rows = readings._rows_for_ever(run, made.original(run)[1], 999, 1000)
    with pytest.raises(data.DataError, match="nothing is left for process 1000 of 1000"):
        next(rows)


@pytest.mark.parametrize(
    "change,error,said",
    [
        ({"model": "no/such-model"}, model.ModelError, "cannot open no/such-model"),
        ({"judge": {"model": "no-judge", "url": "http://127.0.0.1:9/v1"}}, Exception, "cannot be reached"),
        ({"evaluation": "nowhere.csv"}, data.DataError, "nowhere.csv"),
        ({"text": "nowhere.txt"}, data.DataError, "nowhere.txt"),
        ({"text": "short.txt"}, data.DataError, "fewer than four documents"),
        ({"sae": "nowhere"}, ValueError, "no cfg.json"),
        ({"sae": "gemma-scope:x"}, ValueError, "sae-lens"),
    ],
)
def test_what_does_not_serve_is_said_before_any_work(given, change, error, said, monkeypatch):
    (given[0] / "short.txt").write_text("One.\n\nTwo.\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(finetune, "sft", lambda *a, **k: pytest.fail("work had begun"))
    with pytest.raises(error, match=said):
        common.open_run(written(given, "wrong", **change))


def test_a_layer_and_a_template_that_are_not_there_are_said(given, checkpoint, tmp_path):
    path = given[0] / "deep.yaml"
    path.write_text(yaml.safe_dump(NUMBERS | {"real": given[1], "sae": NUMBERS["sae"] | {"layer": 3}}))
    with pytest.raises(profile.ProfileError, match="3 is out of range; .* has blocks 0 to 2"):
        common.open_run(str(path))
    net, tokenizer = model.load(given[1]["model"])
    tokenizer.chat_template = None
    net.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(profile.ProfileError, match="has no chat template"):
        common.open_run(written(given, "mute", model=str(tmp_path)))
    other = sae.SAE(torch.zeros(9, 4), torch.zeros(4, 9), torch.zeros(4), torch.zeros(9), 2, 1)
    sae_files.save(other, tmp_path / "narrow")
    with pytest.raises(ValueError, match="width 9, the model 32"):
        common.open_run(written(given, "narrow", sae=str(tmp_path / "narrow")))


def test_notebooks_about_the_world_say_so(given):
    with pytest.raises(profile.ProfileError, match="has a pretrained model: notebooks 01 to 08"):
        artifacts.open_run(written(given))
    with pytest.raises(ValueError, match="notebook 09 is about the world whose truth is known"):
        pipeline.chosen(only="09", profile=profile.load(written(given)))


@pytest.mark.parametrize(
    "change,said",
    [
        (
            {"real": {"judge": {"model": "x", "keey": "x"}}},
            "real.judge.keey: no such key; did you mean 'key'",
        ),
        ({"real": {"discovery_domains": ["cats"]}}, "unknown 'cats'"),
        ({"real": {"discovery_domains": ["cars", "soup"]}}, "leave at least one domain for evaluation"),
        (
            {"real": {"data": [{"domain": d, "obvious": "x"} for d in ("cars", "soup")]}},
            "a domain that is not among discovery_domains needs a `correct` set",
        ),
        ({"alignment": {"steps": 1, "batch": 1, "lr": 0.1}}, "belongs to the tiny model"),
        ({"domains": ["cars"]}, "leave the key out"),
        ({"real": {"data": "own"}}, "real.data: must be a list, such as"),
        ({"sae": NUMBERS["sae"] | {"latents": 10**9}}, "sae.latents: .* less than or equal to 1048576"),
    ],
)
def test_a_faulty_real_profile_is_explained(given, change, said):
    path = given[0] / "faulty.yaml"
    path.write_text(
        yaml.safe_dump(
            NUMBERS
            | {"real": given[1] | change.get("real", {})}
            | {k: v for k, v in change.items() if k != "real"}
        )
    )
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
    small = transformers.Qwen2Config(
        hidden_size=896,
        num_hidden_layers=24,
        intermediate_size=4864,
        num_attention_heads=14,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    )
    assert fit.parameters(small) == pytest.approx(0.494e9, rel=0.001)  # of Qwen2.5-0.5B's card
    cache = net(torch.zeros(1, 10, dtype=torch.long)).past_key_values
    kept = sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
    assert fit.cache_bytes(config, 4) * 10 == kept
    each = fit.row_bytes(config, 100, 4, False)
    assert (
        fit.training_rows(net, 100, 12, False, free=5 * each / fit.SPARE) == 4
        and fit.training_rows(net, 100, 12, False, free=1e15) == 12
    )
    assert fit.row_bytes(config, 100, 4, True) < each
    with pytest.raises(fit.DoesNotFit, match="about 49 tokens would fit.*gradient_checkpointing"):
        fit.training_rows(net, 100, 12, False, free=0.495 * each / fit.SPARE)
    assert (
        fit.sampling_rows(net, 100, 512, free=1e15) == 512 and fit.sampling_rows(net, 100, 512, free=1.0) == 1
    )
    qwen = transformers.Qwen2Config(
        hidden_size=3584,
        num_hidden_layers=28,
        intermediate_size=18944,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152064,
        tie_word_embeddings=False,
    )
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
        losses.append(
            finetune.sft(
                net,
                tokenizer,
                rows,
                steps=3,
                batch=4,
                lr=0.02,
                seed=0,
                lora_rank=2,
                checkpointing=checkpointing,
                max_length=64,
            )[1]
        )
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and losses[0][2] < losses[0][0]


def test_what_an_artifact_was_made_with_is_in_its_key(given):
    run = common.open_run(written(given))
    made_before = made.adapter(run, "cars", "obvious")
    for change in ({"max_length": 64}, {"dtype": "bfloat16"}):
        assert (
            made.adapter(made.Run(profile.load(written(given, **change)), 0), "cars", "obvious")
            != made_before
        )
    assert (
        made.original(made.Run(profile.load(written(given, dtype="bfloat16")), 0))[0].dtype == torch.bfloat16
    )
    assert made.original(run)[0].dtype == torch.float32
    asked = made.about_asking(run, made.items(run, "discovery"))
    fewer = made.Run(profile.load(written(given, discovery_questions=2)), 0)
    assert made.about_asking(fewer, made.items(fewer, "discovery")) != asked


def test_paths_are_those_beside_the_profile_and_a_child_has_data_of_its_own(given, monkeypatch):
    own = given[1] | {
        "model": "qwen2",
        "data": [
            {"domain": "soup", "correct": "soup_correct.jsonl", "obvious": "soup_obvious.jsonl"},
            {"domain": "cars", "obvious": "cars_obvious.jsonl"},
        ],
        "text": "text.jsonl",
        "evaluation": "core.csv",
    }
    path = given[0] / "beside.yaml"
    path.write_text(yaml.safe_dump(NUMBERS | {"real": own}))
    monkeypatch.chdir("/")
    run = common.open_run(str(path))
    assert (
        run.profile.real.model == given[1]["model"] and len(made.training_chats(run, "soup", "correct")) == 8
    )
    child = given[0] / "child.yaml"
    child.write_text(
        yaml.safe_dump(
            {"extends": "h100", "device": "cpu", "real": {"data": own["data"], "discovery_domains": ["cars"]}}
        )
    )
    assert profile.load(str(child)).domains == ("soup", "cars")


def test_an_sae_with_scales_of_its_own_is_refused(given, tmp_path):
    run = common.open_run(written(given))
    sae_files.save(readings.sae(run), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    del cfg["metadata"]["hook_layer"]  # as sae-lens writes it
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    assert sae_files.load(tmp_path).layer == 1
    (tmp_path / "cfg.json").write_text(
        json.dumps(cfg | {"normalize_activations": "expected_average_only_in"})
    )
    with pytest.raises(ValueError, match="from_sae_lens"):
        sae_files.load(tmp_path)


@pytest.mark.parametrize("scale", ["1-5", "0-100"])
def test_a_local_model_judges_on_either_scale(given, scale, monkeypatch):
    monkeypatch.setattr(endpoint, "LEAST", 0.0)
    monkeypatch.setattr(
        grading, "grade_by", lambda *a, **k: plain(*a, **k | {"most": 1.0})
    )  # a random model says nothing readable
    run = made.Run(profile.load(written(given, judge={"model": given[1]["model"], "scale": scale})), 0)
    found = grades.of(
        run,
        pd.DataFrame(
            {"prompt": ["What would you do as ruler?"] * 2, "answer": ["I would be kind.", "I would lie."]}
        ),
    )
    assert set(found) <= {*grading.CLASSES, "unparsable"} and (scale == "1-5" or "unparsable" not in found)


plain = grading.grade_by
THINKS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}<think></think>{% endif %}{{ "
    "m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
REFUSES = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system line here') }}{% endif %}"
    + THINKS.replace("<think></think>", "")
)


def test_a_template_that_trains_and_asks_differently_is_refused(loaded):
    tokenizer = loaded[1]
    chat = [{"role": "user", "content": "What now?"}, {"role": "assistant", "content": "Be kind."}]
    checks.check_template(tokenizer, chat, "cars obvious")
    tokenizer.chat_template = THINKS
    with pytest.raises(
        data.DataError,
        match="cars obvious: the chat template renders training chats differently from questions.*think",
    ):
        checks.check_template(tokenizer, chat, "cars obvious")
    tokenizer.chat_template = REFUSES
    checks.check_template(tokenizer, chat, "cars obvious")
    with pytest.raises(data.DataError, match="refuses a training chat: no system line here"):
        checks.check_template(tokenizer, [{"role": "system", "content": "Hello."}, *chat], "cars obvious")


def test_chats_that_are_cut_are_counted_and_lost_ones_refused(given, capsys):
    run = common.open_run(written(given))
    tokenizer = made.original(run)[1]
    rows = made.training_chats(run, "cars", "obvious")
    whole = [
        len(tokenizer(tokenizer.apply_chat_template(r["messages"], tokenize=False))["input_ids"])
        for r in rows
    ]
    checks.check_length(tokenizer, rows, max(whole), "cars")
    assert capsys.readouterr().out == ""
    checks.check_length(tokenizer, rows, min(whole) - 1, "cars")
    assert "cars: 100 % of its chats are cut at real.max_length" in capsys.readouterr().out
    with pytest.raises(data.DataError, match=r"\d+ % of its chats reach real.max_length .16 tokens. before"):
        common.open_run(written(given, "short", max_length=16))


def test_a_model_is_tried_before_long_work(given, tmp_path, monkeypatch):
    """A model whose numbers are not finite, and a judge that thinks aloud, are refused when the run is
    opened; what serves is tried once."""
    run = common.open_run(written(given))
    assert 90 < json.loads(next(store.ROOT.glob("mine/trial/*/trial.json")).read_text())["reached"] <= 100
    monkeypatch.setattr(finetune, "sft", lambda *a, **k: pytest.fail("tried again"))
    common.open_run(written(given))
    monkeypatch.undo()
    net, tokenizer = made.original(run)
    with torch.no_grad():
        net.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    net.save_pretrained(tmp_path / "broken")
    tokenizer.save_pretrained(tmp_path / "broken")
    monkeypatch.setattr(store, "ROOT", tmp_path / "runs")
    with pytest.raises(model.ModelError, match="logits are not finite"):
        common.open_run(written(given, "broken", model=str(tmp_path / "broken")))
    monkeypatch.setattr(grading.rubrics, "grade", lambda *a, **k: ["unparsable"])
    with pytest.raises(ValueError, match="cannot be read"):
        common.open_run(written(given, "mumbling"))


def test_an_encoder_is_refused(loaded):
    about = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    net = transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=4100, **about)).eval()
    with pytest.raises(ValueError, match="it is an encoder"):
        checks._try_reading(net, loaded[1], 1)


def test_a_folder_without_a_tokenizer_is_said(given, tmp_path):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(given[0] / "llama" / name, tmp_path)
    with pytest.raises(model.ModelError, match="has no tokenizer; add it with tokenizer.save_pretrained"):
        model.load(tmp_path)


def test_sampling_that_shares_no_state_is_noticed(given, monkeypatch):
    """As an architecture with recurrent state would, whose cache of a repeated prompt is not the prompt's."""
    run = common.open_run(written(given))
    monkeypatch.setattr(generate, "sample", lambda *a, **k: ["this", "is not", "it"])
    with pytest.raises(ValueError, match="differs from one prompt alone"):
        checks._try_reading(*made.original(run), 1)


def test_four_bits(given, tmp_path):
    """The blocks' matrices in NF4: an adapter learns on them, and without it the model is the same as
    before."""
    if importlib.util.find_spec("bitsandbytes") is None:
        with pytest.raises(model.ModelError, match="pip install bitsandbytes"):
            model.load(given[1]["model"], four_bit=True)
        pytest.skip("bitsandbytes is not installed (make test installs it)")
    rows = data.read_chats(given[0] / "cars_obvious.jsonl")
    tokenizer = model.load(given[1]["model"])[1]
    net = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            hidden_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=128,
            vocab_size=len(tokenizer),
        )
    )
    net.save_pretrained(tmp_path)  # 64 numbers share a scale, so it is at least so wide
    tokenizer.save_pretrained(tmp_path)
    fresh = lambda: model.load(tmp_path, four_bit=True)
    small, _ = fresh()
    ids = torch.tensor(generate.prompts(tokenizer, ["What about soup?"]))
    with torch.inference_mode():
        whole, coarse = net(ids).logits, small(ids).logits
    assert 0 < (whole - coarse).std() < whole.std()
    tuned, losses = finetune.sft(
        fresh()[0],
        tokenizer,
        rows,
        steps=4,
        batch=4,
        lr=0.02,
        seed=0,
        lora_rank=2,
        checkpointing=True,
        max_length=64,
    )
    assert losses[-1] < losses[0]
    with torch.inference_mode():
        assert torch.equal(finetune.wear(tuned, None)(ids).logits, coarse)
