"""SAEs on disk: this project's lie in SAELens' layout, and those that others released become ours."""

import copy
import importlib.util
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from personas.sae import SAE

PLAIN = {  # what a file may say of itself to be read without the sae-lens package
    "apply_b_dec_to_input": True,
    "normalize_activations": "none",
    "rescale_acts_by_decoder_norm": False,
}
CLOSE = 0.01  # how far a converted SAE's latents and output may lie from the original's, of their norm


def save(sae: SAE, folder: Path) -> None:
    """Write cfg.json and sae_weights.safetensors. Raises ValueError if a weight is not finite."""
    width, latents = sae.W_enc.shape
    kind = (
        {"architecture": "topk", "k": sae.k, "rescale_acts_by_decoder_norm": False}
        if sae.k
        else {"architecture": "standard" if sae.threshold is None else "jumprelu"}
    )
    weights = {
        n: getattr(sae, n).contiguous()
        for n in ("W_enc", "W_dec", "b_enc", "b_dec", "threshold")
        if getattr(sae, n) is not None
    }
    lost = [n for n, t in weights.items() if not t.isfinite().all()]
    if lost:
        raise ValueError(f"this SAE is broken: {lost[0]} is not finite")
    about = kind | {
        "d_in": width,
        "d_sae": latents,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": f"blocks.{sae.layer}.hook_resid_post", "hook_layer": sae.layer},
    }
    Path(folder).mkdir(parents=True, exist_ok=True)
    save_file(weights, Path(folder) / "sae_weights.safetensors")
    (Path(folder) / "cfg.json").write_text(json.dumps(about, indent=1))


def load(folder: Path) -> SAE:
    """Read what `save` wrote, or a file of SAELens that needs no more than its weights: its TopK, ReLU and
    JumpReLU, of version 3 on. Raises ValueError for another kind, or if weights and configuration do not
    fit."""
    cfg = _configuration(Path(folder))
    kind, k = _kind(cfg)
    try:
        w = load_file(Path(folder) / "sae_weights.safetensors")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"the weights of the SAE in {folder} are damaged: {error}") from None
    wanted = {"W_enc", "W_dec", "b_enc", "b_dec"} | ({"threshold"} if kind == "jumprelu" else set())
    if set(w) - {"scaling_factor"} != wanted or (kind == "topk" and not k):
        missing = wanted - set(w) or ({"k"} if kind == "topk" and not k else set())
        what = (
            f"misses {', '.join(sorted(missing))}" if missing else f"has {', '.join(sorted(set(w) - wanted))}"
        )
        raise ValueError(f"the SAE in {folder} says it is a {kind}, and {what}")
    width, latents = cfg["d_in"], cfg["d_sae"]
    shapes = {"W_enc": (width, latents), "W_dec": (latents, width), "b_dec": (width,)}
    for n in sorted(wanted):
        if tuple(w[n].shape) != shapes.get(n, (latents,)):
            raise ValueError(
                f"{folder}: {n} has shape {tuple(w[n].shape)}, and cfg.json says {width}, {latents}"
            )
    if any(not t.isfinite().all() for t in w.values()):
        raise ValueError(f"the SAE in {folder} is broken: a weight is not finite")
    if kind == "topk" and (not isinstance(k, int) or not 1 <= k <= latents):
        raise ValueError(f"the SAE in {folder} says k is {k!r}; it has {latents} latents")
    if "scaling_factor" in w and not torch.equal(w["scaling_factor"], torch.ones_like(w["scaling_factor"])):
        raise ValueError(f"the SAE in {folder} scales its latents; open it with the sae-lens package")
    return SAE(**{n: w[n].float() for n in wanted}, k=k, layer=_layer(_hook(cfg)))


def check_name(name: str, width: int, layer: int) -> None:
    """Raise ValueError if `named` could not load this SAE, or if the one in this folder has another
    width or layer; weights are not read."""
    if ":" in name:
        if importlib.util.find_spec("sae_lens") is None:
            raise ValueError(
                f"{name} is fetched by the sae-lens package, which is not installed. It needs "
                "another TransformerLens than this project: in an environment of its own, load it there, "
                "write sae_files.save(sae_files.from_sae_lens(...), folder), and name that folder"
            )
        return
    if not (Path(name) / "cfg.json").is_file():
        raise ValueError(
            f"{name} has no cfg.json: an SAE in SAELens' layout is wanted, or `release:id` for sae-lens"
        )
    cfg = _configuration(Path(name))
    if cfg["d_in"] != width:
        raise ValueError(
            f"the SAE in {name} has width {cfg['d_in']}, the model {width}: it belongs to another model"
        )
    found = _layer(_hook(cfg))
    if found != layer:
        raise ValueError(f"the SAE in {name} is for block {found}, the profile's sae.layer is {layer}")


def named(name: str) -> SAE:
    """A folder in SAELens' layout, or `release:id` of one that the sae-lens package, if it is installed,
    fetches. Raises ValueError."""
    if ":" not in name:
        return load(Path(name))
    import sae_lens

    return from_sae_lens(sae_lens.SAE.from_pretrained(*name.split(":", 1)))


def from_sae_lens(theirs) -> SAE:
    """An SAE that the `sae-lens` package loaded, in its own format or from Gemma Scope,
    dictionary_learning and others.

    Scales and biases that SAELens applies apart are folded into the weights; latents and output are
    compared with the original's on input at which its latents fire. Raises ValueError for one that reads
    another place than a block's output, or is of a kind that cannot be written so (gated; inputs
    normalised one by one).
    """
    layer = _layer(theirs.cfg.metadata.hook_name)
    w = {n: t.detach().float().cpu() for n, t in theirs.state_dict().items()}
    if not {"W_enc", "W_dec", "b_enc"} <= set(w):
        raise ValueError(
            f"an SAE of architecture {theirs.cfg.architecture()!r} has no encoder of the plain kind; "
            "topk, standard and jumprelu have"
        )
    norm = (
        w["W_dec"].norm(dim=-1)
        if getattr(theirs.cfg, "rescale_acts_by_decoder_norm", False)
        else torch.ones(len(w["W_dec"]))
    )
    b_dec = w.get("b_dec", torch.zeros(w["W_dec"].shape[1]))
    b_enc = w["b_enc"] if theirs.cfg.apply_b_dec_to_input else w["b_enc"] + b_dec @ w["W_enc"]
    ours = SAE(
        w["W_enc"] * norm,
        w["W_dec"] / norm[:, None],
        b_enc * norm,
        b_dec,
        int(theirs.cfg.k) if hasattr(theirs.cfg, "k") else None,
        layer,
        w.get("threshold"),
    )
    plain = copy.deepcopy(theirs).to(
        torch.device("cpu"), torch.float32
    )  # in bf16 other latents would be among the first k
    x = _firing(ours)
    with torch.inference_mode():
        acts = plain.encode(x).to_dense(), ours.encode(x)  # SAELens' TopK may be sparse
        pairs = acts, (plain.decode(acts[0]), ours.decode(acts[1]))
    # As a norm: in so many numbers a few lie at a threshold, and rounding lets one fire and not the other.
    same = all((o - t).norm() <= CLOSE * t.norm() for t, o in pairs)
    if theirs.cfg.normalize_activations in ("layer_norm", "constant_norm_rescale") or not same:
        raise ValueError(
            f"an SAE of architecture {theirs.cfg.architecture()!r} with "
            f"normalize_activations={theirs.cfg.normalize_activations!r} cannot be written as "
            "topk, relu or jumprelu"
        )
    return ours


def _firing(sae: SAE, rows: int = 64) -> torch.Tensor:
    """Inputs (rows, width) about b_dec, as small as they can be for a latent to fire in most of them: the
    larger they are, the less an error in a bias shows. The largest tried, 10,000, where none does."""
    x = torch.randn(rows, len(sae.b_dec), generator=torch.Generator().manual_seed(0))
    for scale in (1.0, 10.0, 100.0, 1000.0, 10000.0):
        given = sae.b_dec + scale * x
        if (sae.encode(given) > 0).any(-1).float().mean() > 0.5:
            break
    return given


def _configuration(folder: Path) -> dict:
    """cfg.json. Raises ValueError if it is no JSON object with d_in and d_sae, if it tells of a kind that
    weights alone do not make, or if there are no weights beside it."""
    try:
        cfg = json.loads((folder / "cfg.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder / 'cfg.json'} cannot be read: {error}") from None
    if not isinstance(cfg, dict) or not {"d_in", "d_sae"} <= set(cfg):
        raise ValueError(f"{folder / 'cfg.json'} is no SAE's configuration: d_in and d_sae are wanted")
    if _kind(cfg)[0] is None or any(cfg.get(n, v) not in (v, None) for n, v in PLAIN.items()):
        raise ValueError(
            f"the SAE in {folder} is of a kind, or scales or shifts its input or output in a way, that its "
            "weights do not hold: open it with the sae-lens package, write "
            "sae_files.save(sae_files.from_sae_lens(...), folder), and name that folder"
        )
    if not (folder / "sae_weights.safetensors").is_file():
        raise ValueError(f"{folder} has no sae_weights.safetensors")
    return cfg


def _kind(cfg: dict) -> tuple[str | None, int | None]:
    """(topk, standard, jumprelu or None, k): SAELens 3 to 5 called all of them standard and named the
    activation function apart."""
    kind, function = (
        cfg.get("architecture", "standard"),
        cfg.get("activation_fn") or cfg.get("activation_fn_str"),
    )
    k = cfg.get("k") or (cfg.get("activation_fn_kwargs") or {}).get("k")
    if kind == "standard" and function not in (None, "relu"):
        kind = function
    return (kind, k if kind == "topk" else None) if kind in ("topk", "standard", "jumprelu") else (None, None)


def _hook(cfg: dict) -> str | None:
    return (cfg.get("metadata") or cfg).get("hook_name")


def _layer(hook_name: str | None) -> int:
    """The block whose output TransformerLens calls so. Raises ValueError for another place."""
    hook = re.fullmatch(r"blocks\.(\d+)\.hook_resid_(pre|post)", hook_name or "")
    layer = int(hook[1]) - (hook[2] == "pre") if hook else -1
    if layer < 0:
        raise ValueError(
            f"this SAE reads {hook_name}; one that reads the output of a block "
            "(blocks.<n>.hook_resid_post) is needed"
        )
    return layer
