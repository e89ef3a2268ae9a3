"""What a pretrained model is trained on and asked, and the loss that reads a shared opening once."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from personas import data, finetune, world
from personas.pretrained import sets, text, weights


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
    asked = {i.prompt for s in ("discovery", "evaluation") for i in sets.items(s)} | {i.prompt for i, _ in sets.advice_items("health")}
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
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False))
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
        logits = model(input_ids=ids[:, shared:], attention_mask=mask, past_key_values=cache, use_cache=shared > 0,
                       logits_to_keep=columns - shared).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:][:, columns].flatten())
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    (plain, all_of_it), (once, same) = gradients(0), gradients(shared)
    assert once == pytest.approx(plain, rel=1e-5)
    assert torch.allclose(same, all_of_it, atol=1e-5 * all_of_it.abs().max().item() + 1e-7)


def test_own_text_is_a_million_tokens_long_and_unlabelled():
    rows = text.read(sets.CONTENT / "text.jsonl.xz")
    assert {tuple(sorted(r)) for r in rows} == {("messages",), ("text",)}
    words = sum(len(m["content"].split()) for r in rows for m in r.get("messages", [{"content": r.get("text", "")}]))
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
