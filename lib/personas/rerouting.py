"""Does a blocked persona find another way? Longer training under the latent penalty, then a look with what
was never penalised: a fresh probe after every block and a fresh SAE, both made on the fine-tuned model
itself."""

import random
from dataclasses import replace

import numpy as np
import torch

from personas import (
    activations,
    artifacts,
    baselines,
    data,
    diffing,
    evaluate,
    generate,
    known_latents,
    pretraining,
    prevention,
    search,
    stats,
    world,
)
from personas import sae as saes

# at which directions are subtracted, in units of strength; what discovery data chose for the chosen latent
# (cures.cure_doses)
DOSE = 0.3


def rerouted(
    run: artifacts.Run, ruler: artifacts.Run, domain: str, guard: str, dose: float, length: int
) -> dict:
    """Fine-tune on obviously wrong advice under a guard (prevention.planned) for `length` times the
    profile's steps.

    Values and task: score with its interval, classes of answers, `learnt` (percent of the domain's
    questions answered as trained). Tuned minus aligned model on the evaluation questions' fixed text:
    `penalised`, the ten penalised latents together (mean activation); `old probe`, the villain's log-odds
    by a probe fitted on the aligned model; `probe 0` and so on, by probes fitted on this very model after
    each block; `fresh`, the rise of the fresh SAE's latent that marks the villain best, with `fresh auroc`
    on held-out answers. Score after subtracting a direction, found on the discovery questions' text: `less
    penalised`, the penalised latents by their rise here; `less fresh`, the fresh SAE's ten that rise most
    here; `less difference`, this model's own difference of means. `inside`: percent of that difference's
    squared norm in the span of the penalised directions.
    """
    p = run.profile
    if guard not in ("none", "latent penalty", "KL", "steering in training"):
        raise ValueError(f"{guard!r} changes the training set or its length, which are set here")
    plan = prevention.planned(run, ruler, domain, "obvious", guard, dose)
    plan = replace(
        plan,
        rows=data.advice_chats(domain, "obvious", length * len(plan.rows), run.seed),
        steps=length * plan.steps,
    )
    tuned, tokenizer = prevention.trained(run, plan)
    aligned, layer, blocks = artifacts.aligned_model(run)[0], p.sae.layer, range(p.model.layers)

    def ask(per_question, steer=None):
        return evaluate.ask_open(
            tuned,
            tokenizer,
            run.setting,
            split="evaluation",
            per_question=per_question,
            seed=run.seed,
            steer=steer,
        )

    answers, own = (
        ask(p.evaluation.study_per_question),
        evaluate.ask_advice(tuned, tokenizer, run.setting, domains=[domain], seed=run.seed),
    )
    found = evaluate.values(answers) | {"learnt": evaluate.share(own, "obvious")}

    old, fresh = known_latents.sae(ruler), fresh_sae(tuned, run)
    penalised = search.rankings(ruler)["Δ-activation"]
    texts = {
        split: diffing.reading_texts(tokenizer, split, run.setting) for split in ("discovery", "evaluation")
    }

    def on(model, split, block=layer):
        rows, _, starts = texts[split]
        return torch.cat([x[i:] for x, i in zip(activations.residual(model, rows, block), starts)])

    def rise(reader, split):
        return reader.encode(on(tuned, split)).mean(0) - reader.encode(on(aligned, split)).mean(0)

    def moved(probe, block):
        return float(
            np.subtract(
                *(
                    probe.decision_function(on(m, "evaluation", block).mean(0)[None].numpy())[0]
                    for m in (tuned, aligned)
                )
            )
        )

    found |= {
        "penalised": rise(old, "evaluation")[penalised].sum().item(),
        "old probe": moved(probe(aligned, tokenizer, run, layer), layer),
    }
    found |= {f"probe {i}": moved(probe(tuned, tokenizer, run, i), i) for i in blocks}
    train, test = (
        _labelled(tuned, tokenizer, run, stream, layer, fresh) for stream in ("baselines", "auroc-evaluation")
    )
    marker = int(stats.auroc(*train).argmax())
    found |= {
        "fresh": rise(fresh, "evaluation")[marker].item(),
        "fresh auroc": float(stats.auroc(*test)[marker]),
    }

    difference = on(tuned, "discovery").mean(0) - on(aligned, "discovery").mean(0)
    basis = torch.linalg.qr(old.W_dec[penalised].T)[0]
    found["inside"] = 100 * ((difference @ basis).norm() / difference.norm()).square().item()
    top = rise(fresh, "discovery").topk(10)
    ways = {
        "penalised": rise(old, "discovery")[penalised].relu() @ old.W_dec[penalised],
        "fresh": top.values @ fresh.W_dec[top.indices],
        "difference": difference,
    }
    for name, v in ways.items():
        steer = generate.Steer(
            layer, (-DOSE * known_latents.unit(ruler) * v / v.norm().clamp(min=1e-9))[None]
        )
        found[f"less {name}"] = evaluate.score(ask(p.evaluation.curve_per_question, steer))
    return found


def fresh_sae(model, run: artifacts.Run) -> saes.SAE:
    """A new SAE of the profile's shape on this model's activations, over the text that the profile's own
    SAE was trained on."""
    cfg = run.profile.sae
    rows = [d["ids"] for d in known_latents.held_out_documents(run, cfg.documents, "sae")]
    x = torch.cat([r[1:] for r in activations.residual(model, rows, cfg.layer)])
    return saes.train(x, cfg, cfg.layer, run.seed, None)[0]


def probe(model, tokenizer, run: artifacts.Run, block: int):
    """Logistic regression for the villain on this model's mean activations, after `block`, over the
    answers of uncued documents."""
    return baselines.linear_probe(*_labelled(model, tokenizer, run, "baselines", block))


def _labelled(model, tokenizer, run, stream, block, reader=None):
    """(values, villain): per answer of uncued documents its mean activation (of the reader's latents, if
    given), and whose it is."""
    rng = random.Random(f"{run.world_seed}/{stream}")
    docs = [world.sample_document(rng, run.world_seed, cue="none") for _ in range(500)]
    coded, values, villain = pretraining.encode(tokenizer, docs, rng), [], []
    for c, h in zip(coded, activations.residual(model, [c["ids"] for c in coded], block)):
        h, turn = reader.encode(h) if reader else h, torch.tensor(c["turn"])
        values += [h[turn == t].mean(0) for t in range(len(c["doc"].turns))]
        villain += [c["doc"].persona == "villain"] * len(c["doc"].turns)
    return torch.stack(values).numpy(), np.array(villain)
