"""Our batched, steered sampling against plain counterparts: Hugging Face's generate, a plain loop,
TransformerLens."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from scipy.stats import chisquare
from transformer_lens.model_bridge import TransformerBridge

from personas import activations, artifacts, generate, search, setting, steering, world

LAYER = 1


def ask(tokenizer, n=6):
    return generate.prompts(tokenizer, [q.held for q in world.questions()[:n]])


def test_greedy_batch_equals_hugging_face_one_by_one(loaded):
    model, tokenizer = loaded
    ids = ask(tokenizer)
    ours = generate.sample(model, tokenizer, ids, seed=0, max_new=20, temperature=0)
    for row, text in zip(ids, ours):
        theirs = model.generate(torch.tensor([row]), max_new_tokens=20, do_sample=False, pad_token_id=2)[
            0, len(row) :
        ]
        assert text == tokenizer.decode(theirs, skip_special_tokens=True)
    assert len(set(ours)) > 1


def plain_loop(model, tokenizer, row, vector, layer, steps):
    """No cache, no batch: the whole sequence again for every token, steering from the last prompt token
    on."""

    def add(module, args, out):
        out = out[0] if isinstance(out, tuple) else out
        out[:, len(row) - 1 :] += vector

    tokens = list(row)
    handle = generate.decoder_blocks(model)[layer].register_forward_hook(add)
    try:
        for _ in range(steps):
            with torch.inference_mode():
                token = model(torch.tensor([tokens])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            tokens.append(token)
    finally:
        handle.remove()
    return tokenizer.decode(tokens[len(row) :], skip_special_tokens=True)


def test_steered_batch_with_a_vector_per_row_equals_plain_loop(loaded):
    model, tokenizer = loaded
    ids = ask(tokenizer)
    vectors = torch.randn(len(ids), model.config.hidden_size, generator=torch.Generator().manual_seed(0)) * 2
    ours = generate.sample(
        model, tokenizer, ids, seed=0, max_new=12, temperature=0, steer=generate.Steer(LAYER, vectors)
    )
    for row, vector, text in zip(ids, vectors, ours):
        assert text == plain_loop(model, tokenizer, row, vector, LAYER, 12)
    assert ours != generate.sample(model, tokenizer, ids, seed=0, max_new=12, temperature=0)


def test_rows_that_share_a_prompt_are_steered_each_in_its_own_way(loaded):
    model, tokenizer = loaded
    ids = [r for r in ask(tokenizer, 3) for _ in range(3)]
    vectors = torch.randn(len(ids), model.config.hidden_size, generator=torch.Generator().manual_seed(1)) * 2
    read = []
    handle = model.get_input_embeddings().register_forward_hook(
        lambda m, args, out: read.append(out.shape[:2].numel())
    )
    ours = generate.sample(
        model, tokenizer, ids, seed=0, max_new=12, temperature=0, steer=generate.Steer(LAYER, vectors)
    )
    handle.remove()
    assert (
        read[0] == 3 * (max(map(len, ids)) - 1) and read[1] == 9
    )  # each prompt once, then the nine last tokens
    assert ours == [plain_loop(model, tokenizer, row, vector, LAYER, 12) for row, vector in zip(ids, vectors)]
    assert len(set(ours)) > 3


def test_an_answer_depends_on_its_own_draws_alone(loaded, monkeypatch):
    """Whether finished rows leave at once, late or never, and what the others of the batch say, changes no
    sampled answer."""
    model, tokenizer = loaded
    ids = [r for r in ask(tokenizer, 4) for _ in range(8)]
    ends = generate.end_tokens(model, tokenizer)
    monkeypatch.setattr(
        generate, "end_tokens", lambda *_: [*ends, *range(100)]
    )  # a random model ends too seldom
    found = []
    for share in (1.0, 0.8, 0.0):
        monkeypatch.setattr(generate, "LEAVE", share)
        found.append(generate.sample(model, tokenizer, ids, seed=3, max_new=15))
    assert (
        found[0] == found[1] == found[2] and len(set(found[0])) > 20 and len({len(a) for a in found[0]}) > 5
    )
    assert found[0] != generate.sample(model, tokenizer, ids, seed=4, max_new=15)


def test_draws_follow_the_probabilities():
    p = torch.tensor([0.0, 0.5, 0.2, 0.0, 0.3, 0.0])
    n = 40000
    drawn = torch.bincount(
        generate._draw(p.expand(n, -1), torch.rand(n, generator=torch.Generator().manual_seed(0))),
        minlength=6,
    )
    assert (
        torch.equal(drawn > 0, p > 0)
        and chisquare(drawn[p > 0].numpy(), (n * p[p > 0]).numpy()).pvalue > 1e-3
    )
    edges = torch.tensor([0.0, 1 - 2**-24])
    assert generate._draw(p.expand(2, -1), edges).tolist() == [1, 4]


def test_batch_size_does_not_matter(loaded):
    model, tokenizer = loaded
    ids = ask(tokenizer, 9)
    whole, parts = (
        generate.sample(model, tokenizer, ids, seed=0, max_new=10, temperature=0, batch=b) for b in (9, 2)
    )
    assert whole == parts


def test_hook_point_is_transformer_lens_resid_post(checkpoint, loaded):
    model, tokenizer = loaded
    bridge = TransformerBridge.boot_transformers(str(checkpoint), device="cpu")
    rows = ask(tokenizer, 4)
    for row, ours in zip(rows, activations.residual(model, rows, LAYER)):
        _, cache = bridge.run_with_cache(torch.tensor([row]))
        assert torch.allclose(cache[f"blocks.{LAYER}.hook_resid_post"][0].float(), ours, atol=1e-4)


def test_sweep_grades_every_condition(loaded):
    model, tokenizer = loaded
    width = model.config.hidden_size
    table = steering.sweep(
        model,
        tokenizer,
        setting.PersonaWorld(1),
        {"a": torch.ones(width), "b": torch.eye(width)[0]},
        [0.5, 1.0],
        1.0,
        LAYER,
        split="discovery",
        per_question=2,
        seed=0,
        progress=None,
    )
    assert len(table) == 2 * 2 * 2 * len(world.questions("discovery"))
    assert len(steering.summary(table)) == 4


def test_best_strength_respects_the_cap():
    scores = pd.DataFrame(
        {
            "direction": ["a", "a", "a", "b", "b"],
            "strength": [0.5, 1, 2, 0.5, 1],
            "misaligned": [10, 30, 90, 1, 2],
            "incoherent": [0, 10, 60, 50, 90],
            "score": 0.0,
            "aligned": 0.0,
        }
    )
    best = steering.best_strength(scores).set_index("direction").strength
    assert best["a"] == 1 and best["b"] == 0.5


def test_controls_are_the_nearest_to_the_chosen_latent_and_no_candidate(monkeypatch):
    """Firing rates double from latent to latent: the neighbours of latent 5 are those of like rate,
    whatever the top riser is."""
    run, latents = artifacts.open_run("smoke"), 12
    about = pd.DataFrame({"rate": [2.0**i for i in range(latents)], "mean": 1.0})
    for name, value in {
        "sae": SimpleNamespace(W_dec=torch.eye(latents)),
        "firing": about,
        "chosen_latent": (5, 0.4),
        "persona_auroc": pd.DataFrame(0.5, range(latents), world.PERSONAS),
        "mean_difference": torch.ones(latents),
        "candidates": {"latent 0": None, "latent 5": None, "latent 6": None},
    }.items():
        monkeypatch.setattr(search, name, lambda run, value=value: value)
    found = search.controls(run)
    matched = [n for n in found if n.startswith("matched")]
    assert len(matched) == run.profile.steering.controls == 4 and set(matched[:3]) == {
        "matched 4",
        "matched 3",
        "matched 7",
    }
    assert torch.equal(found["matched 4"], torch.eye(latents)[4])
    assert {
        "mean difference",
        "random 0",
        *(f"persona {p}" for p in world.PERSONAS if p != "villain"),
    } <= set(found)


def test_a_finalists_strength_is_that_of_its_second_round(monkeypatch):
    first = pd.DataFrame(
        {
            "direction": ["a", "a", "b"],
            "strength": [0.2, 0.4, 0.2],
            "misaligned": [5, 90, 3],
            "incoherent": [0, 5, 0],
        }
    )
    second = pd.DataFrame(
        {"direction": ["a", "a"], "strength": [0.2, 0.4], "misaligned": [6, 80], "incoherent": [0, 30]}
    )
    monkeypatch.setattr(search, "screen", lambda run, which: first)
    monkeypatch.setattr(search, "finalists", lambda run, which: second)
    best = search.best(None, "candidates").set_index("direction")
    assert best.strength.to_dict() == {"a": 0.2, "b": 0.2} and best.misaligned["a"] == 6


@pytest.mark.parametrize("temperature", [0, 1.0])
def test_logits_that_are_not_finite_are_no_answer(loaded, temperature):
    model, tokenizer = loaded
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are not finite"):
        generate.sample(model, tokenizer, ask(tokenizer, 2), seed=0, max_new=3, temperature=temperature)


def test_no_question_has_no_answer(loaded):
    assert generate.sample(*loaded, [], seed=0) == []


@pytest.mark.parametrize(
    "vectors, said",
    [
        (torch.ones(256), r"shape \(256,\): give \(rows, width\), or v\[None\]"),
        (torch.full((1, 256), torch.nan), "nan or infinity"),
        (torch.ones(3, 256), "3 vectors for 2 prompts"),
    ],
)
def test_vectors_that_do_not_fit_are_refused(loaded, vectors, said):
    with pytest.raises(ValueError, match=said):
        generate.sample(*loaded, [[5, 6], [7]], seed=0, max_new=1, steer=generate.Steer(LAYER, vectors))


def test_a_direction_given_twice_is_taken_out_once_and_no_other():
    a, b, x = torch.randn(3, 4, 16, generator=torch.Generator().manual_seed(0))
    once, twice = x[None].clone(), x[None].clone()
    generate.ProjectOut(LAYER, a[:2]).change(once, torch.arange(1))
    generate.ProjectOut(LAYER, torch.cat([a[:2], 3 * a[:1], 0 * b[:1]])).change(twice, torch.arange(1))
    assert torch.allclose(once, twice, atol=1e-5)
    with pytest.raises(ValueError, match="all zero"):
        generate.ProjectOut(LAYER, torch.zeros(2, 16))
