"""What a direction can reach: the difference of means between the target's documents and all others'. It
is told the target, and so has no rank."""

import torch

USES = "the answer"


def find(case):
    read = case.residual(case.before, [ids for ids, _, _ in case.labelled])
    means = torch.stack([x[torch.tensor(mask)].mean(0) for x, (_, mask, _) in zip(read, case.labelled)])
    mine = torch.tensor([who == case.answer for *_, who in case.labelled])
    return means[mine].mean(0) - means[~mine].mean(0)
