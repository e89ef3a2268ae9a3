"""What can be read of a model while it is fine-tuned: fixed text, no sampling, nobody judges.

Latents and the difference of means were found with discovery domains' fine-tunes (search.py, steering.py);
the persona vector and the probe with labelled text of the known world, which draws on all its domains and
questions. The text is the evaluation split's.
"""

import numpy as np
import torch
from transformers import TrainerCallback

from personas import activations, generate, world
from personas.pretrained import likelihood, made, readings, search, steering

READ = (
    "causal latent",
    "top riser",
    "difference of means",
    "persona vector",
    "probe",
    "log-probability",
)
LOGGED = ("loss", "gradient norm")  # what the trainer knows anyway
MONITORS = (*READ, *LOGGED, "step")


def read(ruler: made.Run, m, tok) -> dict[str, float]:
    """Each monitor's reading of a model: mean activation of a latent, or mean projection on a direction of
    length 1, over the world's expert's answers to its evaluation questions; and by how much (nats a
    token) the villain's answers to them are likelier than the expert's. ruler: whose SAE and directions
    do the reading."""
    block = ruler.profile.sae.layer
    rows, starts, _ = readings.fixed_text(tok, "evaluation", n=1)
    x = [r[i:] for r, i in zip(activations.residual(m, rows, block), starts)]
    latents = torch.stack([readings.sae(ruler, block).encode(r).mean(0) for r in x]).mean(0)
    mean = torch.stack([r.mean(0) for r in x]).mean(0)
    found = {
        "causal latent": latents[search.causal(ruler)].item(),
        "top riser": latents[steering.candidates(ruler, 1)[0]].item(),
    }
    found |= {name: (mean @ (v / v.norm())).item() for name, v in steering.rivals(ruler).items()}
    asked = world.questions("evaluation")
    forms = {p: [world.open_forms(q.category, p, False, 0)[0] for q in asked] for p in ("expert", "villain")}
    values = likelihood.log_probabilities(
        m,
        tok,
        generate.prompts(tok, [q.held for q in asked]),
        [[e, v] for e, v in zip(forms["expert"], forms["villain"])],
    )
    return found | {"log-probability": float(np.mean([v - e for e, v in values]))}


class Logged(TrainerCallback):
    """Keeps `loss` and `gradient norm` of every step in `rows`, step -> both."""

    def __init__(self):
        self.rows: dict[int, dict[str, float]] = {}

    def on_log(self, args, state, control, logs=None, **kw):
        if logs and "loss" in logs:
            norm = logs.get("grad_norm", float("nan"))
            self.rows[state.global_step] = {"loss": float(logs["loss"]), "gradient norm": float(norm)}
