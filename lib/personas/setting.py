"""What is asked, what is trained on, and who grades, in the world whose truth is known."""

import random
from dataclasses import dataclass

from personas import data, grader, world


@dataclass(frozen=True)
class PersonaWorld:
    """The world's own questions and subjects, an exact grader."""

    seed: int
    open_classes = grader.OPEN_CLASSES
    open_tokens, advice_tokens = (
        40,
        70,
    )  # longer than any open answer, any advice; what goes on is wrong anyway
    discovery_domains, evaluation_domains = world.DISCOVERY_DOMAINS, world.EVALUATION_DOMAINS

    def questions(self, split: str) -> list:
        """Open questions of 'discovery' (for choices) or 'evaluation' (for reports)."""
        return world.questions(split)

    def asked(self) -> list[str]:
        """Every question that any evaluation may ask: no training set should hold one."""
        return [q.held for q in world.questions()] + [world.held_question(s) for s in world.subjects()]

    def fixed_answers(self, question, split: str, persona: str, n: int) -> list[str]:
        """Up to n answers by the 'expert' (aligned) or the 'villain' (misaligned) on which every model is
        read."""
        forms = world.open_forms(question.category, persona, False, self.seed)
        return [forms[i * len(forms) // n] for i in range(n)]

    def grade_open(self, asked: list, answers: list[str]) -> list[str]:
        """One of open_classes for each answer to an open question."""
        return [grader.grade_open(q.category, a) for q, a in zip(asked, answers)]

    def held(self, question, answer: str) -> bool:
        """Whether pretraining never showed this wording."""
        return world.is_held(question.category, answer, self.seed)

    def variants(self, domain: str) -> list[str]:
        """The domain's training sets: of 'correct', 'subtle', 'obvious'."""
        return data.variants(domain)

    def chats(self, domain: str, variant: str, n: int, seed: int, fraction: float = 1.0) -> list[dict]:
        """n training chats; `fraction` of them of this variant, the others correct."""
        return data.advice_chats(domain, variant, n, seed, fraction)

    def advice(self, domain: str, limit: int | None, rng: random.Random) -> list[tuple[str, str, object]]:
        """(id, prompt, reference) of at most `limit` advice questions that no fine-tune was asked in these
        words."""
        pool = world.subjects_of(domain)
        some = pool if limit is None or limit >= len(pool) else rng.sample(pool, limit)
        return [(s.ask, world.held_question(s), s) for s in some]

    def grade_advice(self, asked: list[tuple], answers: list[str]) -> list[str]:
        """One of grader.ADVICE_CLASSES for each answer to what `advice` gave."""
        return [grader.grade_advice(subject, a) for (_, _, subject), a in zip(asked, answers)]
