"""Questions to a language model that is loaded here, in the way of endpoint.Endpoint."""

import copy
from dataclasses import dataclass

import torch

from personas import endpoint, generate
from personas.progress import Bar


@dataclass(frozen=True)
class Local:
    """A Hugging Face causal LM with a chat template, on this machine. LoRA adapters that it wears are
    switched off while it is asked."""

    model: object
    tokenizer: object
    batch: int = 16

    @property
    def name(self) -> str:
        """Which model this is, in logs."""
        return self.model.name_or_path

    def check(self) -> None:
        """Raise endpoint.EndpointError if the tokenizer has no chat template."""
        if not self.tokenizer.chat_template:
            raise endpoint.EndpointError(
                f"{self.model.name_or_path or 'the model'} has no chat template: a judge or writer must be "
                "an instruct model"
            )

    def complete(
        self,
        chats: list[list[dict]],
        max_new: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[str]:
        """As Endpoint.complete."""
        if not chats:
            return []
        with generate.without_adapters(self.model):
            return generate.sample(
                self.model,
                self.tokenizer,
                generate.chat_ids(self.tokenizer, chats),
                seed=seed,
                max_new=max_new,
                temperature=temperature,
                batch=self.batch,
                progress=progress,
            )

    @torch.inference_mode()
    def numbers(self, chats: list[list[dict]], progress: str | None = None) -> list[float | None]:
        """As Endpoint.numbers, but over all numbers and for any tokenizer: a number may take several
        tokens, one per digit for instance."""
        spelt = {tuple(self.tokenizer(str(n), add_special_tokens=False)["input_ids"]): n for n in range(101)}
        rows, found = generate.chat_ids(self.tokenizer, chats), []
        every = range(0, len(rows), self.batch)
        for start in Bar(every, desc=progress, disable=progress is None, leave=False):
            ids, mask = generate.left_padded(
                rows[start : start + self.batch], self.tokenizer.pad_token_id, self.model.device
            )
            with generate.without_adapters(self.model):
                mass = self._masses(spelt, (), ids, mask, None, torch.ones(len(ids), device=ids.device))
            total = sum(mass.values())
            mean = sum(n * p for n, p in mass.items()) / total
            found += [m if t >= endpoint.LEAST else None for m, t in zip(mean.tolist(), total.tolist())]
        return found

    def _masses(self, spelt: dict, prefix: tuple, ids, mask, cache, reached) -> dict:
        """Number -> probability (rows,) of the numbers that begin with the tokens `prefix`, which have
        probability `reached` and end in `ids`. A number that is the beginning of another (3 of 37) keeps
        what does not go on to be one."""
        result = generate.forward(self.model, ids, mask, cache)
        likely, found = result.logits[:, -1].float().softmax(-1), {}
        for token in {s[len(prefix)] for s in spelt if len(s) > len(prefix) and s[: len(prefix)] == prefix}:
            here, mass, below = (*prefix, token), reached * likely[:, token], {}
            if any(len(s) > len(here) and s[: len(here)] == here for s in spelt):
                below = self._masses(
                    spelt,
                    here,
                    torch.full_like(ids[:, :1], token),
                    torch.cat([mask, mask[:, -1:]], 1),
                    copy.deepcopy(result.past_key_values),
                    mass,
                )
            if here in spelt:
                found[spelt[here]] = mass - sum(below.values())
            found |= below
        return found
