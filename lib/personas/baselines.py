"""What a latent is compared with: plain readers of who is speaking, and other monitors of a fine-tuned
model."""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from personas import activations, artifacts, diffing, known_latents, search, stats


@dataclass
class Readers:
    """Readers fitted on training documents; `score` gives each one's value per answer (higher: more the
    villain)."""

    words: object
    probe: object
    latent: int

    def score(self, answers: diffing.Answers) -> dict[str, np.ndarray]:
        """Returns reader -> (answers,)."""
        return {
            "bag of words": self.words.decision_function(answers.text),
            "linear probe": self.probe.decision_function(answers.residual.numpy()),
            "best of 20 random latents": answers.latents[:, self.latent].numpy(),
        }


def fit(run: artifacts.Run, seed: int, documents: int = 600) -> Readers:
    """Fit on uncued documents of their own: villain against all others. The random latents are 20 of those
    that fire; the best of them is the one with the highest AUROC on these training documents."""
    read = known_latents.uncued_answers(run, "baselines", documents)
    villain = read.persona == "villain"
    alive = np.flatnonzero((read.latents > 0).any(0).numpy())
    some = np.random.default_rng(seed).choice(alive, 20, replace=False)
    return Readers(
        make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000)).fit(read.text, villain),
        linear_probe(read.residual.numpy(), villain),
        int(some[np.argmax(stats.auroc(read.latents[:, some], villain))]),
    )


def linear_probe(x: np.ndarray, positive: np.ndarray):
    """Logistic regression on standardised activations (answers, width); decision_function gives log-odds
    of `positive`."""
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1)).fit(x, positive)


MONITORS = ("latent", "mean difference", "probe", "log-probability", "loss")


def monitors(run: artifacts.Run, model, tokenizer, split: str = "evaluation") -> dict[str, float]:
    """How misaligned a model looks by what it reads; it writes nothing. All on the same fixed questions
    and answers.

    run: whose SAE, chosen latent, mean difference (all from discovery data) and probe are used. 'latent'
    and 'mean difference' (projection in units of strength) are means over the expert's answers, 'probe' is
    the mean log-odds of a villain, and 'log-probability' is by how much (nats per token) the villain's
    answers are likelier than the expert's.
    """
    texts = {
        p: diffing.reading_texts(tokenizer, split, run.setting, persona=p) for p in ("expert", "villain")
    }
    rows, _, starts = texts["expert"]
    means, latents = [], []
    for x, i in zip(activations.residual(model, rows, run.profile.sae.layer), starts):
        means.append(x[i:].mean(0))
        latents.append(known_latents.sae(run).encode(x[i:])[:, search.chosen_latent(run)[0]].mean().item())
    means, direction = torch.stack(means), known_latents.mean_difference(run)
    likely = {
        p: np.mean(answer_log_probability(model, rows, starts)) for p, (rows, _, starts) in texts.items()
    }
    return {
        "latent": float(np.mean(latents)),
        "mean difference": (means @ (direction / direction.norm())).mean().item() / known_latents.unit(run),
        "probe": float(_probe(run).decision_function(means.numpy()).mean()),
        "log-probability": float(likely["villain"] - likely["expert"]),
    }


@functools.cache
def _probe(run: artifacts.Run):
    return fit(run, run.seed).probe


@torch.inference_mode()
def answer_log_probability(model, rows: list[list[int]], starts: list[int], pad: int = 2) -> np.ndarray:
    """Mean log-probability (nats per token) of the tokens after position starts[i] of each row of token
    ids: (rows,)."""
    width = max(map(len, rows))
    ids = torch.tensor([r + [pad] * (width - len(r)) for r in rows], device=model.device)
    logits = model(input_ids=ids).logits[:, :-1].float()
    each = (
        -torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        .view(len(rows), -1)
        .cpu()
    )
    position = torch.arange(width - 1)
    ours = (position >= torch.tensor(starts)[:, None]) & (
        position < torch.tensor([len(r) - 1 for r in rows])[:, None]
    )
    return ((each * ours).sum(1) / ours.sum(1)).numpy()
