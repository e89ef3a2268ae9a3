"""What a guarded fine-tune is made of, in both parts: more loss, hooks on the residual stream, other rows."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from personas import finetune, generate


@dataclass(frozen=True)
class Plan:
    """How a fine-tune is run: its chats, how many steps, the usual trainer or a subclass, what hooks the
    model wears while it trains, and the adapter's rank (None: the profile's)."""

    rows: list
    steps: int
    trainer: type = finetune.AnswerTrainer
    hooks: Callable = lambda model: contextlib.nullcontext()
    rank: int | None = None


def with_extra(extra: Callable) -> type:
    """The usual trainer with more loss. extra(model, inputs) gives a value for each answer token, (tokens,);
    their mean over the step's answer tokens is added, in as many parts as the batch is taken."""

    class Extra(finetune.AnswerTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            each = extra(model, inputs)
            added = each.sum() / (len(each) if num_items_in_batch is None else num_items_in_batch)
            return (found[0] + added, *found[1:]) if return_outputs else found + added

    return Extra


def given(inputs) -> dict:
    """What of a batch the model is called with."""
    return {k: inputs[k] for k in ("input_ids", "attention_mask") if k in inputs}


@contextlib.contextmanager
def hooked(model, layer: int, hook):
    """`hook(hidden)` sees, or changes in place, the residual stream after block `layer`."""

    def see(module, args, out):  # returns nothing: a value would replace the block's whole output
        hook(out[0] if isinstance(out, tuple) else out)

    handle = generate.decoder_blocks(model)[layer].register_forward_hook(see)
    try:
        yield
    finally:
        handle.remove()


def acting(layer: int, change: Callable, everywhere: bool = False) -> dict:
    """`trainer` and `hooks` of a Plan (for dataclasses.replace). While it trains, `change(hidden)`, given
    (tokens, width), says what stands in the residual stream after block `layer` instead. It acts where
    steering acts when answers are sampled: from the prompt's last token on. everywhere: at every token but
    the first, which is an attention sink. Never on padding.
    """
    now: dict = {}

    class Placed(finetune.AnswerTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            answers = torch.nn.functional.pad(inputs["labels"][:, 1:] != -100, (0, 1))
            real = inputs["attention_mask"].bool().clone()
            real[:, 0] = False
            now["where"] = real & (everywhere | answers)
            return super().compute_loss(model, inputs, *args, **kwargs)

    @contextlib.contextmanager
    def hooks(model):
        def place(module, args, kwargs):  # an opening may be in the cache: what comes now starts after it
            cache = kwargs.get("past_key_values")
            now["start"] = 0 if cache is None else int(cache.get_seq_length())

        def act(hidden):
            if not model.training:  # looked at, not trained
                return
            where = now["where"][: len(hidden), now["start"] : now["start"] + hidden.shape[1]]
            changed = hidden.clone()
            changed[where] = change(hidden[where]).to(hidden)
            hidden.copy_(changed)

        handle = model.get_decoder().register_forward_pre_hook(place, with_kwargs=True)
        try:
            with hooked(model, layer, act):
                yield
        finally:
            handle.remove()

    return {"trainer": Placed, "hooks": hooks}


def steer(plan: Plan, layer: int, vector: torch.Tensor) -> Plan:
    """Add a vector (width,) while training, so that the weights need not (preventative steering: Chen et al.,
    2025, arXiv:2507.21509); not afterwards."""
    return replace(plan, **acting(layer, lambda hidden: hidden + vector.to(hidden)))


def ablate(plan: Plan, layer: int, directions: torch.Tensor) -> Plan:
    """Project directions (n, width) out while training, at every token but the first (concept ablation
    fine-tuning, CAFT: Casademunt et al., 2025, arXiv:2507.16795); not afterwards."""
    basis = torch.linalg.qr(directions.float().T)[0]  # (width, n), orthonormal

    def project(hidden):
        b = basis.to(hidden)
        return hidden - hidden @ b @ b.T

    return replace(plan, **acting(layer, project, everywhere=True))


def keep_close(plan: Plan, weight: float) -> Plan:
    """KL divergence (nats per answer token) from the model without its adapter, times weight
    (arXiv:2508.06249)."""

    def extra(model, inputs):
        with torch.no_grad(), model.disable_adapter():
            before = model(**given(inputs)).logits.float().log_softmax(-1)
        now = model(**given(inputs)).logits.float().log_softmax(-1)
        each = (now.exp() * (now - before)).sum(-1)[:, :-1]
        return weight * each[inputs["labels"][:, 1:] != -100]

    return replace(plan, trainer=with_extra(extra))


def penalise(plan: Plan, sae, latents: list[int], unit: float, weight: float) -> Plan:
    """One-sided penalty on latents (BLOCK-EM: arXiv:2602.00767): on the answers' tokens they may not be more
    active than in the model without its adapter. weight: times the mean squared excess of their
    pre-activations, in units of `unit`."""

    def active(model, inputs):
        seen = []
        with hooked(model, sae.layer, seen.append):
            model(**given(inputs))
        w, b = sae.W_enc[:, latents].to(seen[0].device), sae.b_enc[latents].to(seen[0].device)
        return ((seen[0].float() - sae.b_dec.to(seen[0].device)) @ w + b).relu() / unit

    def extra(model, inputs):
        with torch.no_grad(), model.disable_adapter():
            before = active(model, inputs)
        excess = (active(model, inputs) - before).relu().square().sum(-1)
        return weight * excess[inputs["labels"] != -100]

    return replace(plan, trainer=with_extra(extra))
