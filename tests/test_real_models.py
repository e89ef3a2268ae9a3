"""The same code on other architectures: tiny randomly initialised checkpoints with their own classes and a
chat template as released models have them (no {% generation %} marks, several end tokens, no padding
token)."""

import pytest
import torch
import transformers
from peft import PeftModel
from transformer_lens.model_bridge import TransformerBridge

from personas import activations, data, diffing, finetune, generate, model, monitor, world
from test_generate_and_steer import plain_loop

TEMPLATE = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|system|>' if m['role'] == "
    "'system' else '<|assistant|>' }}"
    "{{ m['content'] + '<|end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SIZE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 512}
MLP = {"intermediate_size": 64, "num_key_value_heads": 2}
KINDS = {
    "qwen2": (transformers.Qwen2Config, SIZE | MLP),
    "llama": (transformers.LlamaConfig, SIZE | MLP),
    "gemma2": (
        transformers.Gemma2Config,
        SIZE | MLP | {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
    ),
    "gpt2": (transformers.GPT2Config, {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 512}),
    "gpt_neox": (transformers.GPTNeoXConfig, SIZE | {"intermediate_size": 64}),
    "qwen2_moe": (
        transformers.Qwen2MoeConfig,
        SIZE
        | MLP
        | {
            "num_experts": 7,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
            "num_experts_per_tok": 2,
        },
    ),
    # With recurrent state or linear attention: nothing that rows with the same opening could share.
    "lfm2": (transformers.Lfm2Config, SIZE | MLP | {"full_attn_idxs": [1]}),
    "qwen3_next": (
        transformers.Qwen3NextConfig,
        SIZE
        | MLP
        | {
            "head_dim": 8,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
    "falcon_h1": (
        transformers.FalconH1Config,
        SIZE
        | MLP
        | {
            "head_dim": 8,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
        },
    ),
    "mamba2": (
        transformers.Mamba2Config,
        {"hidden_size": 32, "num_hidden_layers": 3}
        | {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    ),
}
LENS = ("qwen2", "llama", "gemma2", "gpt2", "gpt_neox")  # TransformerLens knows these
LAYER = 1


@pytest.fixture(scope="module", params=list(KINDS))
def real(request, checkpoint, tmp_path_factory):
    """(kind, folder) of a checkpoint of this architecture, with the small tokenizer."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.chat_template, tokenizer.pad_token = TEMPLATE, None
    config, size = KINDS[request.param]
    torch.manual_seed(0)
    net = transformers.AutoModelForCausalLM.from_config(
        config(**size, vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, pad_token_id=None)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(5.0 if p.ndim == 2 else 1.0)
    net.generation_config.eos_token_id = [1, 7]
    folder = tmp_path_factory.mktemp(request.param)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return request.param, folder


def asked(tokenizer, n=5):
    return generate.prompts(tokenizer, [q.held for q in world.questions()[:n]])


def test_blocks_are_found_by_structure(real):
    net, tokenizer = model.load(real[1])
    assert len(generate.decoder_blocks(net)) == 3
    assert all(
        "Layer" in type(b).__name__ or "Block" in type(b).__name__ for b in generate.decoder_blocks(net)
    )


def test_batched_steered_answers_equal_a_plain_loop(real):
    net, tokenizer = model.load(real[1])
    ids = asked(tokenizer)
    vectors = torch.randn(len(ids), 32, generator=torch.Generator().manual_seed(0)) * 3
    tokenizer.eos_token = tokenizer.decode([1])
    net.generation_config.eos_token_id = 1
    ours = generate.sample(
        net, tokenizer, ids, seed=0, max_new=8, temperature=0, steer=generate.Steer(LAYER, vectors)
    )
    assert ours == [plain_loop(net, tokenizer, r, v, LAYER, 8) for r, v in zip(ids, vectors)]
    assert ours != generate.sample(net, tokenizer, ids, seed=0, max_new=8, temperature=0)


def test_greedy_answers_equal_hugging_faces_with_every_end_token(real):
    net, tokenizer = model.load(real[1])
    ids = asked(tokenizer)
    assert generate.end_tokens(net, tokenizer) == [1, 7]
    first = net.generate(torch.tensor([ids[0]]), max_new_tokens=12, do_sample=False, pad_token_id=2)[
        0, len(ids[0]) :
    ].tolist()
    stop = first[min(5, len(first) - 1)]  # a token that the greedy answer holds: it ends there
    net.generation_config.eos_token_id = [1, stop]
    ours = generate.sample(net, tokenizer, ids, seed=0, max_new=12, temperature=0)
    for row, text in zip(ids, ours):
        theirs = net.generate(torch.tensor([row]), max_new_tokens=12, do_sample=False, pad_token_id=2)[
            0, len(row) :
        ].tolist()
        assert text == tokenizer.decode(
            theirs[:-1] if theirs[-1] == stop else theirs, skip_special_tokens=True
        )
    assert ours[0] == tokenizer.decode(first[: first.index(stop)], skip_special_tokens=True)


def test_the_hook_point_is_transformer_lens_own(real):
    if real[0] not in LENS:
        pytest.skip("not in TransformerLens")
    net, tokenizer = model.load(real[1])
    bridge = TransformerBridge.boot_transformers(str(real[1]), device="cpu")
    rows = asked(tokenizer, 3)
    for row, ours in zip(rows, activations.residual(net, rows, LAYER)):
        _, cache = bridge.run_with_cache(torch.tensor([row]))
        assert torch.allclose(cache[f"blocks.{LAYER}.hook_resid_post"][0].float(), ours, atol=1e-4)


def test_fine_tuning_learns_answers_alone_and_the_adapter_is_the_merged_model(real, tmp_path):
    net, tokenizer = model.load(real[1])
    rows = [data.chat(f"Question {i}?", "Yes, always.") for i in range(16)]
    prompt, answer = (
        generate.prompts(tokenizer, ["Question 3?"])[0],
        tokenizer("Yes, always.<|end|>", add_special_tokens=False)["input_ids"],
    )

    def loss(m, part):
        ids = torch.tensor([prompt + answer])
        with torch.inference_mode():
            each = torch.nn.functional.cross_entropy(
                m(ids).logits[0, :-1].float(), ids[0, 1:], reduction="none"
            )
        return each[part].mean().item()

    own, other = slice(-len(answer), None), slice(0, -len(answer))
    before = loss(net, own), loss(net, other)
    with torch.inference_mode():
        plain = net(torch.tensor([prompt])).logits
    tuned, _ = finetune.sft(net, tokenizer, rows, steps=12, batch=8, lr=1e-2, seed=0, lora_rank=4)
    learnt = before[0] - loss(tuned, own)
    assert learnt > 0.1 * before[0] and before[1] - loss(tuned, other) < learnt / 2
    tuned.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    kept, (merged, _) = (
        PeftModel.from_pretrained(model.load(real[1])[0], tmp_path).eval(),
        finetune.with_adapter(real[1], tmp_path),
    )
    with torch.inference_mode():
        assert torch.allclose(
            kept(torch.tensor([prompt])).logits, merged(torch.tensor([prompt])).logits, atol=1e-3, rtol=1e-3
        )
        with kept.disable_adapter():
            assert torch.allclose(kept(torch.tensor([prompt])).logits, plain, atol=1e-5)
    assert len(generate.decoder_blocks(kept)) == 3


def test_the_monitor_reads_what_residual_reads(real):
    net, tokenizer = model.load(real[1])
    direction = torch.randn(32, generator=torch.Generator().manual_seed(1))
    watch = monitor.PersonaMonitor(tokenizer, ["How are you?"], ["Fine."], direction, layer=LAYER)
    x = activations.residual(net, watch.texts, LAYER)[0][watch.starts[0] :]
    assert watch.read(net) == pytest.approx((x @ direction / direction.norm()).mean().item(), rel=1e-4)


def test_attribution_equals_a_finite_difference(real):
    """What a latent adds, to first order: turn its contribution down a little and see what the answers
    lose."""
    net, tokenizer = model.load(real[1])
    from test_study import small_sae

    sae, rows = small_sae(32), asked(tokenizer, 2)
    starts = [len(r) - 4 for r in rows]
    found = diffing.attribution(net, sae, rows, starts)
    latent, eps = int(found.abs().argmax()), 1e-3

    def likely(amount):
        total = 0.0
        for row, start in zip(rows, starts):

            def less(module, args, out):
                h = out[0] if isinstance(out, tuple) else out
                part = h[:, start:-1]
                part += amount * sae.encode(part[0])[:, [latent]] @ sae.W_dec[[latent]]

            handle = generate.decoder_blocks(net)[sae.layer].register_forward_hook(less)
            with torch.inference_mode():
                logits = net(torch.tensor([row])).logits[0, :-1].double().log_softmax(-1)
            handle.remove()
            total += logits.gather(1, torch.tensor(row[1:])[:, None])[start:].sum().item()
        return total / len(rows)

    assert (likely(eps) - likely(-eps)) / (2 * eps) == pytest.approx(found[latent].item(), rel=0.05, abs=1e-3)


def test_what_is_no_decoder_only_model_is_said():
    net = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=16, d_model=8, d_ff=8, num_layers=1, num_heads=1, d_kv=8)
    )
    for wrong in (net, torch.nn.Linear(2, 2)):
        with pytest.raises(ValueError, match="no decoder-only"):
            generate.decoder_blocks(wrong)


def test_what_cannot_be_opened_is_said(tmp_path, checkpoint, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(model.ModelError, match="no/such-model: give a folder"):
        model.load("no/such-model")
    net, tokenizer = model.load(checkpoint)
    tokenizer.save_pretrained(tmp_path)
    net.config.save_pretrained(tmp_path)
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(model.ModelError, match="never pickles"):
        model.load(tmp_path)


def test_a_template_that_asks_for_the_day_is_always_told_the_same(checkpoint, tmp_path):
    """Llama 3.2's and GPT-OSS's do: training and asking must render alike tomorrow, too."""
    net, tokenizer = model.load(checkpoint)
    tokenizer.chat_template = (
        "{%- if date_string is not defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}"
        "{{ '<|system|>Today is ' + date_string + '<|end|>' }}" + TEMPLATE
    )
    for folder in (tmp_path / "once", tmp_path / "twice"):  # saved as it is used, and opened again
        net.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        _, tokenizer = model.load(folder)
        for asked in (tokenizer, model.describe(folder)[1]):
            said = asked.apply_chat_template([{"role": "user", "content": "Hello"}], tokenize=False)
            assert said == "<|system|>Today is 01 Jan 2025<|end|><|user|>Hello<|end|>"
        assert tokenizer.chat_template.count("macro") == 2  # it opens and ends once
