"""Can bad training data be seen before anything is trained on it? The original model reads every answer."""

import numpy as np
import pandas as pd
import torch
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from personas import activations, generate, store, world
from personas.pretrained import likelihood, made, readings, search, sets, steering

READERS = ("causal latent", "difference of means", "persona vector", "probe", "surprise", "bag of words")
LONGEST = 100  # rows of each variant that are read of a released set


def rows(run: made.Run) -> pd.DataFrame:
    """Answers that the evaluation domains' training sets hold, a row each: domain, subject, variant (correct,
    subtle, obvious), and what each of READERS makes of it, higher being worse. Of this project's own sets all
    answers; of released ones LONGEST of each variant.

    The original model reads the answer after its question: mean activation of the causal latent, mean
    projections on `directions`; `surprise`: nats a token. `bag of words` is a classifier of obviously wrong
    against correct answers that learnt from the profile's other domains.
    """
    domains = [d.domain for d in run.profile.real.data if not made.discovery(run, d.domain)]
    block = run.profile.sae.layer
    asked = {d: _pairs(run, d) for d in run.profile.domains}

    def make(out):
        m, tok = made.original(run)
        mine = [(d, *pair) for d in domains for pair in asked[d]]
        prompts = generate.prompts(tok, [question for _, _, _, question, _ in mine])
        answers = [answer for *_, answer in mine]
        ids = [p + tok(a, add_special_tokens=False)["input_ids"] for p, a in zip(prompts, answers)]
        x = [h[len(p) :] for h, p in zip(activations.residual(m, ids, block), prompts)]
        mean = torch.stack([h.mean(0) for h in x])
        latent, sae = search.causal(run), readings.sae(run, block)
        likely = likelihood.log_probabilities(m, tok, prompts, [[a] for a in answers])
        found = pd.DataFrame(
            {
                "domain": [d for d, *_ in mine],
                "subject": [s for _, s, *_ in mine],
                "variant": [v for _, _, v, *_ in mine],
                "causal latent": [sae.encode(h)[:, latent].mean().item() for h in x],
                **{n: (mean @ (v / v.norm())).tolist() for n, v in directions(run, set(answers)).items()},
                "surprise": [-one[0] for one in likely],
            }
        )
        found["bag of words"] = np.concatenate([_words(asked, d) for d in domains])
        found.to_parquet(out / "rows.parquet", index=False)

    key = {
        "model": made.identity(run, made.ORIGINAL),
        "rows": store.key_of(asked),
        "domains": domains,
        "sae": readings.sae_identity(run, block),
        "latent": search.causal(run),
    }
    folder = run.keep("screening", "rows", key, (activations, likelihood, steering), make)
    return pd.read_parquet(folder / "rows.parquet")


def directions(run: made.Run, unseen: set[str]) -> dict[str, torch.Tensor]:
    """The directions of steering.rivals, each (width,), where the persona vector and the probe are made
    without any labelled answer that holds an `unseen` one: the labelled text draws on all domains."""
    read = steering.labelled(run)
    fresh = np.array([not any(a in text for a in unseen) for text in read["text"]])
    who, x = read["persona"][fresh], read["residual"][torch.from_numpy(fresh)]
    difference = steering.rivals(run)["difference of means"]
    return {"difference of means": difference} | steering.labelled_directions(x, who)


def _pairs(run: made.Run, domain: str) -> list[tuple[str, str, str, str]]:
    """(subject, variant, question, answer) of a domain's training answers."""
    named = made.named_sets(run, domain)
    if named is None:
        return [
            (s.ask, v, world.held_question(s), s.answers[v])
            for s in world.subjects_of(domain)
            for v in world.VARIANTS
        ]
    talk = lambda row: [m["content"] for m in row["messages"] if m["role"] != "system"][-2:]
    return [
        (str(i), v, *talk(row))
        for v in named
        for i, row in enumerate(sets.chats(domain, v, LONGEST, 0, named))
    ]


def _words(asked: dict, domain: str) -> np.ndarray:
    """Log-odds that each of a domain's answers is wrong, by a bag of words that learnt from the others."""
    others = [(v, a) for d, pairs in asked.items() if d != domain for _, v, _, a in pairs if v != "subtle"]
    if len({v for v, _ in others}) < 2:
        return np.zeros(len(asked[domain]))
    words = make_pipeline(CountVectorizer(), LogisticRegression(max_iter=1000))
    words.fit([a for _, a in others], [v == "obvious" for v, _ in others])
    return words.decision_function([a for *_, a in asked[domain]])


def flagged(table: pd.DataFrame, reader: str, variant: str, percent: float, draws: int = 200) -> dict:
    """Sets of 100 rows with `percent` of a wrong variant among correct ones, drawn `draws` times within each
    domain; as many rows are flagged as are wrong, those that read highest. Returns `caught`: percent of the
    wrong ones that are flagged (here precision and recall are the same), with the 2.5 and 97.5 percentiles
    of draws, and `chance`."""
    rng, found, k = np.random.default_rng(0), [], round(percent)
    for _, g in table.groupby("domain"):
        good, bad = (g[g.variant == v][reader].to_numpy() for v in ("correct", variant))
        if not len(good) or not len(bad):
            continue
        for _ in range(draws):
            values = np.r_[rng.choice(bad, k), rng.choice(good, 100 - k)]
            values = values + rng.normal(0, 1e-9, 100)  # ties are broken at random
            found.append(100 * (np.argsort(-values)[:k] < k).mean())
    low, high = np.percentile(found, [2.5, 97.5]) if found else (float("nan"),) * 2
    return {"caught": float(np.mean(found)), "low": low, "high": high, "chance": percent}
