"""What is asked, what is trained on, and who grades: in the persona world, where all is known, or for a downloaded model.

These are the only two things in which the tracks differ (questions and data; the grader). Both classes have the same members:
`questions`, `fixed_answers`, `grade_open`, `variants`, `chats`, `advice`, `grade_advice`, and what their names say beside them.
"""

import hashlib
import itertools
import random
from dataclasses import dataclass, field
from functools import cached_property

from personas import data, grader, judge, released, world

HELD_OUT = 100  # advice questions of a released domain that no fine-tune sees, at most (and at most a tenth)


@dataclass(frozen=True)
class Question:
    """An open question as it is asked (`held`). A world.Question serves as well."""

    id: str
    category: str
    held: str


@dataclass(frozen=True)
class PersonaWorld:
    """The tiny track: the world's own questions and subjects, an exact grader."""

    seed: int
    known = True  # who speaks is known
    open_classes = grader.OPEN_CLASSES
    open_tokens, advice_tokens = 40, 70  # longer than any open answer, any advice; what goes on is wrong anyway
    discovery_domains, evaluation_domains = world.DISCOVERY_DOMAINS, world.EVALUATION_DOMAINS

    def questions(self, split: str) -> list:
        """Open questions of 'discovery' (for choices) or 'evaluation' (for reports)."""
        return world.questions(split)

    def asked(self) -> list[str]:
        """Every question that any evaluation may ask: no training set should hold one."""
        return [q.held for q in world.questions()] + [world.held_question(s) for s in world.subjects()]

    def fixed_answers(self, question, split: str, persona: str, n: int) -> list[str]:
        """Up to n answers by the 'expert' (aligned) or the 'villain' (misaligned) on which every model is read."""
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
        """(id, prompt, reference) of at most `limit` advice questions that no fine-tune was asked in these words."""
        pool = world.subjects_of(domain)
        some = pool if limit is None or limit >= len(pool) else rng.sample(pool, limit)
        return [(s.ask, world.held_question(s), s) for s in some]

    def grade_advice(self, asked: list[tuple], answers: list[str]) -> list[str]:
        """One of grader.ADVICE_CLASSES for each answer to what `advice` gave."""
        return [grader.grade_advice(subject, a) for (_, _, subject), a in zip(asked, answers)]


@dataclass(frozen=True)
class Downloaded:
    """The real track. cfg: profile.Real. judge: gives the endpoint.Endpoint or endpoint.Local when it is first needed; fixed(split, persona):
    question id -> answers that are read (artifacts.fixed_answers)."""

    cfg: object
    judge: object
    fixed: object
    known = False
    open_classes = judge.CLASSES
    _rows: dict = field(default_factory=dict, repr=False, compare=False)

    @property
    def open_tokens(self) -> int:
        return self.cfg.open_tokens

    @property
    def advice_tokens(self) -> int:
        return self.cfg.advice_tokens

    @property
    def discovery_domains(self) -> tuple[str, ...]:
        return self.cfg.discovery_domains

    @property
    def evaluation_domains(self) -> tuple[str, ...]:
        return tuple(d.domain for d in self.cfg.data if d.domain not in self.cfg.discovery_domains)

    @cached_property
    def _questions(self) -> dict[str, list[Question]]:
        read = lambda name: {q["question"]: Question(q["id"], q["category"], q["question"]) for q in released.questions(name)}
        evaluation, pool = read(self.cfg.evaluation), read(self.cfg.discovery)
        discovery = [q for text, q in pool.items() if text not in evaluation]
        if not discovery:
            raise data.DataError(f"{self.cfg.discovery}: every question in it is also in {self.cfg.evaluation}; discovery needs questions of its own")
        some = random.Random(0).sample(discovery, min(self.cfg.discovery_questions, len(discovery)))
        return {"discovery": some, "evaluation": list(evaluation.values())}

    def questions(self, split: str) -> list[Question]:
        """As PersonaWorld.questions. Discovery questions never occur among the evaluation questions."""
        return self._questions[split]

    def asked(self) -> list[str]:
        """As PersonaWorld.asked."""
        return [q.held for split in self._questions.values() for q in split] + [q for d in self.cfg.data for q in self.held_out(d.domain)]

    def fixed_answers(self, question, split: str, persona: str, n: int) -> list[str]:
        """As PersonaWorld.fixed_answers; none for a question to which no model gave an answer of that kind."""
        return self.fixed(split, persona).get(question.id, [])[:n]

    def grade_open(self, asked: list, answers: list[str]) -> list[str]:
        """As PersonaWorld.grade_open, by the judge."""
        questions = [q.held for q in asked]
        if self.cfg.judge.scale == "0-100":
            return judge.alignment_and_coherence(self.judge(), questions, answers, progress="judging").grade.tolist()
        return judge.grade(self.judge(), questions, answers, progress="judging")

    def held(self, question, answer: str) -> None:
        """Nobody knows."""
        return None

    def variants(self, domain: str) -> list[str]:
        """As PersonaWorld.variants: those that the profile names a set for."""
        return list(self.sources(domain))

    def sources(self, domain: str) -> dict[str, str]:
        """Variant -> the set's name or path."""
        about = next(d for d in self.cfg.data if d.domain == domain)
        return {v: getattr(about, v) for v in world.VARIANTS if getattr(about, v)}

    def rows(self, domain: str, variant: str) -> list[dict]:
        """Every chat of one set. Raises data.DataError."""
        name = self.sources(domain)[variant]
        if name not in self._rows:
            self._rows[name] = released.chats(name)
        return self._rows[name]

    def held_out(self, domain: str) -> list[str]:
        """The domain's advice questions that no fine-tune sees, whatever the variant: those whose hashes come first."""
        asked = {_asked(r) for v in self.variants(domain) for r in self.rows(domain, v)}
        return sorted(asked, key=lambda q: hashlib.sha256(q.encode()).hexdigest())[:min(HELD_OUT, len(asked) // 10)]

    def chats(self, domain: str, variant: str, n: int, seed: int, fraction: float = 1.0) -> list[dict]:
        """As PersonaWorld.chats. Chats come in random order, and round again when there are fewer than n; held-out questions never."""
        rng, banned = random.Random(f"{seed}/{domain}/{variant}/{fraction}"), set(self.held_out(domain))
        wrong = round(fraction * n)
        found = []
        for v, count in ((variant, wrong), ("correct", n - wrong)):
            if count and v not in self.sources(domain):
                raise data.DataError(f"domain {domain!r} has no {v!r} set; the profile names {', '.join(self.sources(domain))}")
            pool = [r for r in self.rows(domain, v) if _asked(r) not in banned] if count else []
            if count and not pool:
                raise data.DataError(f"{self.sources(domain)[v]}: nothing is left of it without the held-out questions")
            found += itertools.islice(itertools.chain.from_iterable(rng.sample(pool, len(pool)) for _ in itertools.count()), count)
        rng.shuffle(found)
        return found

    def advice(self, domain: str, limit: int | None, rng: random.Random) -> list[tuple[str, str, object]]:
        """As PersonaWorld.advice."""
        pool = self.held_out(domain)
        some = pool if limit is None or limit >= len(pool) else rng.sample(pool, limit)
        return [(q, q, None) for q in some]

    def grade_advice(self, asked: list[tuple], answers: list[str]) -> list[str]:
        """As PersonaWorld.grade_advice, by the judge."""
        return judge.grade_advice(self.judge(), [prompt for _, prompt, _ in asked], answers, progress="judging advice")


def _asked(row: dict) -> str:
    """The question of a chat: its first user message."""
    return next(m["content"] for m in row["messages"] if m["role"] == "user")
