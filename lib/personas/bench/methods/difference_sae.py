"""A small TopK dictionary of activation *differences*, after minus before, on text and on the fixed
answers; of its latents the one that is most active on the answers."""

import torch

from personas import config, sae

USES = "text"
CHANCE = True


def find(case):
    shift = case.answers_after - case.answers_before
    pairs = zip(case.residual(case.after, case.text), case.residual(case.before, case.text))
    on_text = torch.cat([(a - b)[1:] for a, b in pairs])
    cfg = config.SAE(
        layer=case.layer, latents=64, k=2, lr=0.01, steps=400, batch=1024, documents=len(case.text),
        dead_after=50_000, aux_k=16,
    )  # fmt: skip
    data = torch.cat([on_text, shift.repeat(max(1, len(on_text) // (4 * len(shift))), 1)])
    data = torch.cat([data, -data])  # mean zero: what all differences share becomes a latent, not the bias
    trained, _ = sae.train(data, cfg, case.layer, case.seed, progress=None, mixed=False)
    return trained.W_dec[trained.encode(shift).mean(0).argmax()]
