"""The direction that the fine-tune's change of weights writes most strongly: the first left singular
vector of the change of the block's MLP output matrix. Its sign is that of the difference of mean
activations."""

from personas.generate import decoder_blocks


def find(case):
    out = lambda model: decoder_blocks(model)[case.layer].mlp.down_proj.weight.detach()
    first = (out(case.after) - out(case.before)).svd().U[:, 0]
    shift = case.answers_after.mean(0) - case.answers_before.mean(0)
    return first if first @ shift >= 0 else -first
