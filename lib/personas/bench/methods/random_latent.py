"""A random latent among those that fire on the fixed answers."""

import torch

USES = "dictionary"
CHANCE = True


def find(case):
    alive = (case.sae.encode(case.answers_before) > 0).any(0).nonzero().flatten()
    pick = torch.randint(len(alive), (1,), generator=torch.Generator().manual_seed(case.seed))
    return case.sae.W_dec[alive[pick].item()]
