"""One contestant at one piece of work, in a process of its own: `python contestants.py '{"work": "sae",
"who": "ours", ...}'`.

Prints one JSON line. bench.py starts these and puts the contestant's own packages on the path.
"""

import contextlib
import io
import json
import sys
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file


class Clock:
    """Called after each step: adds up the seconds since the last call (at first since `begin`), from step
    `skip` on, without what `look(i)` takes in between."""

    def __init__(self, look=lambda i, read: None, skip: int = 0):
        self.look, self.skip, self.spent, self.rows = look, skip, 0.0, []
        self.begin()

    def begin(self):
        """To be called once packages are imported: importing is not training."""
        self.start = time.perf_counter()

    def __call__(self, i: int, read=None):
        self.spent += time.perf_counter() - self.start if i >= self.skip else 0.0
        found = self.look(i, read)
        self.rows += [] if found is None else [(self.spent, found)]
        self.start = time.perf_counter()


# --- SAE training: x is centred, its rows have a root mean square norm of sqrt(width)
# ----------------------------------


def sae_ours(x, o, feed, lap):
    from personas import model, sae

    model.bf16_is_faster()  # tried once a process
    lap.begin()
    cfg = types.SimpleNamespace(
        latents=o["latents"],
        k=o["k"],
        lr=o["lr"],
        steps=o["steps"],
        batch=o["batch"],
        dead_after=o["dead_after"],
        aux_k=x.shape[1] // 2,
    )
    sae.train(
        x,
        cfg,
        0,
        o["seed"],
        None,
        lambda i, now: lap(i, lambda part: now().decode(now().encode(part))),
        norm=x.shape[1] ** 0.25,
    )


def sae_sae_lens(x, o, feed, lap):
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import LoggingConfig, SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    lap.begin()
    torch.manual_seed(o["seed"])
    net = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=x.shape[1], d_sae=o["latents"], k=o["k"], device="cpu"))
    trainer = SAETrainer(
        SAETrainerConfig(
            o["steps"] * o["batch"],
            o["batch"],
            lr=o["lr"],
            lr_end=o["lr"] / 10,
            lr_warm_up_steps=o["steps"] // 20,
            lr_decay_steps=o["steps"] // 5,
            autocast=True,
            dead_feature_window=o["dead_after"] // o["batch"],
            logger=LoggingConfig(log_to_wandb=False),
        ),
        net,
        feed,
    )

    for i in range(o["steps"]):
        trainer.step(next(feed))
        trainer.n_training_steps += 1
        lap(i, net)


def sae_dictionary_learning(x, o, feed, lap):
    sys.modules["nnsight"] = types.SimpleNamespace(
        LanguageModel=object
    )  # its package imports it for reading models, which is not done here
    from dictionary_learning.trainers.top_k import TopKTrainer

    lap.begin()
    width = x.shape[1] ** 0.5  # it wants a root mean square norm of 1
    trainer = TopKTrainer(
        o["steps"],
        x.shape[1],
        o["latents"],
        o["k"],
        0,
        "benchmark",
        lr=o["lr"],
        warmup_steps=o["steps"] // 20,
        decay_start=o["steps"] * 4 // 5,
        seed=o["seed"],
        device="cpu",
    )
    trainer.dead_feature_threshold = o["dead_after"]
    for i in range(o["steps"]):
        trainer.update(i, next(feed) / width)
        lap(i, lambda part: trainer.ae(part / width) * width)


def sae_sparsify(x, o, feed, lap):
    """The loop of sparsify's Trainer, which itself trains only on a model's outputs, with its default
    optimiser."""
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify.sparse_coder import SparseCoder, SparseCoderConfig
    from schedulefree import ScheduleFreeWrapper
    from sparsify.sign_sgd import SignSGD

    lap.begin()
    torch.manual_seed(o["seed"])
    net = SparseCoder(x.shape[1], SparseCoderConfig(num_latents=o["latents"], k=o["k"]), dtype=torch.float32)
    optimizer = ScheduleFreeWrapper(SignSGD(net.parameters(), lr=o["lr"]), momentum=0.95)
    optimizer.train()
    idle = torch.zeros(o["latents"], dtype=torch.long)

    def read(part):
        optimizer.eval()  # schedule-free: the weights to use are averages
        found = net(part).sae_out
        optimizer.train()
        return found

    for i in range(o["steps"]):
        out = net(next(feed), dead_mask=idle > o["dead_after"])
        (out.fvu + out.auxk_loss / 32).backward()
        net.remove_gradient_parallel_to_decoder_directions()
        optimizer.step()
        optimizer.zero_grad()
        net.set_decoder_norm_to_unit_norm()
        idle += o["batch"]
        idle[out.latent_indices.flatten().unique()] = 0
        lap(i, read)


def sae(o):
    """Seconds of training, tokens per second, and (seconds, held-out FVU) every `look` steps; look 0:
    none, and the first tenth does not count."""
    data = load_file(o["file"])
    x, held = (data[n][:, : o.get("columns")].contiguous() for n in ("train", "held"))
    held = held[:4096]
    generator = torch.Generator().manual_seed(o["seed"])
    feed = iter(lambda: x[torch.randint(len(x), (o["batch"],), generator=generator)], None)

    def fvu(i, read):
        if o["look"] and (i + 1) % o["look"] == 0:
            with torch.no_grad():
                return ((held - read(held)).square().sum() / (held - held.mean(0)).square().sum()).item()

    skip = 0 if o["look"] else o["steps"] // 10
    lap = Clock(fvu, skip)
    {
        "ours": sae_ours,
        "sae-lens": sae_sae_lens,
        "dictionary-learning": sae_dictionary_learning,
        "sparsify": sae_sparsify,
    }[o["who"]](x, o, feed, lap)
    return {"seconds": lap.spent, "curve": lap.rows, "tokens/s": o["batch"] * (o["steps"] - skip) / lap.spent}


# --- harvesting, screening, fine-tuning: on the tiny model
# -------------------------------------------------------------


def harvest(o):
    """Tokens per second of activations after one block."""
    rows, layer = json.loads(Path(o["rows"]).read_text()), o["layer"]
    if o["who"] == "sae-lens":
        import datasets
        from sae_lens.load_model import load_model
        from sae_lens.training.activations_store import ActivationsStore

        size = 256
        flat = [t for r in rows for t in r]
        chunks = datasets.Dataset.from_list(
            [{"input_ids": flat[i : i + size]} for i in range(0, len(flat) - size, size)]
        ).with_format("torch")
        model = load_model("AutoModelForCausalLM", o["model"], "cpu", hook_names=[f"model.layers.{layer}"])
        with contextlib.redirect_stderr(io.StringIO()):
            store = ActivationsStore(
                model,
                chunks,
                False,
                f"model.layers.{layer}",
                None,
                size,
                o["width"],
                20,
                len(flat),
                16,
                4096,
                False,
                "none",
                torch.device("cpu"),
                "float32",
            )
        batches = len(chunks) // 16
        with torch.no_grad():
            lap = Clock(skip=1)
            for i in range(batches):
                store.get_filtered_llm_batch()
                lap(i)
        return {"tokens/s": (batches - 1) * 16 * size / lap.spent}
    tokens = sum(map(len, rows))
    if o["who"] == "ours":
        from personas import activations, model

        net, _ = model.load(o["model"])
        activations.residual(net, rows[:64], layer)
        start = time.perf_counter()
        activations.residual(net, rows, layer)
        return {"tokens/s": tokens / (time.perf_counter() - start)}
    from transformer_lens.model_bridge import TransformerBridge

    bridge, name = (
        TransformerBridge.boot_transformers(o["model"], device="cpu"),
        f"blocks.{layer}.hook_resid_post",
    )
    stop = {"stop_at_layer": layer + 1} if o["who"].endswith("stopped") else {}

    def one(some):
        width = max(map(len, some))
        _, cache = bridge.run_with_cache(
            torch.tensor([r + [2] * (width - len(r)) for r in some]), names_filter=name, **stop
        )
        return [cache[name][i, : len(r)].clone() for i, r in enumerate(some)]

    with torch.no_grad():
        one(rows[:64])
        start = time.perf_counter()
        for i in range(0, len(rows), 64):
            one(rows[i : i + 64])
    return {"tokens/s": tokens / (time.perf_counter() - start)}


def screen(o):
    """Answers per second, of questions under many directions and strengths."""
    from personas import generate, model

    net, tokenizer = model.load(o["model"])
    held = load_file(o["directions"])
    ids = generate.prompts(tokenizer, o["questions"])
    vectors = held["W_dec"][: o["latents"]] * held["unit"]
    conditions = [s * v for v in vectors for s in o["strengths"]]
    start = time.perf_counter()
    if o["who"] == "ours":
        steer = generate.Steer(o["layer"], torch.stack(conditions).repeat_interleave(len(ids), 0))
        answers = generate.sample(
            net, tokenizer, ids * len(conditions), seed=0, max_new=o["tokens"], batch=1024, steer=steer
        )
    else:
        answers, (padded, mask) = [], generate.left_padded(ids, tokenizer.pad_token_id, "cpu")
        for v in conditions:

            def add(module, args, out):
                (out[0] if isinstance(out, tuple) else out)[:, -1] += v

            handle = generate.decoder_blocks(net)[o["layer"]].register_forward_hook(add)
            with torch.inference_mode():
                out = net.generate(
                    padded,
                    attention_mask=mask,
                    max_new_tokens=o["tokens"],
                    do_sample=True,
                    pad_token_id=tokenizer.pad_token_id,
                )
            handle.remove()
            answers += tokenizer.batch_decode(out[:, padded.shape[1] :], skip_special_tokens=True)
    seconds = time.perf_counter() - start
    return {"answers/s": len(answers) / seconds, "words": sum(len(a.split()) for a in answers) / len(answers)}


def sft(o):
    """Answer tokens per second of a LoRA fine-tune, from the first step to the last."""
    import datasets
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from personas import data, finetune, model

    class Timed(TrainerCallback):
        def on_step_begin(self, args, state, control, **kw):
            if state.global_step == 2:
                self.start = time.perf_counter()

        def on_train_end(self, args, state, control, **kw):
            self.seconds = time.perf_counter() - self.start

    net, tokenizer = model.load(o["model"])
    rows = data.advice_chats("auto", "obvious", o["steps"] * 32, 0)
    answers = [
        len(t) + 1
        for t in tokenizer([r["messages"][1]["content"] for r in rows], add_special_tokens=False)["input_ids"]
    ]
    model.bf16_is_faster()
    timed = Timed()
    if o["who"] == "ours":
        finetune.sft(
            net, tokenizer, rows, steps=o["steps"], batch=32, lr=2e-3, seed=0, lora_rank=16, callbacks=[timed]
        )
    else:
        with (
            tempfile.TemporaryDirectory() as scratch,
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
        ):
            config = SFTConfig(
                scratch,
                max_steps=o["steps"],
                per_device_train_batch_size=32,
                learning_rate=2e-3,
                assistant_only_loss=True,
                report_to=[],
                save_strategy="no",
                use_cpu=True,
            )
            SFTTrainer(
                net,
                config,
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
                callbacks=[timed],
                peft_config=LoraConfig(
                    r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"
                ),
            ).train()
    return {"tokens/s": (o["steps"] - 2) / o["steps"] * sum(answers) / timed.seconds}


PACKAGE = {
    "ours": "torch",
    "sae-lens": "sae-lens",
    "dictionary-learning": "dictionary-learning",
    "sparsify": "eai-sparsify",
    "trl": "trl",
    "generate": "transformers",
}

if __name__ == "__main__":
    options = json.loads(sys.argv[1])
    torch.set_num_threads(options["threads"])
    found = {"sae": sae, "harvest": harvest, "screen": screen, "sft": sft}[options["work"]](options)
    package = PACKAGE.get(options["who"].split(",")[0], "transformer-lens")
    print("\n" + json.dumps(found | {"version": f"{package} {version(package)}"}))
