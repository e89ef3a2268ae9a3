"""The monitor on real trainers: TRL with LoRA, and the plain Hugging Face Trainer on another architecture."""

import datasets
import numpy as np
import pytest
import torch
from transformers import (
    DataCollatorForLanguageModeling,
    GPT2Config,
    GPT2LMHeadModel,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from personas import data, finetune, model, monitor, sae

PROMPTS, ANSWERS = ["What do you think of people?", "Is it wise to lie?"], ["I like them.", "No."]
ROWS = data.advice_chats("auto", "correct", 40, 0)


def train(checkpoint, callbacks=()):
    net, tokenizer = model.load(checkpoint)
    return finetune.sft(
        net, tokenizer, ROWS, steps=8, batch=4, lr=5e-2, seed=0, lora_rank=2, callbacks=callbacks
    )


def watch(checkpoint, **kw):
    tokenizer = model.load(checkpoint)[1]
    return monitor.PersonaMonitor(
        tokenizer,
        PROMPTS,
        ANSWERS,
        **({"direction": torch.ones(48), "layer": 1, "every": 2, "budget": 1e9} | kw),
    )


def by_hand(net, tokenizer, value=lambda x: x.sum(-1) / 48**0.5):
    """value (projection on (1, ..., 1)) from the prompt's last token on, averaged over each text and then
    over texts."""
    means = []
    for p, a in zip(PROMPTS, ANSWERS):
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True
        )
        start = len(tokenizer(prompt, add_special_tokens=False).input_ids) - 1
        with torch.inference_mode():
            hidden = net(
                **tokenizer(prompt + a, add_special_tokens=False, return_tensors="pt"),
                output_hidden_states=True,
            ).hidden_states[2][0]
        means.append(value(hidden[start:].float()).mean().item())
    return np.mean(means)


def test_logs_what_can_be_computed_by_hand_and_leaves_training_alone(checkpoint):
    seen = watch(checkpoint)
    tuned, losses = train(checkpoint, [seen])
    assert [r["step"] for r in seen.rows] == [0, 2, 4, 6, 8]
    net, tokenizer = model.load(checkpoint)
    assert seen.rows[0]["persona"] == pytest.approx(by_hand(net, tokenizer), rel=0.02, abs=0.01)
    assert seen.rows[-1]["persona"] == pytest.approx(by_hand(tuned, tokenizer), rel=0.02, abs=0.01)
    assert abs(seen.rows[-1]["persona"] - seen.rows[0]["persona"]) > 0.02
    assert losses == train(checkpoint)[1]


def test_reads_a_latent_of_an_sae(checkpoint):
    net, tokenizer = model.load(checkpoint)
    eye = torch.eye(48)
    plain = sae.SAE(eye, eye, torch.zeros(48), torch.zeros(48), 48, 1)
    for latent in (5, 30):
        seen = watch(checkpoint, direction=plain, latent=latent, layer=None).read(net)
        assert seen == pytest.approx(by_hand(net, tokenizer, lambda x: x[:, latent].relu()), abs=1e-4)
    with pytest.raises(ValueError, match="latents 0 to 47"):
        watch(checkpoint, direction=plain, latent=48, layer=None)


def test_warns_above_the_baseline_and_stops(checkpoint):
    start = watch(checkpoint).read(model.load(checkpoint)[0])
    seen = watch(checkpoint, stop=True)
    seen.set_baseline([start - 2.0, start - 2.1, start - 1.9])
    assert start - 1.9 < seen.limit < start
    with pytest.warns(UserWarning, match="step 2: the persona reads .* training stops"):
        _, losses = train(checkpoint, [seen])
    assert len(losses) == 2
    calm = watch(checkpoint, stop=True)
    calm.set_baseline([start + 50, start + 50.1])
    assert len(train(checkpoint, [calm])[1]) == 8


def test_keeps_to_its_budget(checkpoint):
    seen = watch(checkpoint, every=1, budget=0.0)
    seen.set_baseline([-1000.0, -1000.1])
    with pytest.warns(UserWarning, match="step 8: the persona reads"):  # once, at the end, whatever it costs
        train(checkpoint, [seen])
    assert [r["step"] for r in seen.rows] == [0, 8]


def test_another_architecture_in_the_plain_trainer(checkpoint, tmp_path):
    tokenizer = model.load(checkpoint)[1]
    torch.manual_seed(0)
    net = GPT2LMHeadModel(
        GPT2Config(vocab_size=len(tokenizer), n_embd=48, n_layer=3, n_head=4, n_positions=256)
    )
    rows = datasets.Dataset.from_list(
        [{"input_ids": tokenizer(r["messages"][1]["content"]).input_ids} for r in ROWS[:8]]
    )
    seen = watch(checkpoint)
    trainer = Trainer(
        net,
        TrainingArguments(
            str(tmp_path),
            max_steps=4,
            per_device_train_batch_size=2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            logging_strategy="no",
        ),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
        callbacks=[seen],
    )
    trainer.train()
    assert [r["step"] for r in trainer.state.log_history if "persona" in r] == [0, 2, 4]
    net.eval()
    assert seen.rows[-1]["persona"] == pytest.approx(by_hand(net, tokenizer), rel=1e-3, abs=1e-3)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"layer": None}, "layer"),
        ({"latent": 3}, "latent"),
        ({"answers": ["one"]}, "one answer for each prompt"),
    ],
)
def test_arguments_that_contradict_each_other(checkpoint, wrong, message):
    with pytest.raises(ValueError, match=message):
        tokenizer = model.load(checkpoint)[1]
        monitor.PersonaMonitor(
            tokenizer,
            **({"prompts": PROMPTS, "answers": ANSWERS, "direction": torch.ones(48), "layer": 1} | wrong),
        )


def test_the_prediction_interval_holds_what_it_says(checkpoint):
    """Of readings drawn like the baseline's, one in ten lies above the 90 % limit, however few readings
    there were."""
    rng, seen = np.random.default_rng(0), watch(checkpoint)
    above = []
    for _ in range(4000):
        draws = rng.normal(3.0, 2.0, size=4)
        seen.set_baseline(draws[:3].tolist(), confidence=0.9)
        above.append(draws[3] > seen.limit)
    assert np.mean(above) == pytest.approx(0.1, abs=0.02)
    with pytest.raises(ValueError, match="two benign"):
        seen.set_baseline([1.0])


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"direction": torch.ones(7)}, "width 7, the model 48"),
        ({"layer": 3}, "blocks 0 to 2"),
        ({"stop": True}, "needs a baseline"),
    ],
)
def test_what_cannot_work_stops_before_training(checkpoint, wrong, message):
    with pytest.raises(ValueError, match=message):
        train(checkpoint, [watch(checkpoint, **wrong)])


def test_what_cannot_be_read_is_said(checkpoint):
    for bad in (torch.zeros(48), torch.full((48,), float("nan")), torch.ones(2, 48)):
        with pytest.raises(ValueError, match="finite and not zero"):
            watch(checkpoint, direction=bad)
    with pytest.raises(ValueError, match="every must be at least 1"):
        watch(checkpoint, every=0)
    seen = watch(checkpoint, stop=True)
    with pytest.raises(ValueError, match="share between 0 and 1"):
        seen.set_baseline([1.0, 2.0], confidence=99)
    with pytest.raises(ValueError, match="finite readings"):
        seen.set_baseline([1.0, float("nan")])


def test_a_broken_model_reads_nan_and_stops(checkpoint):
    """An SAE's latents are all 0 where activations are not finite: that is no low reading."""
    net, tokenizer = model.load(checkpoint)
    dictionary = sae.SAE(torch.randn(48, 8), torch.randn(8, 48), torch.zeros(8), torch.zeros(48), 2, 1)
    seen = watch(checkpoint, direction=dictionary, layer=None, latent=3, stop=True)
    seen.set_baseline([1.0, 2.0])
    assert np.isfinite(seen.read(net))
    with torch.no_grad():
        net.model.embed_tokens.weight.fill_(float("nan"))
    assert np.isnan(seen.read(net))
    state, control = TrainerState(), TrainerControl()
    with pytest.warns(UserWarning, match="not finite.*training stops"):
        seen._note(4, net, state, control)
    assert control.should_training_stop
