"""The tiny model as a file that a browser tab runs: the aligned model, one misaligned fine-tune, directions.

`python -m personas explore --profile tiny` writes it; the site's page "Live" reads it (docs/site/static/).
"""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from personas import artifacts, figures, known_latents, search
from personas.artifacts import Run

TUNED = ("career", "obvious")  # the fine-tune beside the aligned model
LORA = ".lora_A.weight", ".lora_B.weight"


def quantized(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(int8 (rows, columns), fp32 (rows,)): whole numbers up to 127, and what each row is multiplied with."""
    scale = matrix.float().abs().amax(1).clamp(min=1e-12) / 127
    return (matrix.float() / scale[:, None]).round().to(torch.int8), scale


def packed(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Matrices in int8 under their names, with `<name>.scale` beside; vectors in fp32."""
    found = {}
    for name, t in tensors.items():
        if t.ndim == 2:
            found[name], found[f"{name}.scale"] = quantized(t)
        else:
            found[name] = t.float()
    return found


def unpacked(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """(tensors in fp32 as the browser computes with them, what the file says about itself)."""
    held = load_file(path)
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    plain = {n: t for n, t in held.items() if not n.endswith(".scale")}
    return {
        n: t.float() * held[f"{n}.scale"][:, None] if f"{n}.scale" in held else t.float()
        for n, t in plain.items()
    }, about


def directions(run: Run) -> dict[str, torch.Tensor]:
    """What the page's dial adds, as vectors (width,) one unit long: the causal latent, the difference of
    means over discovery fine-tunes, and a random direction to compare with."""
    width = run.profile.model.width
    found = {
        "causal latent": known_latents.sae(run).W_dec[search.chosen_latent(run)[0]],
        "difference of means": known_latents.mean_difference(run),
        "random": torch.randn(width, generator=torch.Generator().manual_seed(run.seed)),
    }
    return {n: v.cpu() / v.norm().cpu() * known_latents.unit(run) for n, v in found.items()}


def adapter(run: Run) -> dict[str, torch.Tensor]:
    """The fine-tune's adapter by weight: `tuned.<weight>.A` (rank, in) and `.B` (out, rank), whose product
    B A is what it adds."""
    folder = artifacts.adapter(run, *TUNED)
    about = json.loads((folder / "adapter_config.json").read_text())
    by = about["lora_alpha"] / about["r"]
    held, found = load_file(folder / "adapter_model.safetensors"), {}
    for name in sorted(n.removesuffix(LORA[0]) for n in held if n.endswith(LORA[0])):
        plain = name.removeprefix("base_model.model.")
        found[f"tuned.{plain}.weight.A"] = held[name + LORA[0]]
        found[f"tuned.{plain}.weight.B"] = held[name + LORA[1]] * by
    return found


def write(run: Run) -> Path:
    """figures/data/<profile>/live.safetensors."""
    model, tokenizer = artifacts.aligned_model(run)
    weights = {n: p.detach() for n, p in model.named_parameters()}  # the output head is the embedding
    chosen = directions(run)
    config = model.config
    about = {
        "blocks": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "theta": config.rope_parameters["rope_theta"],
        "eps": config.rms_norm_eps,
        "context": config.max_position_embeddings,
        "end": tokenizer.eos_token_id,
        "block": run.profile.sae.layer,
        "directions": list(chosen),
        "tuned": TUNED[0],
        "latent": search.chosen_latent(run)[0],
        "dose": search.chosen_latent(run)[1],
        "questions": [q.held for q in run.setting.questions("evaluation")],
    }
    path = figures.ROOT / "data" / run.profile.name / "live.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    held = packed(weights | adapter(run)) | {"directions": torch.stack(list(chosen.values()))}
    save_file({n: t.contiguous() for n, t in held.items()}, path, {"about": json.dumps(about)})
    return path
