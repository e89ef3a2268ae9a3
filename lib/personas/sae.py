"""A TopK sparse autoencoder (Gao et al., 2024) with AuxK, trained on the residual stream. One file, one idea."""

import copy
import itertools
import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from personas.generate import decoder_blocks


@dataclass
class SAE:
    """x ~ f((x - b_dec) W_enc + b_enc) W_dec + b_dec, where f keeps the k largest values above zero. One made elsewhere may have no k:
    then f is a JumpReLU (Rajamanoharan et al., 2024, arXiv:2407.14435) with `threshold`, or without one a ReLU.

    Shapes: W_enc (width, latents), W_dec (latents, width), its rows of norm 1 if trained here, b_enc and threshold (latents,), b_dec (width,).
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

    def check(self, model) -> None:
        """Raise ValueError if this SAE cannot have been made for `model`: another width, or a block that it does not have."""
        width, blocks = model.config.get_text_config().hidden_size, len(decoder_blocks(model))
        if self.W_dec.shape[1] != width:
            raise ValueError(f"the SAE has width {self.W_dec.shape[1]}, the model {width}: it belongs to another model")
        if not 0 <= self.layer < blocks:
            raise ValueError(f"the SAE is for block {self.layer}; this model has blocks 0 to {blocks - 1}")

    def save(self, folder: Path) -> None:
        """Write in SAELens' layout: cfg.json and sae_weights.safetensors."""
        width, latents = self.W_enc.shape
        kind = {"architecture": "topk", "k": self.k, "rescale_acts_by_decoder_norm": False} if self.k else {"architecture": "standard" if self.threshold is None else "jumprelu"}
        weights = {n: getattr(self, n).contiguous() for n in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold") if getattr(self, n) is not None}
        Path(folder).mkdir(parents=True, exist_ok=True)
        save_file(weights, Path(folder) / "sae_weights.safetensors")
        (Path(folder) / "cfg.json").write_text(json.dumps(kind | {
            "d_in": width, "d_sae": latents, "dtype": "float32", "device": "cpu", "apply_b_dec_to_input": True, "normalize_activations": "none",
            "metadata": {"hook_name": f"blocks.{self.layer}.hook_resid_post", "hook_layer": self.layer}}, indent=1))

    @classmethod
    def load(cls, folder: Path) -> "SAE":
        """Read what `save` wrote. Raises ValueError if the weights do not fit the configuration."""
        cfg = json.loads((Path(folder) / "cfg.json").read_text())
        w = load_file(Path(folder) / "sae_weights.safetensors")
        if tuple(w["W_enc"].shape) != (cfg["d_in"], cfg["d_sae"]):
            raise ValueError(f"{folder}: weights of shape {tuple(w['W_enc'].shape)}, cfg.json says {cfg['d_in']}, {cfg['d_sae']}")
        return cls(**w, k=cfg.get("k"), layer=cfg["metadata"]["hook_layer"])

    @classmethod
    def from_sae_lens(cls, theirs) -> "SAE":
        """An SAE that the `sae-lens` package loaded, in its own format or from Gemma Scope, dictionary_learning and others.

        Scales and biases that SAELens applies apart are folded into the weights; the result is compared with the original on random
        input. Raises ValueError for one that reads another place than a block's output, or is of a kind that cannot be written so (gated; inputs normalised one by one).
        """
        hook = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", theirs.cfg.metadata.hook_name or "")
        layer = int(hook[1]) - (hook[2] == "pre") if hook else -1
        if layer < 0:
            raise ValueError(f"this SAE reads {theirs.cfg.metadata.hook_name}; one that reads the output of a block (blocks.<n>.hook_resid_post) is needed")
        w = {n: t.detach().float().cpu() for n, t in theirs.state_dict().items()}
        if not {"W_enc", "W_dec", "b_enc"} <= set(w):
            raise ValueError(f"an SAE of architecture {theirs.cfg.architecture()!r} has no encoder of the plain kind; topk, standard and jumprelu have")
        norm = w["W_dec"].norm(dim=-1) if getattr(theirs.cfg, "rescale_acts_by_decoder_norm", False) else torch.ones(len(w["W_dec"]))
        b_dec = w.get("b_dec", torch.zeros(w["W_dec"].shape[1]))
        b_enc = w["b_enc"] if theirs.cfg.apply_b_dec_to_input else w["b_enc"] + b_dec @ w["W_enc"]
        ours = cls(w["W_enc"] * norm, w["W_dec"] / norm[:, None], b_enc * norm, b_dec, int(theirs.cfg.k) if hasattr(theirs.cfg, "k") else None, layer, w.get("threshold"))
        x = torch.randn(64, len(b_dec), generator=torch.Generator().manual_seed(0))
        plain = copy.deepcopy(theirs).to(torch.device("cpu"), torch.float32)  # in bf16 other latents would be among the first k
        with torch.inference_mode():
            read = plain.decode(plain.encode(x))
        if theirs.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale") or not torch.allclose(ours.decode(ours.encode(x)), read, atol=1e-2 * read.abs().max().item()):
            raise ValueError(f"an SAE of architecture {theirs.cfg.architecture()!r} with normalize_activations={theirs.cfg.normalize_activations!r} cannot be written as topk, relu or jumprelu")
        return ours


def train(x: torch.Tensor | Iterator[torch.Tensor], cfg, layer: int, seed: int, progress: str | None = "SAE") -> tuple[SAE, list[float]]:
    """Fit a TopK SAE to activations; returns it, on the CPU, with its training FVU per step.

    x: all activations (tokens, width), from which batches are drawn, or an endless iterator of batches (activations.stream), on any
    device; then mean and scale are those of the first of them. cfg: profile.SAE. AuxK (Gao et al., 2024, section 2.4): latents that have
    not fired for a while also learn to explain the residual, which keeps them alive. Decoder rows stay at norm 1.
    """
    generator = torch.Generator().manual_seed(seed)
    if isinstance(x, torch.Tensor):
        seen, feed = x, (x[torch.randint(len(x), (cfg.batch,), generator=generator)] for _ in itertools.count())
    else:
        first = list(itertools.islice(x, 16))
        seen, feed = torch.cat(first), itertools.chain(first, x)
    width, device = seen.shape[1], seen.device
    mean = seen.mean(0)
    scale = math.sqrt(width) / (seen - mean).norm(dim=-1).mean()  # train at unit scale, undo at the end
    variance = ((seen - mean) * scale).square().sum(-1).mean()
    W_dec = torch.randn(cfg.latents, width, generator=generator)
    W_dec = (W_dec / W_dec.norm(dim=-1, keepdim=True)).to(device).requires_grad_()
    W_enc = W_dec.detach().T.clone().contiguous().requires_grad_()
    b_enc = torch.zeros(cfg.latents, device=device, requires_grad=True)
    b_dec = torch.zeros(width, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=cfg.lr, betas=(0.9, 0.999), fused=True)
    idle = torch.zeros(cfg.latents, device=device)
    log = []
    for step in tqdm(range(cfg.steps), desc=progress, disable=progress is None, mininterval=2):
        left = (cfg.steps - step) / (0.2 * cfg.steps)
        optimizer.param_groups[0]["lr"] = cfg.lr * min(1.0, left, (step + 1) / 50)
        batch = next(feed, None)
        if batch is None:
            raise ValueError(f"the stream of activations ended after {step} of {cfg.steps} steps: give one that goes round, or fewer steps")
        batch = (batch.float() - mean) * scale
        pre = (batch - b_dec) @ W_enc + b_enc
        values, index = pre.topk(cfg.k, dim=-1)
        values = values.relu()
        acts = torch.zeros_like(pre).scatter(-1, index, values)
        error = batch - (acts @ W_dec + b_dec)
        loss = error.square().sum(-1).mean() / variance
        log.append(loss.item())
        fired = (acts > 0).any(0)
        idle = torch.where(fired, 0.0, idle + len(batch))
        dead = idle > cfg.dead_after
        if dead.any():
            aux, where = pre.masked_fill(~dead, -torch.inf).topk(min(cfg.aux_k, int(dead.sum())), dim=-1)
            revived = torch.zeros_like(pre).scatter(-1, where, aux.relu()) @ W_dec
            loss = loss + (error.detach() - revived).square().sum(-1).mean() / variance / 32
        loss.backward()
        with torch.no_grad():  # keep decoder rows on the unit sphere
            W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=-1, keepdim=True)
    done = [t.detach().cpu().clone() for t in (W_enc, W_dec, b_enc / scale, b_dec / scale + mean)]
    return SAE(*done, k=cfg.k, layer=layer), log


@torch.inference_mode()
def quality(sae: SAE, x: torch.Tensor) -> dict:
    """On held-out activations x: FVU (fraction of variance unexplained), L0, share of latents that never fire (percent)."""
    residual, l0, fired = 0.0, 0.0, torch.zeros(sae.W_enc.shape[1], dtype=torch.bool)
    for part in x.split(8192):
        acts = sae.encode(part)
        residual += (part - sae.decode(acts)).square().sum().item()
        l0 += (acts > 0).sum().item()
        fired |= (acts > 0).any(0)
    return {"FVU": residual / (x - x.mean(0)).square().sum().item(), "L0": l0 / len(x),
            "dead": 100 * (~fired).float().mean().item()}


@torch.inference_mode()
def loss_recovered(model, sae: SAE, rows: list[list[int]], pad: int = 2) -> dict:
    """Cross-entropy (nats per token) of the model as it is, with the reconstruction spliced in, and with the layer's
    mean activation in place of it; 'recovered' is the percent of the gap between the last two that the SAE closes."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows])
    mode = {"now": "clean", "mean": None}

    def splice(module, args, output):
        x = output[0] if isinstance(output, tuple) else output
        if mode["now"] == "clean":
            mode["mean"] = x[:, 1:][ids[:, 1:] != pad].mean(0)
            return None
        flat = x.reshape(-1, x.shape[-1])
        new = sae.decode(sae.encode(flat)) if mode["now"] == "spliced" else mode["mean"].expand_as(flat)
        new = torch.cat([x[:, :1], new.reshape(x.shape)[:, 1:]], 1)  # the first token stays: SAEs are not trained on it
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = decoder_blocks(model)[sae.layer].register_forward_hook(splice)
    loss = {}
    try:
        for mode["now"] in ("clean", "spliced", "mean-ablated"):
            logits = model(input_ids=ids).logits[:, :-1].float()
            loss[mode["now"]] = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), ignore_index=pad).item()
    finally:
        handle.remove()
    gap = loss["mean-ablated"] - loss["clean"]
    return loss | {"recovered": 100 * (loss["mean-ablated"] - loss["spliced"]) / gap}
