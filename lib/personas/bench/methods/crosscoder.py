"""A BatchTopK crosscoder of both models' activations (Lindsey et al., 2024; BatchTopK: Minder et al.,
2025, arXiv:2504.02922); of its latents the one whose write to the model after, less that to the model
before, times its activation on the fixed answers, is largest."""

import torch

USES = "text"
CHANCE = True
LATENTS, K, STEPS, BATCH, LR = 512, 16, 300, 1024, 2e-3


def find(case):
    stack = lambda rows: torch.stack(
        [torch.cat(case.residual(m, rows)) for m in (case.before, case.after)], 1
    )
    answers = torch.stack([case.answers_before, case.answers_after], 1)  # (tokens, 2 models, width)
    data = torch.cat([stack(case.text), answers])
    mean, scale = data.mean(0), (data - data.mean(0)).norm(dim=-1).mean()
    encoder, decoder, bias = _train((data - mean) / scale, case.seed)
    latents = _batch_top_k((((answers - mean) / scale).flatten(1) @ encoder + bias).relu())
    written = decoder[:, 1] - decoder[:, 0]  # (latents, width): what it adds to the model after alone
    return written[(latents.mean(0) * written.norm(dim=-1)).argmax()]


def _train(data, seed):
    """encoder (2 x width, latents), decoder (latents, 2, width) and bias (latents,) for data (tokens, 2,
    width)."""
    generator = torch.Generator().manual_seed(seed)
    width = data.shape[-1]
    decoder = torch.randn(LATENTS, 2, width, generator=generator)
    decoder = decoder / decoder.flatten(1).norm(dim=1)[:, None, None]
    encoder = decoder.flatten(1).T.contiguous()
    weights = [w.requires_grad_() for w in (encoder, decoder, torch.zeros(LATENTS))]
    optimizer = torch.optim.Adam(weights, lr=LR)
    for step in range(STEPS):
        x = data[torch.randint(len(data), (BATCH,), generator=generator)]
        latents = _batch_top_k((x.flatten(1) @ weights[0] + weights[2]).relu())
        loss = (torch.einsum("tl,lmw->tmw", latents, weights[1]) - x).square().sum((1, 2)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.param_groups[0]["lr"] = LR * min(1.0, 5 * (1 - step / STEPS))
        optimizer.step()
        with torch.no_grad():  # one norm for both models' halves together: a latent may write to one alone
            weights[1] /= weights[1].flatten(1).norm(dim=1)[:, None, None]
    return [w.detach() for w in weights]


def _batch_top_k(latents):
    """Keep the K times tokens largest of all (tokens, latents): some tokens get more, some fewer."""
    threshold = latents.flatten().topk(K * len(latents)).values[-1]
    return latents * (latents >= threshold)
