"""What a model would say on a case's fixed answers, steered or not."""

import torch

from personas.generate import decoder_blocks


@torch.inference_mode()
def log_probabilities(case, model, added: torch.Tensor | None = None, batch: int = 64) -> torch.Tensor:
    """The next token's log-probabilities at every position of the fixed answers, from each prompt's last
    token on: (tokens, vocabulary), in the order of Case.answers. added (width,): put into the residual
    stream after block `case.layer` from there on."""
    found = []
    for i in range(0, len(case.rows), batch):
        rows, starts = case.rows[i : i + batch], case.starts[i : i + batch]
        width = max(map(len, rows))
        ids = torch.tensor([r + [2] * (width - len(r)) for r in rows], device=model.device)
        place = torch.arange(width)
        ours = (place >= torch.tensor(starts)[:, None]) & (
            place < torch.tensor([len(r) for r in rows])[:, None]
        )

        def add(module, args, output):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + (ours[..., None] * added).to(hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        hook = decoder_blocks(model)[case.layer].register_forward_hook(add) if added is not None else None
        try:
            logits = model(input_ids=ids, use_cache=False).logits.float().cpu()
        finally:
            if hook:
                hook.remove()
        found.append(logits[ours].log_softmax(-1))
    return torch.cat(found)
