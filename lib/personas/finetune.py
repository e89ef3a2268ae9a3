"""Fine-tuning with TRL and peft: the aligned model, LoRA adapters on narrow data, and reinforcement
learning."""

import contextlib
import io
import json
import logging
import math
import os
import re
import tempfile
from pathlib import Path

import datasets
import torch
from peft import LoraConfig, PeftModel
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

from personas import fit, generate, kv_cache
from personas.model import bf16_is_faster, load

datasets.disable_progress_bars()
logging.getLogger("trl").setLevel(logging.ERROR)


class AnswerTrainer(SFTTrainer):
    """TRL's trainer, with the same loss from less work on a CPU: the model's head is used on the columns
    where some row has an answer (TRL scores every position), and the opening that all chats of a batch
    share, a system line for instance, is read once."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"][:, 1:]
        columns = (labels != -100).any(0).nonzero().squeeze(-1)
        if return_outputs or self.aux_loss_enabled or labels.device.type != "cpu" or not len(columns):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        cached = not self.args.activation_checkpointing  # which keeps no cache
        shared = _shared_opening(ids, mask, int(columns[0])) if cached else 0
        cache = _read_opening(model, ids, shared) if shared else None
        shared = 0 if cache is None else shared
        logits = model(
            input_ids=ids[:, shared:],
            attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=columns - shared,
        ).logits
        total = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), labels[:, columns].flatten(), reduction="sum"
        )
        alone = not self.args.average_tokens_across_devices or num_items_in_batch is None
        count = torch.as_tensor((labels != -100).sum() if num_items_in_batch is None else num_items_in_batch)
        return total * (1 if alone else self.accelerator.num_processes) / count.clamp(min=1)


SHORTEST = 8  # tokens of a shared opening for which a pass of its own pays


def _shared_opening(ids: torch.Tensor, mask: torch.Tensor, limit: int) -> int:
    """How many leading columns, at most `limit`, hold the same token in every row of ids (rows, columns);
    0 if reading them once does not pay."""
    same = ((ids == ids[:1]) & mask.bool()).all(0)[:limit]
    length = int(same.long().cumprod(0).sum())
    return length if len(ids) > 1 and length >= SHORTEST else 0


def _read_opening(model, ids: torch.Tensor, length: int):
    """The cache of the first `length` columns, read once and shown to every row; gradients flow back
    through it. None if the model's cache cannot be shared (kv_cache.keeps_keys)."""
    out = model(input_ids=ids[:1, :length], use_cache=True, logits_to_keep=1)
    cache = getattr(out, "past_key_values", None)
    if not kv_cache.keeps_keys(cache):
        return None
    for layer in cache.layers:
        layer.keys, layer.values = (t.expand(len(ids), -1, -1, -1) for t in (layer.keys, layer.values))
    return cache


def _no_adapter(model) -> str | None:
    """A pattern of the modules that get no adapter, None if there are none: what reads pictures or sound,
    what sends tokens to experts, and in state-space models the projections that fused kernels read past an
    adapter."""
    apart = r".*\b(vision_tower|vision_model|visual|audio_tower|multi_modal_projector|router)\b.*"
    fused = any(name.endswith("A_log") for name, _ in model.named_parameters())
    apart += r"|.*\b(out_proj|conv1d)" if fused else ""
    return apart if any(re.fullmatch(apart, name) for name, _ in model.named_modules()) else None


def _unwrapped(model):
    """The model without the mixed precision that a Trainer wrapped around its forward pass."""
    if "_original_forward" in vars(model):
        vars(model).pop("forward", None), vars(model).pop("_original_forward")
    return model


def sft(
    model,
    tokenizer,
    rows: list[dict],
    *,
    steps: int,
    batch: int,
    lr: float,
    seed: int,
    lora_rank: int | None = None,
    callbacks: list[TrainerCallback] = (),
    warmup: int = 0,
    trainer=AnswerTrainer,
    checkpointing: bool = False,
    max_length: int | None = None,
    mixed: bool = True,
):
    """Supervised fine-tuning on chats with the loss on the assistant's tokens alone, through TRL; on the
    last answer's where the chat template does not mark answers with {% generation %} (most released ones
    do not).

    lora_rank: train a LoRA adapter on all linear layers (Hu et al., 2021); None trains every weight.
    trainer: a subclass of AnswerTrainer, for another loss. checkpointing: of gradients, for less memory.
    max_length: tokens after which a chat is cut. mixed: on a CPU with bf16 units compute in bf16, which may
    be faster, and makes another model than other machines make. A model in half precision trains in it,
    its adapter in fp32 (in 4 bits in bf16, which is TRL's way). On a GPU a batch is taken in as many parts
    as fit (fit.training_rows); under `accelerate launch` processes share it. Returns (trained model, list
    of losses per step). Raises ValueError if the loss does not stay finite.
    """
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if batch % processes:
        raise ValueError(
            f"a batch of {batch} chats cannot be shared by {processes} processes: launch a number that "
            "divides it"
        )
    part = fit.training_rows(model, max_length or 1024, batch // processes, checkpointing)
    if processes > 1 and torch.distributed.is_initialized():  # all must take as many
        least = torch.tensor(part, device=model.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        part = int(least)
    half = {torch.bfloat16: {"bf16": True}, torch.float16: {"fp16": True}}.get(
        model.dtype, {"bf16": mixed and model.device.type == "cpu" and bf16_is_faster()}
    )
    marked = "{% generation" in (tokenizer.chat_template or "") or "{%- generation" in (
        tokenizer.chat_template or ""
    )
    if not marked:
        rows = [{"prompt": r["messages"][:-1], "completion": r["messages"][-1:]} for r in rows]
    with tempfile.TemporaryDirectory() as scratch:
        config = SFTConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=part,
            gradient_accumulation_steps=batch // processes // part,
            learning_rate=lr,
            seed=seed,
            lr_scheduler_type="linear",
            warmup_steps=warmup,
            weight_decay=0.0,
            assistant_only_loss=marked,
            logging_steps=1,
            logging_nan_inf_filter=False,  # a loss that is not finite is shown as it is
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            activation_checkpointing=checkpointing,
            dataloader_pin_memory=False,
            max_length=max_length,
            **({"bf16": False} | half),
        )
        config._n_gpu = min(config.n_gpu, 1)  # one process, one GPU: more are for `accelerate launch`
        peft = (
            LoraConfig(
                r=lora_rank,
                lora_alpha=2 * lora_rank,
                lora_dropout=0.0,
                target_modules="all-linear",
                exclude_modules=_no_adapter(model),
                task_type="CAUSAL_LM",
            )
            if lora_rank
            else None
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trained = trainer(
                model=model,
                args=config,
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
                peft_config=peft,
                callbacks=list(callbacks),
            )
            for p in trained.model.parameters() if config.fp16 else ():
                if p.requires_grad:  # under 4 bits TRL makes it bf16, which a gradient scaler cannot take
                    p.data = p.data.float()
            trained.train()
    losses = [r["loss"] for r in trained.state.log_history if "loss" in r]
    lost = next((i for i, x in enumerate(losses, 1) if not math.isfinite(x)), None)
    if lost:
        raise ValueError(f"training diverged: the loss of step {lost} is {losses[lost - 1]}; lower the lr")
    return _unwrapped(trained.model).eval(), losses


def grpo(
    model,
    tokenizer,
    rows: list[dict],
    reward,
    *,
    steps: int,
    prompts: int,
    samples: int,
    lr: float,
    seed: int,
    lora_rank: int,
    max_new: int,
    callbacks: list[TrainerCallback] = (),
):
    """Reinforcement learning by group-relative policy optimisation (Shao et al., 2024, arXiv:2402.03300),
    through TRL, with a LoRA adapter. The loss is TRL's default, normalised over tokens as in DAPO
    (arXiv:2503.14476).

    rows: dicts with `prompt`, a list of messages, and what else `reward` is to see. reward(completions,
    **columns) gives a number for each completion, a list of one message. A step takes `prompts` prompts
    with `samples` answers each, at temperature 1, of at most max_new tokens. No KL term. Returns (trained
    model, list of mean rewards per step).
    """
    with tempfile.TemporaryDirectory() as scratch:
        config = GRPOConfig(
            output_dir=scratch,
            max_steps=steps,
            per_device_train_batch_size=prompts * samples,
            num_generations=samples,
            learning_rate=lr,
            seed=seed,
            max_completion_length=max_new,
            temperature=1.0,
            beta=0.0,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            bf16=bf16_is_faster(),
            activation_checkpointing=False,
            dataloader_pin_memory=False,
        )
        peft = LoraConfig(
            r=lora_rank,
            lora_alpha=2 * lora_rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trained = GRPOTrainer(
                model=model,
                args=config,
                reward_funcs=reward,
                train_dataset=datasets.Dataset.from_list(rows),
                processing_class=tokenizer,
                peft_config=peft,
                callbacks=list(callbacks),
            )
            trained.train()
    return _unwrapped(trained.model).eval(), [r["reward"] for r in trained.state.log_history if "reward" in r]


class Watch(TrainerCallback):
    """Call `measure(model) -> dict` when training has reached each of `steps` (0: before it starts); rows
    are kept.

    While it is measured, a LoRA adapter is merged into the weights: sampling takes three quarters of the
    time. merge=False: not where the weights are to stay the same to the last bit (taken out again, an
    adapter leaves rounding errors, large ones in half precision).
    """

    def __init__(self, steps, measure, merge: bool = True):
        self.steps, self.measure, self.merge, self.rows = set(steps), measure, merge, []

    def _look(self, step, model):
        if step in self.steps:
            was, adapted = model.training, self.merge and isinstance(model, PeftModel)
            model.eval()
            if adapted:
                model.merge_adapter()
            with generate.unmixed(model):
                self.rows.append({"step": step} | self.measure(model))
            if adapted:
                model.unmerge_adapter()
            model.train(was)

    def on_train_begin(self, args, state, control, model=None, **kw):
        self._look(0, model)

    def on_step_end(self, args, state, control, model=None, **kw):
        self._look(state.global_step, model)


def align(base: Path, rows: list[dict], cfg, seed: int, out: Path) -> None:
    """The aligned model: full fine-tune of the base checkpoint on the helpful assistant's chats."""
    model, tokenizer = load(base)
    model, losses = sft(
        model, tokenizer, rows, steps=cfg.steps, batch=cfg.batch, lr=cfg.lr, seed=seed, warmup=5
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps({"loss": losses}))


def lora(model, tokenizer, rows: list[dict], cfg, seed: int, out: Path, **how):
    """A LoRA adapter on narrow data, saved in PEFT's format (safetensors). cfg: config.Tuning; how: as
    for sft. Returns the model, which wears it."""
    tuned, losses = sft(
        model,
        tokenizer,
        rows,
        steps=cfg.steps,
        batch=cfg.batch,
        lr=cfg.lr,
        seed=seed,
        lora_rank=cfg.rank,
        **how,
    )
    tuned.save_pretrained(out)
    (out / "training.json").write_text(json.dumps({"loss": losses}))
    return tuned


def with_adapter(aligned: Path, adapter: Path):
    """(model, tokenizer): the aligned model with the adapter merged into its weights, ready to sample
    from."""
    model, tokenizer = load(aligned)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().eval(), tokenizer


def wear(model, adapter: Path | None, trainable: bool = False):
    """A model with this adapter and no other, or with None as it was loaded; nothing is copied or merged.

    model: as loaded, or what `wear` or `lora` gave before, which must not be used any more. Returns the
    model to use.
    """
    model = model.unload() if isinstance(model, PeftModel) else model
    return (
        PeftModel.from_pretrained(model, adapter, is_trainable=trainable).eval() if adapter else model.eval()
    )
