"""A random direction: what a method scores that knows nothing."""

import torch

CHANCE = True


def find(case):
    return torch.randn(case.before.config.hidden_size, generator=torch.Generator().manual_seed(case.seed))
