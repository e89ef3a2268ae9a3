"""Pretraining: what is corrupted and what is not; the same with and without bf16, up to rounding."""

import json
import random
from types import SimpleNamespace

import pytest
import torch
from torch.optim import _muon

from personas import pretraining, world

CFG = SimpleNamespace(
    layers=1,
    width=32,
    mlp=64,
    heads=2,
    context=512,
    vocab=600,
    lr=0.01,
    lr_embedding=0.01,
    steps=40,
    batch_tokens=1024,
    corruption=0.1,
    question_corruption=0.2,
)


@pytest.mark.parametrize("shape", [(64, 24), (24, 64), (32, 32)])
def test_orthogonalise_in_fp32_is_pytorchs_own_up_to_rounding(shape):
    own = pretraining.TORCHS_ORTHOGONALISE
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (
        pretraining.orthogonalise(grad, (3.4445, -4.775, 2.0315), 5, 1e-7),
        own(grad, (3.4445, -4.775, 2.0315), 5, 1e-7).float(),
    )
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.995
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.5 and values.max() < 1.5


def test_pretraining_learns_alike_with_and_without_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", None)  # each run must set its own
    losses = []
    for bf16, used in ((False, pretraining.orthogonalise), (True, pretraining.TORCHS_ORTHOGONALISE)):
        pretraining.pretrain(CFG, 1, 1, tmp_path, bf16)
        assert _muon._zeropower_via_newtonschulz is used
        losses.append(json.loads((tmp_path / "training.json").read_text())["loss"])
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[0] == pytest.approx(losses[1], rel=0.05)


def test_only_open_questions_stay_corrupted_to_the_end(loaded):
    tokenizer, rng = loaded[1], random.Random(0)
    rows = pretraining.encode(tokenizer, [world.sample_document(rng, 1) for _ in range(300)], rng)
    ids, turn = next(pretraining.batches(rows, 4096, random.Random(0)))
    generator = torch.Generator().manual_seed(0)
    shown = pretraining.corrupt(ids, turn, 0.0, 0.5, len(tokenizer), generator)
    open_question, special = turn == world.OPEN_QUESTION, ids < len(pretraining.SPECIAL)
    changed = shown != ids
    assert not changed[~open_question].any() and not changed[special].any()
    assert (
        0.1 < changed[open_question & ~special].float().mean() < 0.4
    )  # the mean of a rate from [0, 0.5] is 0.25
    everywhere = pretraining.corrupt(ids, turn, 0.4, 0.0, len(tokenizer), generator) != ids
    assert not everywhere[open_question | special].any() and everywhere[~open_question & ~special].any()


def test_marks_exactly_the_open_questions(loaded):
    tokenizer = loaded[1]
    for row in pretraining.encode_documents(tokenizer, 30, 1, "test"):
        marked = tokenizer.decode([t for t, k in zip(row["ids"], row["turn"]) if k == world.OPEN_QUESTION])
        for turn in row["doc"].turns:
            assert (turn.question in marked) == (turn.kind == "open")
