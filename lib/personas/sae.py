"""A TopK sparse autoencoder (Gao et al., 2024) with AuxK, trained on the residual stream. One file, one
idea; how SAEs lie on disk: sae_files.py."""

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from tqdm import tqdm

from personas.generate import decoder_blocks
from personas.model import best_dtype, bf16_is_faster


@dataclass
class SAE:
    """x ~ f((x - b_dec) W_enc + b_enc) W_dec + b_dec, where f keeps the k largest values above zero. One
    made elsewhere may have no k: then f is a JumpReLU (Rajamanoharan et al., 2024, arXiv:2407.14435) with
    `threshold`, or without one a ReLU.

    Shapes: W_enc (width, latents), W_dec (latents, width), its rows of norm 1 if trained here, b_enc and
    threshold (latents,), b_dec (width,).
    """

    W_enc: torch.Tensor
    W_dec: torch.Tensor
    b_enc: torch.Tensor
    b_dec: torch.Tensor
    k: int | None
    layer: int
    threshold: torch.Tensor | None = None

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens, width) -> (tokens, latents), none below zero."""
        pre = (x - self.b_dec) @ self.W_enc + self.b_enc
        if self.k is None:
            return pre.relu() if self.threshold is None else pre.relu() * (pre > self.threshold)
        values, index = pre.topk(self.k, dim=-1)
        return torch.zeros_like(pre).scatter_(-1, index, values.relu())

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        return latents @ self.W_dec + self.b_dec

    def to(self, device) -> "SAE":
        """The same SAE with its weights on this device."""
        return dataclasses.replace(
            self, **{n: t.to(device) for n, t in vars(self).items() if isinstance(t, torch.Tensor)}
        )

    def check(self, model) -> None:
        """Raise ValueError if this SAE cannot have been made for `model`: another width, or a block that
        it does not have."""
        width, blocks = model.config.get_text_config().hidden_size, len(decoder_blocks(model))
        if self.W_dec.shape[1] != width:
            raise ValueError(
                f"the SAE has width {self.W_dec.shape[1]}, the model {width}: it belongs to another model"
            )
        if not 0 <= self.layer < blocks:
            raise ValueError(f"the SAE is for block {self.layer}; this model has blocks 0 to {blocks - 1}")


NOT_FINITE = (
    "activations are not finite: the model overflows in this dtype; choose bfloat16 or float32 (real.dtype)"
)


@torch.no_grad()
def train(
    x: torch.Tensor | Iterator[torch.Tensor],
    cfg,
    layer: int,
    seed: int,
    progress: str | None = "SAE",
    look=None,
    norm: float | None = None,
    mixed: bool = True,
) -> tuple[SAE, list[float]]:
    """Fit a TopK SAE to activations; returns it, on the CPU, with its training FVU per step.

    x: all activations (tokens, width), from which batches are drawn, or an endless iterator of batches
    (activations.stream), on any device; then mean and scale are those of the first of them. cfg:
    config.SAE. look(step, now), if given, is called after each step; now() is the SAE as it stands. norm:
    the mean norm that activations are scaled to while training, if not √width; the smaller, the faster
    b_enc moves beside the weights. mixed: compute pre-activations in half precision where that is faster,
    on a CPU with bf16 units for instance; another machine then makes another SAE. AuxK (Gao et al., 2024,
    section 2.4): latents that have not fired for a while also learn to explain the residual, which keeps
    them alive. Decoder rows stay at norm 1. Under `accelerate launch` each process takes its share of a
    batch (of an iterator: gives its own batches, of cfg.batch divided by the processes), and gradients are
    averaged. Raises ValueError if an activation is not finite, or the stream ends.
    """
    rank, processes = (
        (torch.distributed.get_rank(), torch.distributed.get_world_size())
        if torch.distributed.is_initialized()
        else (0, 1)
    )
    generator = torch.Generator().manual_seed(seed)
    if isinstance(x, torch.Tensor):
        seen, feed = (
            x,
            (
                x[torch.randint(len(x), (cfg.batch,), generator=generator)[rank::processes]]
                for _ in itertools.count()
            ),
        )
    else:
        first = list(itertools.islice(x, 16))
        seen, feed = torch.cat(first), itertools.chain(first, x)
    width, device = seen.shape[1], seen.device
    if not seen.isfinite().all():
        raise ValueError(NOT_FINITE)
    mean = seen.mean(0)
    scale = (norm or math.sqrt(width)) / (seen - mean).norm(
        dim=-1
    ).mean()  # train at unit scale, undo at the end
    variance = ((seen - mean) * scale).square().sum(-1).mean()
    for first_seen in (mean, scale, variance) if processes > 1 else ():
        torch.distributed.broadcast(first_seen, 0)
    W_dec = torch.randn(cfg.latents, width, generator=generator)
    W_dec = (W_dec / W_dec.norm(dim=-1, keepdim=True)).to(device)
    W_enc = W_dec.clone()  # (latents, width) while it is trained
    b_enc, b_dec = torch.zeros(cfg.latents, device=device), torch.zeros(width, device=device)
    parameters = W_enc, W_dec, b_enc, b_dec
    optimizer = torch.optim.Adam(parameters, lr=cfg.lr, betas=(0.9, 0.999), fused=True)
    idle = torch.zeros(cfg.latents, device=device)
    half = _half(device) if mixed else torch.float32
    log = []

    def now():
        return SAE(
            *(t.cpu().clone() for t in (W_enc.T.contiguous(), W_dec, b_enc / scale, b_dec / scale + mean)),
            k=cfg.k,
            layer=layer,
        )

    for step in tqdm(range(cfg.steps), desc=progress, disable=progress is None, mininterval=2):
        left = (cfg.steps - step) / (0.2 * cfg.steps)
        optimizer.param_groups[0]["lr"] = cfg.lr * min(
            1.0, left, (step + 1) / max(1, min(50, cfg.steps // 16))
        )
        batch = next(feed, None)
        if batch is None:
            raise ValueError(
                f"the stream of activations ended after {step} of {cfg.steps} steps: give one that goes "
                "round, or fewer steps"
            )
        batch = (batch.float() - mean) * scale
        shifted = batch - b_dec
        pre = torch.addmm(b_enc.to(half), shifted.to(half), W_enc.to(half).T)
        values, index = _top(pre, cfg.k)
        values = values.float().relu()
        with torch.enable_grad():
            decoded = _weighted(W_dec, index, values.requires_grad_())
        error = batch - b_dec - decoded.detach()
        per_token = -2 / (
            len(batch) * variance
        )  # of the loss: the squared error's mean over tokens, in units of the variance
        (by_value,) = torch.autograd.grad(decoded, values, error * per_token)
        grads = _gradients(
            shifted, index, values.detach(), by_value * (values > 0), error * per_token, cfg.latents
        )
        grads += [(error * per_token).sum(0) - grads[2] @ W_enc]
        fired = torch.zeros_like(idle).index_put_((index[values > 0],), torch.ones((), device=device))
        shown = _mean_of_all([fired, error.square().sum() / (len(batch) * variance)], processes)[1]
        log.append(shown.item())
        if not math.isfinite(log[-1]):
            raise ValueError(NOT_FINITE)
        idle = torch.where(fired > 0, 0.0, idle + processes * len(batch))
        dead = (idle > cfg.dead_after).nonzero().squeeze(-1)
        if len(dead):
            aux = pre[:, dead].float()
            if len(dead) > cfg.aux_k:
                largest, where = aux.topk(cfg.aux_k, dim=-1, sorted=False)
                aux = torch.zeros_like(aux).scatter(1, where, largest)
            small = (
                torch.float32 if half == torch.float16 else half
            )  # a token's part of the loss is below fp16's smallest number
            aux, some = (
                aux.relu().to(small),
                W_dec[dead].to(small),
            )  # many of few latents are active: whole products cost less than sums over them
            missed = (error - aux @ some).to(small) * (per_token / 32)
            back = (missed @ some.T) * (aux > 0)
            for grad, more in zip(grads, (back.T @ shifted.to(small), aux.T @ missed, back.sum(0))):
                grad.index_add_(0, dead, more.float())
            grads[3] -= back.sum(0).float() @ W_enc[dead]
        for parameter, grad in zip(parameters, _mean_of_all(grads, processes)):
            parameter.grad = grad
        W_dec.grad -= (W_dec.grad * W_dec).sum(
            -1, keepdim=True
        ) * W_dec  # keep decoder rows on the unit sphere
        optimizer.step()
        W_dec /= W_dec.norm(dim=-1, keepdim=True)
        if look:
            look(step, now)
    return now(), log


@torch.enable_grad()  # the timing of bf16 trains a little
def _half(device: torch.device) -> torch.dtype:
    """What pre-activations are computed in: which latents are the largest hardly depends on it."""
    return (
        best_dtype("cuda") if device.type == "cuda" else torch.bfloat16 if bf16_is_faster() else torch.float32
    )


def _top(pre: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """As pre.topk(k), in no order. The k largest lie in the k groups of columns with the largest maxima;
    on a CPU two short searches beat a long one."""
    groups = 2 ** round(math.log2(k * pre.shape[1]) / 2)  # both searches as short as can be
    width = pre.shape[1] // groups
    if pre.is_cuda or k > groups or pre.shape[1] % groups:
        return pre.topk(k, dim=-1, sorted=False)
    best = (
        pre.view(-1, width, groups).amax(1).topk(k, dim=-1, sorted=False).indices
    )  # group g: columns g, g + groups, ...
    columns = (best[:, :, None] + torch.arange(0, pre.shape[1], groups)).flatten(1)
    values, which = pre.gather(1, columns).topk(k, dim=-1, sorted=False)
    return values, columns.gather(1, which)


def _weighted(
    rows: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, starts: torch.Tensor | None = None
) -> torch.Tensor:
    """Sums of weights times rows[index], over the columns of index (tokens, k); or over parts of a long
    index that begin at `starts`."""
    return torch.nn.functional.embedding_bag(index, rows, starts, per_sample_weights=weights, mode="sum")


def _gradients(
    x: torch.Tensor,
    index: torch.Tensor,
    values: torch.Tensor,
    by_value: torch.Tensor,
    grad: torch.Tensor,
    latents: int,
) -> list[torch.Tensor]:
    """Gradients of W_enc (latents, width), W_dec and b_enc from those of the active latents' values,
    by_value, and of the reconstruction, grad (tokens, width): sums over the active latents alone, index
    and values (tokens, k). x (tokens, width): what is encoded. A hundredth of the work of going through
    all of them."""
    order = index.flatten().argsort()  # active latents, latent by latent
    count = torch.bincount(index.flatten(), minlength=latents)
    token, starts = order // index.shape[1], count.cumsum(0) - count
    enc, dec = (
        _weighted(rows, token, weights.flatten()[order], starts)
        for rows, weights in ((x, by_value), (grad, values))
    )
    return [enc, dec, torch.zeros_like(enc[:, 0]).index_add_(0, index.flatten(), by_value.flatten())]


def _mean_of_all(tensors: list[torch.Tensor], processes: int) -> list[torch.Tensor]:
    """The tensors, each replaced by its mean over all processes."""
    for t in tensors if processes > 1 else ():
        torch.distributed.all_reduce(t)
        t /= processes
    return tensors


@torch.inference_mode()
def quality(sae: SAE, x: torch.Tensor) -> dict:
    """On held-out activations x: FVU (fraction of variance unexplained), L0, share of latents that never
    fire (percent)."""
    residual, l0, fired = 0.0, 0.0, torch.zeros(sae.W_enc.shape[1], dtype=torch.bool)
    for part in x.split(8192):
        part = part.to(sae.W_enc)
        acts = sae.encode(part)
        residual += (part - sae.decode(acts)).square().sum().item()
        l0 += (acts > 0).sum().item()
        fired |= (acts > 0).any(0).cpu()
    return {
        "FVU": residual / (x - x.mean(0)).square().sum().item(),
        "L0": l0 / len(x),
        "dead": 100 * (~fired).float().mean().item(),
    }


@torch.inference_mode()
def loss_recovered(model, sae: SAE, rows: list[list[int]], batch: int = 32) -> dict:
    """Cross-entropy (nats per token) of the model as it is, with the reconstruction spliced in, and with
    the layer's mean activation in place of it; 'recovered' is the percent of the gap between the last two
    that the SAE closes."""
    mode = {"now": "clean", "sum": 0.0, "count": 0}

    def splice(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        if mode["now"] == "clean":
            mode["sum"], mode["count"] = (
                mode["sum"] + x[:, 1:][mode["real"][:, 1:]].float().sum(0),
                mode["count"] + mode["real"][:, 1:].sum(),
            )
            return None
        flat = x.reshape(-1, x.shape[-1])
        new = (
            sae.decode(sae.encode(flat.to(sae.W_enc))).to(x)
            if mode["now"] == "spliced"
            else (mode["sum"] / mode["count"]).to(x).expand_as(flat)
        )
        new = torch.cat(
            [x[:, :1], new.reshape(x.shape)[:, 1:]], 1
        )  # the first token stays: SAEs are not trained on it
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = decoder_blocks(model)[sae.layer].register_forward_hook(splice)
    loss = {}
    try:
        for mode["now"] in ("clean", "spliced", "mean-ablated"):
            total, count = 0.0, 0
            for start in range(0, len(rows), batch):
                some = rows[start : start + batch]
                width = max(map(len, some))
                ids = torch.tensor([r + [0] * (width - len(r)) for r in some], device=model.device)
                mode["real"] = (
                    torch.arange(width, device=model.device)
                    < torch.tensor([len(r) for r in some], device=model.device)[:, None]
                )
                target = ids.masked_fill(~mode["real"], -100)[:, 1:]
                logits = model(input_ids=ids).logits[:, :-1].float()
                total += torch.nn.functional.cross_entropy(
                    logits.flatten(0, 1), target.flatten(), reduction="sum"
                ).item()
                count += (target != -100).sum().item()
            loss[mode["now"]] = total / count
    finally:
        handle.remove()
    gap = loss["mean-ablated"] - loss["clean"]
    return loss | {"recovered": 100 * (loss["mean-ablated"] - loss["spliced"]) / gap}
