"""The latent that rises most (Wang et al., 2025, section 3, without the screen by steering)."""

USES = "dictionary"
CHANCE = True


def find(case):
    return case.sae.W_dec[case.rise.argmax()]
