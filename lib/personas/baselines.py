"""Plain readers of who is speaking, to set beside a latent: bag of words, a linear probe, random latents."""

from dataclasses import dataclass

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from personas import artifacts, diffing


@dataclass
class Readers:
    """Readers fitted on training documents; `score` gives each one's value per answer (higher: more the villain)."""

    words: object
    probe: object
    latent: int

    def score(self, answers: diffing.Answers) -> dict[str, np.ndarray]:
        """Returns reader -> (answers,)."""
        return {"bag of words": self.words.decision_function(answers.text),
                "linear probe": self.probe.decision_function(answers.residual.numpy()),
                "best of 20 random latents": answers.latents[:, self.latent].numpy()}


def fit(run: artifacts.Run, seed: int, documents: int = 600) -> Readers:
    """Fit on uncued documents of their own: villain against all others. The random latents are 20 of those that fire;
    the best of them is the one with the highest AUROC on these training documents."""
    read = artifacts.uncued_answers(run, "baselines", documents)
    villain = read.persona == "villain"
    alive = np.flatnonzero((read.latents > 0).any(0).numpy())
    some = np.random.default_rng(seed).choice(alive, 20, replace=False)
    return Readers(make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000)).fit(read.text, villain),
                   make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000, C=0.1)).fit(read.residual.numpy(), villain),
                   int(some[np.argmax(diffing.auroc(read.latents[:, some], villain))]))
