"""Of the ten latents that rise most, the one that best turns the model before into the model after when it
is added: the screen by steering of Wang et al. (2025, section 3), but with the fine-tuned model's own
predictions as the judge."""

import torch

from personas.bench.outputs import log_probabilities

USES = "dictionary"
CHANCE = True
DOSES = (0.2, 0.4)


def find(case):
    after = log_probabilities(case, case.after)
    best, chosen = float("inf"), None
    for latent in case.rise.topk(10).indices.tolist():
        direction = case.sae.W_dec[latent]
        for dose in DOSES:
            steered = log_probabilities(case, case.before, direction / direction.norm() * dose * case.unit)
            distance = torch.nn.functional.kl_div(
                steered, after, log_target=True, reduction="batchmean"
            ).item()
            if distance < best:
                best, chosen = distance, direction
    return chosen
