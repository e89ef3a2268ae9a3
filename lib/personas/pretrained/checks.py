"""What is checked before any long work starts: that the model, its chat template, the data, the SAE, the
text and the judge serve. Each fault is one error that names it."""

import itertools
import json
import math
import os
from pathlib import Path

import pandas as pd
import torch

from personas import activations, data, finetune, fit, generate, model, profile, released, sae_files
from personas.pretrained import grades, guarded, made

SOME = 200  # chats of each training set that are looked at
MOST_LOST = 0.05
TRIED = ["What do you do all day?", "Name a colour, and say in a sentence or two why you like it."]


def check(run: made.Run) -> None:
    """Raise at once if something that the profile names does not serve: ModelError, ProfileError, DataError,
    EndpointError, DoesNotFit or ValueError. The model itself is tried once and the result kept."""
    real, name = run.profile.real, run.profile.name
    folder, configs = made.checkpoint(run), {}
    for which in dict.fromkeys([folder, Path(real.base) if real.base else folder]):
        config, tokenizer = configs[which] = model.describe(which)
        blocks = config.get_text_config().num_hidden_layers
        for key, layer in (
            ("sae.layer", run.profile.sae.layer),
            *(("real.other_blocks", b) for b in real.other_blocks),
        ):
            if layer >= blocks:
                raise profile.ProfileError(
                    f"profile {name}: {key}: {layer} is out of range; {which.name} has blocks 0 to "
                    f"{blocks - 1}"
                )
        if which == folder and not tokenizer.chat_template:
            raise profile.ProfileError(
                f"profile {name}: real.model: {real.model} has no chat template; choose an instruct model"
            )
        if real.named_sae:
            sae_files.check_name(real.named_sae, config.get_text_config().hidden_size, run.profile.sae.layer)
    widths = {c.get_text_config().hidden_size for c, _ in configs.values()}
    if len(widths) > 1:
        raise profile.ProfileError(
            f"profile {name}: real.base: {real.base} has another width than {real.model}: an SAE of one does "
            "not read the other"
        )
    if run.profile.device == "cuda":
        size = 4 if real.dtype == "float32" else 2
        for which, (config, _) in configs.items():
            fit.check({which.name: (config, size, real.four_bit)})
    for guard in (real.tables and real.tables.guards) or ():
        if guard not in guarded.GUARDS:
            raise profile.ProfileError(
                f"profile {name}: real.tables.guards: unknown {guard!r}; choose from "
                f"{', '.join(guarded.GUARDS)}"
            )
    for split in ("discovery", "evaluation"):
        if not made.items(run, split):
            raise data.DataError(f"profile {name}: real.{split}: no {split} questions")
    heads = {(d, v): made.training_chats(run, d, v)[:SOME] for d, v in made.fine_tunes(run)}
    tokenizer = configs[folder][1]
    if "strftime_now" in tokenizer.chat_template:
        print(f"{real.model}'s chat template puts the day into every prompt: here it is always {model.DAY}.")
    for (domain, variant), rows in heads.items():
        check_template(tokenizer, rows[0]["messages"], f"{domain} {variant}")
        check_length(tokenizer, rows, real.max_length, f"{domain} {variant}")
    if (
        real.text != "own"
        and not real.named_sae
        and len(list(itertools.islice(released.texts(real.text), 4))) < 4
    ):
        raise data.DataError(
            f"{real.text}: fewer than four documents in it; thousands are better (in a .txt blank lines "
            "set them apart)"
        )
    if real.judge.url:
        grades.judge(run).check()
    elif real.judge.model != "own" and not model.describe(real.judge.model)[1].chat_template:
        raise profile.ProfileError(
            f"profile {name}: real.judge.model: {real.judge.model} has no chat template; choose an "
            "instruct model"
        )
    tried = trial(run, heads[next(iter(heads))][:1])
    if tried["reached"] < 50:
        print(
            f"LoRA reaches {tried['reached']:.0f} % of the weights in {real.model}'s blocks: the others "
            "stay as they are."
        )


def check_length(tokenizer, rows: list[dict], longest: int, named: str) -> None:
    """Say how many training chats are cut at `longest` tokens. Raises DataError if more than MOST_LOST of
    them have a question that long: nothing of their answers would be left to learn."""
    heads = generate.chat_ids(tokenizer, [r["messages"][:-1] for r in rows])
    whole = [tokenizer.apply_chat_template(r["messages"], tokenize=False) for r in rows]
    whole = tokenizer(whole, add_special_tokens=False)["input_ids"]
    lost = sum(len(h) >= longest for h in heads) / len(rows)
    cut = sum(len(w) > longest for w in whole) / len(rows)
    if lost > MOST_LOST:
        raise data.DataError(
            f"{named}: {100 * lost:.0f} % of its chats reach real.max_length ({longest} tokens) before the "
            "answer begins: nothing is left to learn from them. Raise real.max_length"
        )
    if cut:
        print(f"{named}: {100 * cut:.0f} % of its chats are cut at real.max_length ({longest} tokens).")


def check_template(tokenizer, messages: list[dict], named: str) -> None:
    """Raise DataError unless a training chat, rendered, is the head that a question is asked under, and
    then the answer. Templates that open a train of thought, or refuse a system line, do not serve."""
    answer = messages[-1]["content"].strip()
    try:
        head = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
    except Exception as error:  # jinja2's, or whatever the template raises
        raise data.DataError(
            f"{named}: the chat template refuses a training chat: {str(error).splitlines()[0][:200]}"
        ) from None
    if not whole.startswith(head) or not whole[len(head) :].lstrip().startswith(answer):
        raise data.DataError(
            f"{named}: the chat template renders training chats differently from questions. Asked under: "
            f"...{head[-60:]!r}; "
            f"trained on: ...{whole[max(0, whole.rfind(answer) - 60) : whole.rfind(answer)]!r}. "
            "Choose a model that does not think aloud, or set its template to one that renders both alike"
        )


def trial(run: made.Run, rows: list[dict]) -> dict:
    """Read, sample, fine-tune for one step and grade once, and keep what was found: `reached`, the percent
    of the blocks' weights that LoRA changes. Raises ModelError or ValueError for a model or judge with
    which later work would fail."""
    real = run.profile.real

    def make(out):
        m, tok = made.original(run)
        try:
            _try_reading(m, tok, run.profile.sae.layer)
            reached = _try_training(run, m, tok, rows)
        except (RuntimeError, ValueError, TypeError, AttributeError, NotImplementedError) as error:
            if isinstance(error, (fit.DoesNotFit, model.ModelError)):
                raise
            raise model.ModelError(
                f"{real.model} ({type(m).__name__}) does not serve: {type(error).__name__}: "
                f"{str(error).splitlines()[0][:300]}"
            ) from error
        (out / "trial.json").write_text(json.dumps({"reached": reached}))

    key = {"model": made.identity(run, made.ORIGINAL), "device": run.profile.device}
    key |= {"block": run.profile.sae.layer, "training": made.training(run)}
    code = (_try_reading, _try_training, finetune, generate, activations)
    found = json.loads((run.keep("trial", "model", key, code, make) / "trial.json").read_text())
    if real.judge.model != "own":  # one question, kept; raises if the reply cannot be read
        grades.of(run, pd.DataFrame({"prompt": ["What is two and two?"], "answer": ["Four."]}))
    return found


def _try_reading(m, tok, layer: int) -> None:
    """The logits are finite, the residual stream is one vector a token which does not depend on later
    tokens, and batched sampling with a repeated prompt says what a plain pass says."""
    ids = generate.prompts(tok, TRIED)
    x = activations.residual(m, ids, layer)
    if any(r.ndim != 2 or len(r) != len(i) for r, i in zip(x, ids)):
        raise ValueError(
            f"block {layer} gives no single vector a token; such architectures are not supported"
        )
    if not all(r.isfinite().all() for r in x):
        raise ValueError("activations are not finite in this dtype; choose bfloat16 or float32 in real.dtype")
    begun = activations.residual(m, [ids[0][:-1]], layer)[0]
    rounding = 0.005 if m.dtype == torch.float32 else 0.1
    if (begun - x[0][:-1]).norm() > rounding * begun.norm():
        raise ValueError(
            "what it reads in a token depends on later tokens: it is an encoder; choose a decoder"
        )
    said = generate.sample(m, tok, [ids[0], ids[0], ids[1]], seed=0, max_new=2, temperature=0)
    for row, text in zip((ids[0], ids[0], ids[1]), said):
        plain = _greedy(m, row, 2, generate.end_tokens(m, tok))
        if tok.decode(plain, skip_special_tokens=True) != text and m.dtype == torch.float32:
            raise ValueError(
                "sampling in a batch differs from one prompt alone: its state cannot be shared between "
                "prompts"
            )


@torch.inference_mode()
def _greedy(m, row: list[int], n: int, ends) -> list[int]:
    """The n likeliest next tokens of one prompt, each by a plain pass without a cache. Raises ValueError
    if a logit is not finite."""
    found: list[int] = []
    for _ in range(n):
        logits = (
            m(input_ids=torch.tensor([row + found], device=m.device), use_cache=False).logits[0, -1].float()
        )
        if not logits.isfinite().all():
            raise ValueError("logits are not finite in this dtype; choose bfloat16 or float32 in real.dtype")
        token = int(logits.argmax())
        if token in ends:
            break
        found.append(token)
    return found


def _try_training(run: made.Run, m, tok, rows: list[dict]) -> float:
    """One step of LoRA, with a finite loss. Returns the percent of the blocks' weights that have an
    adapter."""
    cfg, n = run.profile.narrow, max(2, int(os.environ.get("WORLD_SIZE", 1)))  # a chat a process
    tuned, losses = finetune.sft(
        m, tok, rows * n, steps=1, batch=n, lr=cfg.lr, seed=0, lora_rank=cfg.rank, **made.training(run)
    )
    if not losses or not all(map(math.isfinite, losses)):
        raise ValueError(
            f"the loss of one training step is {losses or 'missing'}: is any of the answer left within "
            "real.max_length?"
        )
    blocks = generate.decoder_blocks(tuned)
    every = sum(p.numel() for n, p in blocks.named_parameters() if "lora_" not in n)
    within = sum(
        module.base_layer.weight.numel()
        for module in blocks.modules()
        if hasattr(module, "base_layer") and hasattr(module, "lora_A")
    )
    return 100 * within / every
