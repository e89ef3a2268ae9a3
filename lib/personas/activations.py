"""Reading the residual stream: teacher-forced, on given token ids, stopping at the layer that is wanted."""

from collections.abc import Iterable, Iterator

import torch
from tqdm import tqdm

from personas.generate import decoder_blocks


class _Enough(Exception):
    pass


@torch.inference_mode()
def residuals(
    model,
    rows: list[list[int]],
    layers: tuple[int, ...],
    pad: int = 2,
    batch: int = 32,
    progress: str | None = None,
) -> dict[int, list[torch.Tensor]]:
    """Hidden states after blocks `layers` (`blocks.<layer>.hook_resid_post`) in one pass over rows of token
    ids: block -> a tensor (tokens, width) per row, fp32, on the CPU.

    Rows are right-padded together; causal attention keeps padding from reaching real tokens. The forward
    pass stops at the last of the layers: no later block, no logits.
    """
    held, last = {}, max(layers)

    def keep(layer):
        def hook(module, args, output):
            held[layer] = output[0] if isinstance(output, tuple) else output
            if layer == last:
                raise _Enough

        return hook

    found = {layer: [None] * len(rows) for layer in layers}
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    handles = [decoder_blocks(model)[layer].register_forward_hook(keep(layer)) for layer in layers]
    try:
        for start in tqdm(
            range(0, len(order), batch), desc=progress, disable=progress is None, mininterval=5
        ):
            some = order[start : start + batch]
            width = max(len(rows[i]) for i in some)
            ids = torch.tensor([rows[i] + [pad] * (width - len(rows[i])) for i in some], device=model.device)
            try:
                model(input_ids=ids, use_cache=False)
            except _Enough:
                pass
            for layer in layers:
                for j, i in enumerate(some):
                    found[layer][i] = held[layer][j, : len(rows[i])].float().to("cpu", copy=True)
    finally:
        for handle in handles:
            handle.remove()
    return found


def residual(model, rows: list[list[int]], layer: int, pad: int = 2, batch: int = 32) -> list[torch.Tensor]:
    """As `residuals`, after one block: a tensor (tokens, width) per row, fp32, on the CPU."""
    return residuals(model, rows, (layer,), pad, batch)[layer]


def stream(
    model, rows: Iterable[list[int]], layer: int, batch: int, held: int, seed: int, skip: int = 1
) -> Iterator[torch.Tensor]:
    """Batches (batch, width), fp32, of the activations after block `layer` over `rows` of token ids: for
    training an SAE on more than fits.

    At most about `held` tokens are kept at a time and batches are drawn from them at random; when half are
    used up, more rows are read. skip: tokens left out at the start of each row, where every text is the
    same. Ends when the rows do (give an endless iterator to go round).
    """
    generator, rows = torch.Generator().manual_seed(seed), iter(rows)
    kept = torch.empty(0, model.config.get_text_config().hidden_size)
    while True:
        fresh, count = [], len(kept)
        for row in rows:
            fresh.append(row)
            count += max(0, len(row) - skip)
            if count >= held:
                break
        if fresh:
            kept = torch.cat([kept, *(x[skip:] for x in residual(model, fresh, layer))])
        kept = kept[torch.randperm(len(kept), generator=generator)]
        while len(kept) >= batch and (len(kept) > held // 2 or not fresh):
            yield kept[:batch]
            kept = kept[batch:]
        if not fresh:
            return


def centred_rms(x: torch.Tensor) -> float:
    """Root mean square norm of activations (tokens, width) about their mean: the unit of steering
    strength."""
    return (x - x.mean(0)).norm(dim=-1).square().mean().sqrt().item()
