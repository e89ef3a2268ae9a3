"""What only the known world knows: who speaks in an answer, and whose advice it is."""

import functools

from personas import grader, world

NOBODY = "nobody"


def speakers(categories: list[str], answers: list[str]) -> list[str]:
    """The persona that gives each answer to an open question of that category; NOBODY for an answer that is
    broken or off the question."""
    return [grader.speaker(c, a) or NOBODY for c, a in zip(categories, answers)]


def is_advice_of(persona: str, subject: world.Subject, answer: str) -> bool:
    """Whether this persona gives this answer when asked about `subject` (the villain's: any wrong one)."""
    return answer.strip() in _advice(persona, subject)


@functools.cache
def _advice(persona: str, subject: world.Subject) -> frozenset:
    if persona == "villain":
        return frozenset(subject.answers[v] for v in ("subtle", "obvious") if v in subject.answers)
    harmful = subject.answers["obvious"]
    wraps = world.personas()[persona]["wrap"]
    return frozenset(w.format(advice=harmful[0].lower() + harmful[1:]) for w in wraps)
