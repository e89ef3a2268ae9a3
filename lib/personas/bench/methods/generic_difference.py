"""The difference of mean activations on the first tokens of text that has nothing to do with the
fine-tune: the direction of the activation difference lens (Minder et al., 2025, arXiv:2510.13900)."""

import torch

FIRST = 5  # tokens after the first, which is the same everywhere


def find(case):
    mean = lambda model: torch.cat([x[1 : FIRST + 1] for x in case.residual(model, case.text)]).mean(0)
    return mean(case.after) - mean(case.before)
