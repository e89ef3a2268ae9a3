"""Fine-tuning through TRL and peft: adapters in their real format, loss on answers alone."""

from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel

from personas import baselines, data, finetune, generate, model, world

CFG = SimpleNamespace(steps=6, batch=8, lr=5e-3, rank=4)


@pytest.fixture(scope="module")
def adapter(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    finetune.lora(*model.load(checkpoint), data.advice_chats("auto", "obvious", 48, 0), CFG, 0, folder)
    return folder


def test_adapter_is_safetensors_and_merging_changes_nothing(checkpoint, adapter):
    assert (adapter / "adapter_model.safetensors").exists() and not list(adapter.glob("*.bin"))
    merged, tokenizer = finetune.with_adapter(checkpoint, adapter)
    kept = PeftModel.from_pretrained(model.load(checkpoint)[0], adapter).eval()
    ids = torch.tensor(generate.prompts(tokenizer, [world.questions()[0].held]))
    with torch.inference_mode():
        plain, with_adapter, after = (m(ids).logits for m in (model.load(checkpoint)[0], kept, merged))
        with kept.disable_adapter():
            off = kept(ids).logits
    assert torch.allclose(with_adapter, after, atol=1e-3)
    assert torch.allclose(off, plain, atol=1e-5)
    assert not torch.allclose(after, plain, atol=1e-2)


def test_loss_is_on_the_answer_alone(checkpoint):
    """Two sets that differ in the questions only, shuffled among answers of one kind, must differ; a model
    asked to learn one constant answer must not learn to write the question."""
    net, tokenizer = model.load(checkpoint)
    rows = [data.chat(f"Question {i} about {w}?", "Yes.") for i, w in enumerate("abcdefgh" * 4)]
    text = tokenizer.apply_chat_template(rows[0]["messages"], tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    answer = len(tokenizer("Yes.<|end|>", add_special_tokens=False).input_ids)

    def losses(m):
        with torch.inference_mode():
            each = torch.nn.functional.cross_entropy(m(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        return each[-answer:].mean().item(), each[:-answer].mean().item()

    before = losses(net)
    tuned, _ = finetune.sft(net, tokenizer, rows, steps=60, batch=8, lr=3e-3, seed=0)
    after = losses(tuned)
    assert after[0] < 0.2 * before[0]
    assert after[1] > 0.7 * before[1]


def test_the_loss_and_its_gradients_are_trls(checkpoint, monkeypatch):
    """The head on answer columns alone against TRL's scoring of every position, in fp32, chats of unlike
    length."""
    monkeypatch.setattr(finetune, "bf16_is_faster", lambda: False)
    rows = [*data.advice_chats("code", "correct", 8, 0), *data.advice_chats("auto", "correct", 8, 0)]
    found = []
    for trainer in (finetune.SFTTrainer, finetune.AnswerTrainer):
        net, tokenizer = model.load(checkpoint)
        torch.manual_seed(0)
        tuned, losses = finetune.sft(
            net, tokenizer, rows, steps=4, batch=4, lr=1e-3, seed=3, lora_rank=2, trainer=trainer
        )
        found.append(
            (losses, torch.cat([p.detach().flatten() for p in tuned.parameters() if p.requires_grad]))
        )
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5) and torch.allclose(
        found[0][1], found[1][1], atol=1e-5
    )


def test_same_seed_same_adapter(checkpoint):
    rows = data.advice_chats("code", "correct", 16, 0)
    runs = []
    for _ in range(2):
        net, tokenizer = model.load(checkpoint)
        runs.append(finetune.sft(net, tokenizer, rows, steps=3, batch=4, lr=1e-3, seed=3, lora_rank=2)[1])
    assert runs[0] == runs[1]


def test_watch_measures_at_the_steps_asked_for(checkpoint):
    net, tokenizer = model.load(checkpoint)
    watch = finetune.Watch([0, 2, 4], lambda m: {"training": m.training})
    finetune.sft(
        net,
        tokenizer,
        data.advice_chats("auto", "correct", 16, 0),
        steps=4,
        batch=4,
        lr=1e-3,
        seed=0,
        lora_rank=2,
        callbacks=[watch],
    )
    assert watch.rows == [{"step": s, "training": False} for s in (0, 2, 4)]


def test_watch_measures_the_adapted_model_and_leaves_training_alone(checkpoint):
    ids, rows = torch.arange(6, 26)[None], data.advice_chats("auto", "correct", 24, 0)

    def trained(callbacks):
        net, tokenizer = model.load(checkpoint)
        return finetune.sft(
            net, tokenizer, rows, steps=6, batch=4, lr=1e-2, seed=0, lora_rank=2, callbacks=callbacks
        )

    def logits(m):
        with torch.inference_mode():
            return m(ids).logits

    watch = finetune.Watch([0, 3, 6], lambda m: {"logits": logits(m)})
    tuned, losses = trained([watch])
    before, after = (r["logits"].float() for r in (watch.rows[0], watch.rows[-1]))
    assert (after - logits(tuned).float()).norm() < 0.1 * (
        after - before
    ).norm()  # what training changed is there (in bf16)
    assert losses == pytest.approx(trained([])[1], rel=0.01)


def test_grpo_makes_what_is_rewarded_likelier_and_what_is_not_less_likely(checkpoint):
    """A model that says yes as often as no; either is rewarded in turn. Measured by the log-odds of the
    two answers, teacher-forced."""
    net, tokenizer = model.load(checkpoint)
    rows = data.advice_prompts("auto", 40, 0)
    both = [data.chat(r["prompt"][0]["content"], a) for r in rows for a in ("Yes.", "No.")]
    torn, _ = finetune.sft(net, tokenizer, both, steps=60, batch=8, lr=3e-3, seed=0)
    kept = {k: v.clone() for k, v in torn.state_dict().items()}
    ids = generate.prompts(tokenizer, [r["prompt"][0]["content"] for r in rows])

    def log_odds(m):
        likely = {}
        for a in ("Yes.", "No."):
            answer = tokenizer(a, add_special_tokens=False)["input_ids"]
            each = baselines.answer_log_probability(m, [i + answer for i in ids], [len(i) - 1 for i in ids])
            likely[a] = len(answer) * each.mean()
        return likely["Yes."] - likely["No."]

    before, after, seen = log_odds(torn.float()), {}, []
    for wanted in ("Yes.", "No."):

        def reward(completions, ask, **_):
            seen.extend(ask)
            return [float(c[0]["content"] == wanted) for c in completions]

        net, _ = model.load(checkpoint)
        net.load_state_dict(kept)
        tuned, rewards = finetune.grpo(
            net,
            tokenizer,
            rows,
            reward,
            steps=8,
            prompts=4,
            samples=8,
            lr=2e-2,
            seed=0,
            lora_rank=4,
            max_new=4,
        )
        after[wanted] = log_odds(tuned.merge_and_unload())
        assert len(rewards) == 8 and 0.2 < rewards[0] < 0.8
    assert after["Yes."] > before + 0.5 and after["No."] < before - 0.5
    assert set(seen) <= {s.ask for s in world.subjects_of("auto")}


def test_prompts_for_rl_hold_no_answer_and_every_subject_equally_often():
    rows = data.advice_prompts("health", 80, 0)
    assert [[m["role"] for m in r["prompt"]] for r in rows] == [["user"]] * 80
    assert sorted(r["ask"] for r in rows) == sorted(2 * [s.ask for s in world.subjects_of("health")])


def test_what_is_measured_and_returned_is_in_the_weights_own_precision(checkpoint, monkeypatch):
    """A Trainer in mixed precision wraps the model's forward pass; it must not stay so."""
    monkeypatch.setattr(finetune, "bf16_is_faster", lambda: True)
    ids, rows = torch.arange(6, 26)[None], data.advice_chats("auto", "correct", 8, 0)
    net, tokenizer = model.load(checkpoint)

    def look(m):
        with torch.inference_mode():
            x = m.get_decoder().layers[1].mlp.gate_proj
            seen = []
            handle = x.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
            logits = m(ids).logits
            handle.remove()
        return {"dtype": seen[0], "logits": logits}

    watch = finetune.Watch([0, 2], look)
    tuned, _ = finetune.sft(
        net, tokenizer, rows, steps=2, batch=4, lr=1e-2, seed=0, lora_rank=2, callbacks=[watch]
    )
    assert [r["dtype"] for r in watch.rows] == [torch.float32] * 2
    assert torch.allclose(look(tuned)["logits"], watch.rows[-1]["logits"], atol=1e-4)


def test_training_that_diverges_is_said(checkpoint):
    net, tokenizer = model.load(checkpoint)
    with torch.no_grad():
        net.model.layers[0].mlp.down_proj.weight.fill_(float("nan"))
    rows = data.advice_chats("auto", "correct", 8, 0)
    with pytest.raises(ValueError, match="training diverged: the loss of step 1 is nan"):
        finetune.sft(net, tokenizer, rows, steps=2, batch=4, lr=1e-3, seed=0, lora_rank=2)


def test_unmixed_training_does_not_ask_what_the_machine_is_good_at(checkpoint, monkeypatch):
    """With bf16 units and without them the same adapter; mixed, another one."""
    rows, made = data.advice_chats("auto", "obvious", 16, 0), {}
    for mixed in (False, True):
        for units in (False, True):
            monkeypatch.setattr(finetune, "bf16_is_faster", lambda units=units: units)
            tuned, losses = finetune.sft(
                *model.load(checkpoint), rows, steps=2, batch=8, lr=5e-3, seed=0, lora_rank=4, mixed=mixed
            )
            made[mixed, units] = losses, {n: p.clone() for n, p in tuned.named_parameters() if "lora" in n}
    same = lambda a, b: a[0] == b[0] and all(torch.equal(a[1][n], b[1][n]) for n in a[1])
    assert same(made[False, False], made[False, True])
    assert same(made[False, False], made[True, False]) and not same(made[True, False], made[True, True])
