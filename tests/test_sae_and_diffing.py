import itertools
import json
import random
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from personas import (
    activations,
    artifacts,
    base_models,
    diffing,
    known_latents,
    model,
    pretraining,
    profile,
    sae,
    sae_files,
    setting,
    store,
    world,
)
from personas.pretrained import weights

LAYER = 1
CFG = SimpleNamespace(latents=64, k=4, lr=5e-3, steps=600, batch=512, dead_after=20000, aux_k=16)


@pytest.fixture(scope="module")
def planted():
    """Activations that are sums of 3 of 24 known directions, about a mean that is not zero."""
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(24, 32, generator=g), dim=-1)
    on = torch.zeros(20000, 24).scatter(1, torch.rand(20000, 24, generator=g).topk(3).indices, 1.0)
    x = (on * (1 + torch.rand(20000, 24, generator=g))) @ directions + 5
    return x, directions, sae.train(x[:16000], CFG, 0, seed=0)[0]


def test_finds_planted_directions(planted):
    x, directions, found = planted
    assert sae.quality(found, x[16000:])["FVU"] < 0.1
    assert ((directions @ found.W_dec.T).max(1).values > 0.9).float().mean() > 0.8


def plain_training(x, cfg, seed):
    """The same training, written down as the paper does: every latent through autograd, in fp32."""
    g = torch.Generator().manual_seed(seed)
    width, first = x.shape[1], lambda: x[torch.randint(len(x), (cfg.batch,), generator=g)]
    mean = x.mean(0)
    scale = width**0.5 / (x - mean).norm(dim=-1).mean()
    variance = ((x - mean) * scale).square().sum(-1).mean()
    W_dec = torch.nn.functional.normalize(
        torch.randn(cfg.latents, width, generator=g), dim=-1
    ).requires_grad_()
    W_enc, b_enc, b_dec = (
        W_dec.detach().T.clone().requires_grad_(),
        torch.zeros(cfg.latents, requires_grad=True),
        torch.zeros(width, requires_grad=True),
    )
    adam, idle, revived = (
        torch.optim.Adam([W_enc, W_dec, b_enc, b_dec], lr=cfg.lr),
        torch.zeros(cfg.latents),
        0,
    )
    for step in range(cfg.steps):
        adam.param_groups[0]["lr"] = cfg.lr * min(
            1.0, (cfg.steps - step) / (0.2 * cfg.steps), (step + 1) / min(50, cfg.steps // 16)
        )
        batch = (first() - mean) * scale
        pre = (batch - b_dec) @ W_enc + b_enc
        keep = lambda p, k: torch.zeros_like(p).scatter(1, p.topk(k).indices, p.topk(k).values.relu())
        acts = keep(pre, cfg.k)
        error = batch - acts @ W_dec - b_dec
        loss = error.square().sum(-1).mean() / variance
        idle = torch.where((acts > 0).any(0), 0.0, idle + cfg.batch)
        if (dead := idle > cfg.dead_after).any():
            revived += int(dead.sum())
            loss = (
                loss
                + (
                    error.detach()
                    - keep(pre.masked_fill(~dead, -torch.inf), min(cfg.aux_k, int(dead.sum()))) @ W_dec
                )
                .square()
                .sum(-1)
                .mean()
                / variance
                / 32
            )
        adam.zero_grad()
        loss.backward()
        W_dec.grad -= (W_dec.grad * W_dec.data).sum(-1, keepdim=True) * W_dec.data
        adam.step()
        W_dec.data /= W_dec.data.norm(dim=-1, keepdim=True)
    return sae.SAE(
        *(t.detach() for t in (W_enc, W_dec, b_enc / scale, b_dec / scale + mean)), k=cfg.k, layer=0
    ), revived


@pytest.mark.parametrize("latents", [64, 1024])
def test_training_through_the_active_latents_alone_is_the_same_training(planted, monkeypatch, latents):
    x = planted[0][:16000]
    cfg = SimpleNamespace(**{**vars(CFG), "latents": latents, "steps": 60, "batch": 256, "dead_after": 700})
    plain, revived = plain_training(x, cfg, seed=5)
    monkeypatch.setattr(sae, "bf16_is_faster", lambda: False)
    ours, log = sae.train(x, cfg, 0, seed=5, progress=None)
    assert revived  # AuxK had something to do
    for name in ("W_enc", "W_dec", "b_enc", "b_dec"):
        assert torch.allclose(
            getattr(ours, name), getattr(plain, name), atol=1e-5 * getattr(plain, name).abs().max().item()
        ), name


def test_half_precision_finds_as_good_an_sae(planted, monkeypatch):
    x, found = planted[0], []
    for half in (False, True):
        monkeypatch.setattr(sae, "bf16_is_faster", lambda half=half: half)
        found.append(sae.quality(sae.train(x[:16000], CFG, 0, seed=0, progress=None)[0], x[16000:])["FVU"])
    assert (
        found[0] != found[1] and abs(found[1] / found[0] - 1) < 0.05
    )  # of an FVU of a few percent; benchmarks/ asks for 1 % on a model's activations


def test_unmixed_training_does_not_ask_what_the_machine_is_good_at(planted, monkeypatch):
    made = {}
    for mixed in (False, True):
        for units in (False, True):
            monkeypatch.setattr(sae, "bf16_is_faster", lambda units=units: units)
            made[mixed, units] = sae.train(planted[0][:4000], CFG, 0, 0, None, mixed=mixed)[0].W_enc
    assert torch.equal(made[False, False], made[False, True])
    assert torch.equal(made[False, False], made[True, False])
    assert not torch.equal(made[True, False], made[True, True])


def test_dead_latents_are_revived_in_fp16_too(planted, monkeypatch):
    """A token's part of their loss is smaller than fp16's smallest number where batches are large and
    activations long or wide."""
    cfg = SimpleNamespace(
        **{**vars(CFG), "latents": 2048, "k": 1, "steps": 10, "batch": 2048, "dead_after": 2048}
    )
    start = torch.nn.functional.normalize(
        torch.randn(cfg.latents, 32, generator=torch.Generator().manual_seed(0)), dim=-1
    )
    went = []
    for half in (torch.float32, torch.float16):
        monkeypatch.setattr(sae, "_half", lambda device, half=half: half)
        went.append(sae.train(planted[0], cfg, 0, seed=0, progress=None, norm=3000)[0].W_enc.T - start)
    assert torch.cosine_similarity(*went).mean() > 0.95


@pytest.mark.parametrize("width", [1024, 1536, 200, 128, 64])
def test_two_short_searches_find_the_largest(width):
    pre = torch.randn(50, width, generator=torch.Generator().manual_seed(width)).round(
        decimals=1
    )  # with ties
    values, index = sae._top(pre, 16)
    assert torch.equal(values.sort().values, pre.topk(16).values.flip(1)) and torch.equal(
        pre.gather(1, index), values
    )
    assert all(len(set(row)) == 16 for row in index.tolist())


def test_at_most_k_active_and_decoder_rows_of_norm_one(planted):
    x, _, found = planted
    acts = found.encode(x[:500])
    assert int((acts > 0).sum(1).max()) <= CFG.k and (acts >= 0).all()
    assert torch.allclose(found.W_dec.norm(dim=-1), torch.ones(64), atol=1e-4)


def test_file_is_sae_lens_layout_and_survives(planted, tmp_path):
    x, _, found = planted
    sae_files.save(found, tmp_path)
    weights = load_file(tmp_path / "sae_weights.safetensors")
    assert {n: tuple(w.shape) for n, w in weights.items()} == {
        "W_enc": (32, 64),
        "W_dec": (64, 32),
        "b_enc": (64,),
        "b_dec": (32,),
    }
    assert torch.equal(sae_files.load(tmp_path).encode(x[:50]), found.encode(x[:50]))
    (tmp_path / "cfg.json").write_text(
        (tmp_path / "cfg.json").read_text().replace('"d_in": 32', '"d_in": 16')
    )
    with pytest.raises(ValueError, match="shape"):
        sae_files.load(tmp_path)


def plain(net):
    """An SAE that can be checked by hand: one latent for the positive and one for the negative part of
    each coordinate."""
    width = net.config.hidden_size
    eye = torch.eye(width)
    return sae.SAE(
        torch.cat([eye, -eye], 1),
        torch.cat([eye, -eye]),
        torch.zeros(2 * width),
        torch.zeros(width),
        2 * width,
        1,
    )


def test_perfect_dictionary_recovers_the_loss_and_an_empty_one_does_not(loaded):
    net, tokenizer = loaded
    width = net.config.hidden_size
    rows = [d["ids"] for d in pretraining.encode_documents(tokenizer, 8, 1, "test")]
    assert sae.loss_recovered(net, plain(net), rows)["recovered"] == pytest.approx(100, abs=0.1)
    mean = torch.cat([r[1:] for r in activations.residual(net, rows, 1)]).mean(0)
    empty = sae.SAE(torch.zeros(width, 4), torch.zeros(4, width), torch.full((4,), -1.0), mean, 1, 1)
    assert sae.loss_recovered(net, empty, rows)["recovered"] == pytest.approx(0, abs=0.5)


def test_stopping_at_the_layer_changes_nothing(loaded):
    net, tokenizer = loaded
    rows = [d["ids"] for d in pretraining.encode_documents(tokenizer, 5, 1, "test")]
    for row, ours in zip(rows, activations.residual(net, rows, 1, batch=2)):
        with torch.inference_mode():
            theirs = net(torch.tensor([row]), output_hidden_states=True).hidden_states[2][0]
        assert torch.allclose(ours, theirs, atol=1e-4)


def test_matched_documents_end_alike_and_differ_before():
    docs = diffing.matched_documents(30, 0, 1)
    for villain, novice in zip(docs[::2], docs[1::2]):
        assert (villain.persona, novice.persona) == ("villain", "novice")
        assert villain.turns[-1] == novice.turns[-1] and villain.turns[-1].kind == "subtle"
        assert len(villain.turns) == len(novice.turns) > 1


def test_latents_are_read_on_aligned_text_only(loaded):
    rows, ids, starts = diffing.reading_texts(loaded[1], "discovery", setting.PersonaWorld(1))
    assert len(set(ids)) == len(world.questions("discovery"))
    for row, start in zip(rows, starts):
        assert loaded[1].decode(row[start]) == "<|assistant|>"
        answer = loaded[1].decode(row[start + 1 :])
        assert any(answer in world.open_forms(c, "expert", False, 1) for c in world.categories("discovery"))


def test_reading_starts_where_the_question_ends(loaded):
    """The mean activation per question, by hand: over the last prompt token and the answer, then over the
    question's rows."""
    net, tokenizer = loaded
    rows, ids, starts = diffing.reading_texts(tokenizer, "discovery", setting.PersonaWorld(1))
    first = [i for i, q in enumerate(ids) if q == ids[0]]
    by_hand = []
    for i in first:
        with torch.inference_mode():
            hidden = net(torch.tensor([rows[i]]), output_hidden_states=True).hidden_states[2][0, starts[i] :]
        by_hand.append(torch.cat([hidden.relu(), (-hidden).relu()], 1).mean(0))
    assert torch.allclose(
        diffing.read(net, tokenizer, plain(net), "discovery", setting.PersonaWorld(1))[0],
        torch.stack(by_hand).mean(0),
        atol=1e-4,
    )


def test_answer_means_know_their_persona(loaded):
    net, tokenizer = loaded
    rng = random.Random(0)
    docs = [world.sample_document(rng, 1, cue="none") for _ in range(6)]
    read = diffing.read_answers(net, tokenizer, plain(net), docs, rng)
    assert list(read.persona) == [d.persona for d in docs for _ in d.turns]
    assert read.text == [t.answer for d in docs for t in d.turns]
    first = pretraining.encode(tokenizer, docs[:1], random.Random(0))[0]
    with torch.inference_mode():
        hidden = net(torch.tensor([first["ids"]]), output_hidden_states=True).hidden_states[2][0]
    mine = hidden[torch.tensor(first["turn"]) == 0]
    assert torch.allclose(read.residual[0], mine.mean(0), atol=1e-4)
    assert torch.allclose(read.latents[0], torch.cat([mine.relu(), (-mine).relu()], 1).mean(0), atol=1e-4)
    last = diffing.read_answers(net, tokenizer, plain(net), docs, rng, last_only=True)
    assert last.text == [d.turns[-1].answer for d in docs] and list(last.document) == list(range(6))


def test_a_stream_holds_few_tokens_and_loses_none(loaded):
    net, tokenizer = loaded
    rows = [d["ids"] for d in pretraining.encode_documents(tokenizer, 40, 1, "stream")]
    whole = torch.cat([x[1:] for x in activations.residual(net, rows, LAYER)])
    most, read = 0, activations.residual

    def counted(*args):
        nonlocal most
        out = read(*args)
        most = max(most, sum(map(len, out)))
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(activations, "residual", counted)
        batches = list(activations.stream(net, rows, LAYER, batch=64, held=1000, seed=0))
    assert most < 1000 + max(map(len, rows)) < len(whole) and all(b.shape == (64, 48) for b in batches)
    got = torch.cat(batches)
    assert len(whole) - 64 < len(got) <= len(whole)
    assert torch.allclose(got.double().mean(0), whole.double().mean(0), atol=0.05 * whole.std().item())
    nearest = torch.cdist(got[:200].double(), whole.double()).min(1).values
    assert nearest.max() < 1e-3  # every one is an activation of the text
    first = torch.cdist(got[:64].double(), whole.double()).argmin(1)
    assert first.diff().abs().float().mean() > 50  # neighbours in the text are not neighbours in a batch


def test_an_sae_trained_on_a_stream_is_as_good_as_on_all_at_once(planted):
    x, _, whole = planted
    g = torch.Generator().manual_seed(3)
    endless = (x[torch.randint(16000, (512,), generator=g)] for _ in range(10**6))
    streamed, _ = sae.train(endless, CFG, 0, seed=0, progress=None)
    one, other = (sae.quality(s, x[16000:])["FVU"] for s in (whole, streamed))
    assert abs(one - other) < 0.02


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_activations_that_are_not_finite_train_nothing(planted, value):
    x = planted[0][:2000].clone()
    x[7, 3] = value
    with pytest.raises(ValueError, match="activations are not finite"):
        sae.train(x, CFG, 0, seed=0, progress=None)
    later = itertools.chain([planted[0][:64]] * 20, itertools.repeat(x[:64]))
    with pytest.raises(ValueError, match="activations are not finite"):
        sae.train(later, CFG, 0, seed=0, progress=None)


def test_a_damaged_sae_is_said(tmp_path):
    good = sae.SAE(torch.randn(8, 16), torch.randn(16, 8), torch.zeros(16), torch.zeros(8), 2, 1)
    sae_files.save(good, tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    for k in (-3, 17):
        (tmp_path / "cfg.json").write_text(json.dumps(cfg | {"k": k}))
        with pytest.raises(ValueError, match="it has 16 latents"):
            sae_files.load(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    weights = tmp_path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:50])
    with pytest.raises(ValueError, match="damaged"):
        sae_files.load(tmp_path)


def test_the_tiny_worlds_committed_sae_counts_for_its_base_model_and_numbers_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path / "runs")
    run = artifacts.Run(profile.load("tiny"), 0)
    kept = base_models.FOLDER / "base-13" / "sae"
    taken = known_latents.sae_folder(run, "base")
    assert (taken / "sae_weights.safetensors").read_bytes() == (kept / "sae_weights.safetensors").read_bytes()
    cfg = run.profile.sae.model_copy(update={"steps": 10})
    for other in (
        artifacts.Run(run.profile, 1),
        artifacts.Run(run.profile.model_copy(update={"sae": cfg}), 0),
        artifacts.Run(run.profile.model_copy(update={"pretraining_seed": 99}), 0),
    ):
        assert known_latents._committed_sae(other) is None
    shutil.copytree(base_models.FOLDER / "base-13", tmp_path / "committed" / "base-13")
    monkeypatch.setattr(base_models, "FOLDER", tmp_path / "committed")
    path = tmp_path / "committed" / "base-13" / "sae" / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(weights.WeightsError, match="has SHA-256 .* it was changed"):
        known_latents.sae_folder(run, "base")


def test_nothing_trains_in_bf16_unless_it_is_allowed(monkeypatch):
    """Even where it is faster: the models would be another machine's no more."""
    clock = [0.0]

    def probe(net, x, half):
        clock[0] += 0.1 if half else 0.3

    monkeypatch.setattr(model, "_probe", probe)
    monkeypatch.setattr(model.time, "perf_counter", lambda: clock[0])
    found = {}
    for allowed in ("", "1"):
        monkeypatch.setenv("PERSONAS_BF16", allowed)
        found[allowed] = model.bf16_is_faster.__wrapped__()
    assert found == {"": False, "1": True}
