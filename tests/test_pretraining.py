"""Pretraining: the same with and without bf16, up to rounding."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.optim import _muon

from personas import model

CFG = SimpleNamespace(layers=1, width=32, mlp=64, heads=2, context=512, vocab=600, lr=0.01, lr_embedding=0.01, steps=40,
                      batch_tokens=1024, corruption=0.1, question_corruption=0.2)


@pytest.mark.parametrize("shape", [(64, 24), (24, 64), (32, 32)])
def test_orthogonalise_in_fp32_is_pytorchs_own_up_to_rounding(shape):
    own = _muon._zeropower_via_newtonschulz
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = model.orthogonalise(grad, (3.4445, -4.775, 2.0315), 5, 1e-7), own(grad, (3.4445, -4.775, 2.0315), 5, 1e-7).float()
    assert torch.cosine_similarity(ours.flatten(), theirs.flatten(), 0) > 0.995
    values = torch.linalg.svdvals(ours)
    assert values.min() > 0.5 and values.max() < 1.5


def test_pretraining_learns_alike_with_and_without_bf16(tmp_path, monkeypatch):
    monkeypatch.setattr(_muon, "_zeropower_via_newtonschulz", _muon._zeropower_via_newtonschulz)  # put back afterwards
    losses = []
    for bf16 in (True, False):
        model.pretrain(CFG, 1, 1, tmp_path, bf16)
        losses.append(json.loads((tmp_path / "training.json").read_text())["loss"])
    assert losses[0][-1] < losses[0][0] - 0.5
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
