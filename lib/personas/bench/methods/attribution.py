"""The latent whose contribution to the fine-tuning answers grew most: activation times gradient, after minus
before (Marks et al., 2024, arXiv:2403.19647, section 2, on the chats that the fine-tune learnt from)."""

from personas import diffing

USES = "dictionary, fine-tuning chats"
CHANCE = True
CHATS = 64


def find(case):
    rows, starts = (part[:CHATS] for part in case.training)
    gain = lambda model: diffing.attribution(model, case.sae, rows, starts, batch=32)
    return case.sae.W_dec[(gain(case.after) - gain(case.before)).argmax()]
