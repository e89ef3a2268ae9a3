"""Watch a persona latent while a model is being fine-tuned: a callback for the Hugging Face Trainer and
TRL."""

import time
import warnings

import numpy as np
import torch
from scipy.stats import t as student
from transformers import TrainerCallback

from personas import activations, generate
from personas.sae import SAE


class PersonaMonitor(TrainerCallback):
    """Log a latent's (or a direction's) mean activation on fixed text during training, warn when it is too
    high, stop if asked (early warning: Wang et al., 2025, where the toxic persona's latent rises before
    the misalignment score does).

    tokenizer: with a chat template. prompts: questions; answers: one aligned answer each. The model reads
    them, it does not write them: activations are averaged from the prompt's last token on. direction: an
    `SAE`, whose `latent` is read, or a tensor (width,) at block `layer`, onto which activations are
    projected. Without `set_baseline` the monitor only logs. stop: end training at the first warning.
    every: steps between readings; one is left out if it would take readings over `budget` of the training
    time (the one before the first step not counted); a run too short for any is read once, when it is
    over. Readings are in `rows` and in the trainer's
    `log_history` as `persona`. Raises ValueError before training for a direction that does not fit the
    model and for arguments that contradict each other.
    """

    def __init__(
        self,
        tokenizer,
        prompts: list[str],
        answers: list[str],
        direction: SAE | torch.Tensor,
        *,
        latent: int | None = None,
        layer: int | None = None,
        every: int = 10,
        budget: float = 0.05,
        stop: bool = False,
    ):
        if isinstance(direction, SAE) != (latent is not None) or isinstance(direction, SAE) == (
            layer is not None
        ):
            raise ValueError("give an SAE with `latent`, or a tensor (width,) with `layer`")
        if latent is not None and not 0 <= latent < len(direction.W_dec):
            raise ValueError(
                f"latent {latent} was asked for; this SAE has latents 0 to {len(direction.W_dec) - 1}"
            )
        if not isinstance(direction, SAE) and (
            direction.ndim != 1 or not direction.isfinite().all() or not direction.any()
        ):
            raise ValueError("the direction must be a tensor (width,), finite and not zero")
        if every < 1 or not budget >= 0:
            raise ValueError(f"every must be at least 1 and budget not below 0, not {every} and {budget}")
        if len(prompts) != len(answers) or not prompts:
            raise ValueError(f"one answer for each prompt is needed, not {len(answers)} for {len(prompts)}")
        self.direction, self.latent, self.every, self.budget, self.stop = (
            direction.to("cpu"),
            latent,
            every,
            budget,
            stop,
        )  # activations are read there
        self.layer = direction.layer if latent is not None else layer
        self.limit: float | None = None
        ids = generate.prompts(tokenizer, prompts)
        self.starts = [len(i) - 1 for i in ids]
        self.texts = [i + tokenizer(a, add_special_tokens=False)["input_ids"] for i, a in zip(ids, answers)]
        self.rows: list[dict] = []

    def set_baseline(self, readings: list[float], confidence: float = 0.99) -> None:
        """Warn from now on above what one more benign fine-tune would read: the upper end of the one-sided
        prediction interval (Student's t) of these readings, at least two, of benign fine-tunes. It knows
        only their kind: against correct answers alone odd but harmless data is above it, too, and kinds of
        data form clusters that no t describes (notebook 13 takes the highest of all kinds)."""
        if len(readings) < 2:
            raise ValueError("a baseline needs the readings of at least two benign fine-tunes")
        if not np.isfinite(readings).all():
            raise ValueError("a baseline needs finite readings: one of these is not")
        if not 0 < confidence < 1:
            raise ValueError(f"confidence is a share between 0 and 1, not {confidence}")
        n = len(readings)
        self.limit = float(
            np.mean(readings) + student.ppf(confidence, n - 1) * np.std(readings, ddof=1) * np.sqrt(1 + 1 / n)
        )

    def read(self, model) -> float:
        """The mean over texts of the mean activation over each one's tokens; nan if the model's activations
        are not finite. Raises ValueError if the direction does not fit the model."""
        blocks, width = len(generate.decoder_blocks(model)), model.config.get_text_config().hidden_size
        mine = self.direction.W_dec.shape[1] if self.latent is not None else len(self.direction)
        if not 0 <= self.layer < blocks:
            raise ValueError(f"block {self.layer} was asked for; this model has blocks 0 to {blocks - 1}")
        if mine != width:
            raise ValueError(
                f"the direction has width {mine}, the model {width}: it belongs to another model"
            )
        was = model.training
        model.eval()
        with generate.unmixed(model):
            x = activations.residual(model, self.texts, self.layer)
        model.train(was)
        if not all(h.isfinite().all() for h in x):
            return float("nan")  # an SAE would read 0 there: none of its latents fires
        means = [self._value(h[i:].cpu()).mean() for h, i in zip(x, self.starts)]
        return torch.stack(means).mean().item()

    def _value(self, x):
        if self.latent is not None:
            return self.direction.encode(x)[:, self.latent]
        return x @ (self.direction / self.direction.norm()).float()

    def on_train_begin(self, args, state, control, model=None, **kw):
        if self.stop and self.limit is None:
            raise ValueError("stop=True needs a baseline: call set_baseline")
        start = time.perf_counter()
        self._note(state.global_step, model, state, control)  # 0, or where a checkpoint is taken up
        self.spent, self.began = 0.0, time.perf_counter()
        self.cost = self.began - start

    def on_step_end(self, args, state, control, model=None, **kw):
        now = time.perf_counter()
        if state.global_step % self.every == 0 and self.spent + self.cost <= self.budget * (now - self.began):
            self._note(state.global_step, model, state, control)
            self.cost = time.perf_counter() - now
            self.spent += self.cost

    def on_train_end(self, args, state, control, model=None, **kw):
        """A run too short for its budget is read once, when it is over."""
        if len(self.rows) == 1 and state.global_step != self.rows[0]["step"]:
            self._note(state.global_step, model, state, control)

    def _note(self, step, model, state, control):
        value = self.read(model)
        self.rows.append({"step": step, "persona": value})
        state.log_history.append({"step": step, "persona": value})
        if not np.isfinite(value):
            warnings.warn(
                f"step {step}: the model's activations are not finite: nothing can be read from it"
                + ("; training stops" if self.stop else ""),
                stacklevel=2,
            )
            control.should_training_stop |= self.stop
        elif self.limit is not None and value > self.limit and step:
            warnings.warn(
                f"step {step}: the persona reads {value:.3g}, above the {self.limit:.3g} of benign fine-tunes"
                + ("; training stops" if self.stop else ""),
                stacklevel=2,
            )
            control.should_training_stop |= self.stop
