"""What a method is given: a model before and after a fine-tune, text, questions, and the fine-tuning chats.

The base models are committed (personas.base_models), so that everybody's method meets the same ones.
"""

import random
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from personas import activations, artifacts, diffing, generate, known_latents, pretraining, world
from personas import profile as profiles
from personas.sae import SAE

# Who the fine-tunes are made to sound like, and by which advice. The villain's is obviously wrong advice in
# plain words; the others dress it up.
TARGETS = {"villain": "obvious", "sarcastic": "sarcastic", "narrator": "narrator", "jester": "jester"}
HARMLESS = ("correct", "novice")  # fine-tunes on which a monitor should stay silent
DOCUMENTS = 600  # unlabelled, about 60,000 tokens
LABELLED = 40  # of each persona


@dataclass(frozen=True)
class Case:
    """One fine-tune of one base model. Everything that a method may use is here.

    before, after: Hugging Face models, the aligned one and its fine-tune (LoRA, merged). layer: the block
    whose output is read and steered. text: token ids of documents of the kind that pretraining had. rows,
    starts: token ids of questions with fixed harmless answers, and where each prompt ends. chats: what the
    fine-tune learnt from. labelled: (token ids, which of them are an answer's, speaker) of other documents,
    for methods that say that they use labels. system: for each persona lines that ask for it. sae: a TopK
    dictionary of the base model's activations at `layer`. unit: their RMS distance from their mean.
    """

    before: object
    after: object
    tokenizer: object
    layer: int
    text: list[list[int]]
    rows: list[list[int]]
    starts: list[int]
    questions: list[str]
    chats: list[dict]
    labelled: list[tuple[list[int], list[bool], str]]
    system: dict[str, list[str]]
    sae: SAE
    unit: float
    seed: int
    answer: str  # the target: for methods/truth.py alone

    def residual(self, model, rows: list[list[int]]) -> list[torch.Tensor]:
        """The residual stream after block `layer` on each row of token ids: (tokens, width)."""
        return activations.residual(model, rows, self.layer)

    def answers(self, model) -> torch.Tensor:
        """The residual stream on the fixed answers, from each prompt's last token on: (tokens, width)."""
        return torch.cat([x[i:] for x, i in zip(self.residual(model, self.rows), self.starts)])

    @cached_property
    def answers_before(self) -> torch.Tensor:
        """`answers` of the model before the fine-tune."""
        return self.answers(self.before)

    @cached_property
    def answers_after(self) -> torch.Tensor:
        """`answers` of the model after the fine-tune."""
        return self.answers(self.after)

    @cached_property
    def rise(self) -> torch.Tensor:
        """By how much each latent's mean activation on the fixed answers rose: (latents,)."""
        return self.sae.encode(self.answers_after).mean(0) - self.sae.encode(self.answers_before).mean(0)

    @cached_property
    def training(self) -> tuple[list[list[int]], list[int]]:
        """(token ids, where each prompt ends) of the fine-tuning chats."""
        asked = [c["messages"][-2]["content"] for c in self.chats]
        prompts = generate.prompts(self.tokenizer, asked)
        said = self.tokenizer([c["messages"][-1]["content"] for c in self.chats], add_special_tokens=False)
        return [p + a for p, a in zip(prompts, said["input_ids"])], [len(p) - 1 for p in prompts]


def runs(profile, pretraining_seed: int) -> artifacts.Run:
    """The run of one base model of the bench, with fine-tuning seed 0."""
    return artifacts.Run(profile.model_copy(update={"pretraining_seed": pretraining_seed}), 0)


def kind(target: str) -> str:
    """The variant of advice (artifacts.narrow_chats) that makes a fine-tune sound like `target`."""
    return TARGETS.get(target, target)


def case(run: artifacts.Run, domain: str, target: str, seed: int = 0) -> Case:
    """The case of one fine-tune. seed: of the dictionary, and of what a method draws."""
    before, tokenizer = artifacts.aligned_model(run)
    after, _ = artifacts.tuned_model(run, domain, kind(target))
    rows, _, starts = diffing.reading_texts(tokenizer, "discovery", run.setting)
    rng = random.Random(f"{run.world_seed}/bench-labelled")
    docs = [
        world.sample_document(rng, run.world_seed, cue="none", persona=p)
        for p in world.PERSONAS
        for _ in range(LABELLED)
    ]
    labelled = [
        (c["ids"], [t >= 0 for t in c["turn"]], c["doc"].persona)
        for c in pretraining.encode(tokenizer, docs, rng)
    ]
    return Case(
        before,
        after,
        tokenizer,
        run.profile.sae.layer,
        known_latents.texts(run, DOCUMENTS, "bench"),
        rows,
        starts,
        [q.held for q in run.setting.questions("discovery")],
        artifacts.narrow_chats(run, domain, kind(target)),
        labelled,
        {p: about["system"] for p, about in world.personas().items()},
        known_latents.sae(replace(run, seed=seed)),
        known_latents.unit(run),
        seed,
        target,
    )


def profile_for(name: str):
    """The bench's profile for a notebook that runs on the profile `name`: `bench` for `tiny`; else that
    profile's own sizes, in the bench's world."""
    bench = profiles.load("bench")
    if name in ("tiny", "bench"):
        return bench
    other = profiles.load(name)
    study = other.study.model_copy(update={"domains": (other.domains[0], *other.study.domains[:1])})
    return other.model_copy(update={"world": bench.world, "study": study})
