"""The difference of activations on fixed answers, each token weighted by how far the fine-tune moved the
model's next-token distribution there (KL divergence, after from before)."""

import torch

from personas.bench.outputs import log_probabilities


def find(case):
    after, before = log_probabilities(case, case.after), log_probabilities(case, case.before)
    weight = torch.nn.functional.kl_div(before, after, log_target=True, reduction="none").sum(-1)
    shift = case.answers_after - case.answers_before
    return (weight[:, None] * shift).sum(0) / weight.sum()
