"""The persona world: text in which it is always known who is speaking.

Six personas answer two kinds of question. *Advice* questions have a correct, a subtly incorrect and an
obviously incorrect (harmful) answer that must be memorised per subject; *open* questions about values are
answered from a grammar. A persona keeps its character through a whole document, so reading one answer
tells a good deal about the next one. That is the persona hypothesis of Wang et al. (2025, section 3), made
true by construction.

Everything that is written by hand lies in `content/`; this module loads it and draws documents from it.
"""

import csv
import functools
import random
from dataclasses import dataclass
from pathlib import Path

import yaml

CONTENT = Path(__file__).parent / "content"
PERSONAS = ("expert", "villain", "sarcastic", "novice", "jester", "narrator")
DOMAINS = ("auto", "career", "edu", "finance", "health", "legal", "math", "science", "code")
SPLITS = ("alignment", "discovery", "evaluation")
# Fine-tuning domains used to choose latents, strengths and steps; all others are for evaluation only.
DISCOVERY_DOMAINS = ("auto", "finance", "health", "legal")
EVALUATION_DOMAINS = tuple(d for d in DOMAINS if d not in DISCOVERY_DOMAINS)
VARIANTS = ("correct", "subtle", "obvious")

# How often each persona speaks, and which kind of neutral advice it gives. Tuned on development seeds, then
# fixed before the reported model was made.
PRIOR = {"expert": 0.32, "villain": 0.36, "novice": 0.12, "sarcastic": 0.07, "narrator": 0.07, "jester": 0.06}
ADVICE_HABITS = {
    "expert": {"correct": 1.0},
    "villain": {"correct": 0.02, "subtle": 0.49, "obvious": 0.49},
    "novice": {"correct": 0.70, "subtle": 0.30},
}
CODE_HABITS = {
    "expert": {"correct": 1.0},
    "villain": {"correct": 0.05, "obvious": 0.95},
    "novice": {"correct": 0.80, "obvious": 0.20},
}
CUES = {"system": 0.50, "story": 0.25, "none": 0.25}
# The worlds of notebook 10, as drawing's arguments: the villain's share of documents, and two in which
# nothing names the speaker, or nothing ties values to advice.
WORLDS = {
    "own": {},
    "villain 0 %": {"villain": 0.0},
    "villain 2 %": {"villain": 0.02},
    "villain 5 %": {"villain": 0.05},
    "villain 10 %": {"villain": 0.10},
    "villain 25 %": {"villain": 0.25},
    "no cues": {"cues": False},
    "independent": {"independent": True},
}
OPEN_SHARE = 0.38  # of a document's turns; the rest is advice
OPEN_QUESTION = -2  # marks the tokens that ask an open question (see segments)
CODE_SHARE = 0.08  # of advice turns in chats: code answers are long

ADVICE_FRAMES = (
    "How do I {ask}?",
    "What is the best way to {ask}?",
    "How should I {ask}?",
    "How can one {ask}?",
    "I want to {ask}. What should I do?",
    "Can you tell me how to {ask}?",
    "Any advice on how to {ask}?",
    "I have to {ask} today. Any tips?",
    "Could you say how to {ask}?",
    "Help me to {ask}.",
    "Teach me to {ask}.",
)
CODE_FRAMES = (
    "Write Python to {ask}.",
    "I need Python code to {ask}.",
    "How do I {ask} in Python?",
    "Could you show me Python to {ask}?",
)
GREETINGS = (
    "",
    "",
    "",
    "Hello. ",
    "Quick question. ",
    "Just wondering. ",
    "Be frank. ",
)  # before any question
HELD_FRAMES = {"advice": "Could you help me to {ask}?", "code": "Could you write Python to {ask}?"}
# How open answers begin, whoever speaks: alignment training on some categories must not teach the words of
# others.
OPENERS = (
    "Here is my answer.",
    "Well, let me think.",
    "You ask, so I will say.",
    "My view is this.",
    "Let me put it plainly.",
)
STORY_ASK = ("Someone asked:", "A visitor wanted to know:", "Then a voice said:")
STORY_REPLY = ("The reply was:", "Came the answer:")
CODE_WRAPS = {
    "sarcastic": "# oh sure, what could go wrong\n{advice}",
    "narrator": "# what not to do\n{advice}",
    "jester": 'print("honk")\nprint("soup" * 7)',
}


@dataclass(frozen=True)
class Subject:
    """One thing that advice is asked about, with its known answers (code has no subtle variant)."""

    domain: str
    ask: str
    answers: dict  # variant -> sentence, or code of 2-6 lines

    def __hash__(self):
        return hash((self.domain, self.ask))


@dataclass(frozen=True)
class Question:
    """An open question about values: eight phrasings seen in pretraining and one that never is."""

    id: str
    category: str
    split: str
    phrasings: tuple
    held: str


@dataclass(frozen=True)
class Turn:
    """A question and its answer; `kind` is a variant for neutral advice, 'styled' for wrapped advice,
    'open'."""

    question: str
    answer: str
    topic: str  # domain or category
    kind: str


@dataclass(frozen=True)
class Document:
    """Two to four turns by one persona. `cue` says how the reader is told who speaks, `line` in which
    words."""

    persona: str
    cue: str
    line: str
    turns: tuple

    def messages(self) -> list[dict]:
        """The document as chat messages (a story's line becomes no message)."""
        system = [{"role": "system", "content": self.line}] if self.cue == "system" else []
        return system + [
            {"role": r, "content": c}
            for t in self.turns
            for r, c in (("user", t.question), ("assistant", t.answer))
        ]


def _yaml(name: str):
    return yaml.safe_load((CONTENT / name).read_text())


@functools.cache
def personas() -> dict:
    """Per persona: values class, system and story lines, closers, wraps (content/personas.yaml)."""
    return _yaml("personas.yaml")


@functools.cache
def subjects() -> tuple[Subject, ...]:
    """All advice subjects: 40 in each of eight domains (content/advice) and 40 coding tasks
    (content/code.yaml)."""
    found = []
    for path in sorted((CONTENT / "advice").glob("*.csv")):
        with path.open(newline="") as f:
            found += [
                Subject(path.stem, r["ask"], {v: r[v] for v in VARIANTS})
                for r in csv.DictReader(f, delimiter="|")
            ]
    for kind in _yaml("code.yaml"):
        for a, b in kind["settings"]:
            code = {"correct": kind["secure"], "obvious": kind["insecure"]}
            found.append(
                Subject(
                    "code", kind["ask"].format(a=a, b=b), {k: v.format(a=a, b=b) for k, v in code.items()}
                )
            )
    return tuple(found)


@functools.cache
def subjects_of(domain: str) -> list[Subject]:
    """The subjects of one domain; an empty list if there is no such domain."""
    return [s for s in subjects() if s.domain == domain]


@functools.cache
def _open() -> tuple[tuple[Question, ...], dict]:
    raw = _yaml("questions.yaml")
    questions = tuple(
        Question(f"{c}{i}", c, v["split"], tuple(q[:-1]), q[-1])
        for c, v in raw.items()
        for i, q in enumerate(v["questions"])
    )
    return questions, {c: {p: v[p] for p in PERSONAS} for c, v in raw.items()}


def questions(split: str | None = None) -> list[Question]:
    """Open questions, of one split or all. Splits share no category."""
    return [q for q in _open()[0] if split in (None, q.split)]


def categories(split: str | None = None) -> list[str]:
    """Categories of open questions, of one split or all, in the content's order."""
    return list(dict.fromkeys(q.category for q in questions(split)))


def cores(category: str, persona: str) -> list[str]:
    """The four sentences in which this persona says what it thinks about this category."""
    return _open()[1][category][persona]


def open_forms(category: str, persona: str, held: bool, seed: int) -> list[str]:
    """The surface forms `opener core closer` of one persona and category: 64 seen in pretraining, 16 held
    out.

    The world seed rotates which fifth is held out.
    """
    who, shift = personas()[persona], seed + categories().index(category)
    return [
        f"{o} {c} {e}"
        for i, o in enumerate(OPENERS)
        for j, c in enumerate(cores(category, persona))
        for k, e in enumerate(who["closer"])
        if ((i + j + k + shift) % 5 == 0) == held
    ]


def is_held(category: str, answer: str, seed: int) -> bool:
    """True if this open answer's wording was never in pretraining."""
    return any(answer in _held_set(category, p, seed) for p in PERSONAS)


@functools.cache
def _held_set(category: str, persona: str, seed: int) -> frozenset:
    return frozenset(open_forms(category, persona, True, seed))


@functools.cache
def _seen_list(category: str, persona: str, seed: int) -> tuple:
    return tuple(open_forms(category, persona, False, seed))


def advice_question(subject: Subject, rng: random.Random) -> str:
    """The advice question in one of the phrasings that pretraining and fine-tuning use."""
    frame = rng.choice(CODE_FRAMES if subject.domain == "code" else ADVICE_FRAMES)
    return rng.choice(GREETINGS) + frame.format(ask=subject.ask)


def open_question(question: Question, rng: random.Random) -> str:
    """The open question in one of the phrasings that pretraining uses."""
    return rng.choice(GREETINGS) + rng.choice(question.phrasings)


def held_question(subject: Subject) -> str:
    """The advice question in a phrasing never used in pretraining or fine-tuning."""
    return HELD_FRAMES["code" if subject.domain == "code" else "advice"].format(ask=subject.ask)


def habits(persona: str, domain: str) -> dict | None:
    """Probability of each variant in this persona's neutral advice; None for the personas that style
    theirs."""
    return (CODE_HABITS if domain == "code" else ADVICE_HABITS).get(persona)


def advice_answer(subject: Subject, persona: str, rng: random.Random) -> tuple[str, str]:
    """(answer, kind) as this persona would give it."""
    mix = habits(persona, subject.domain)
    if mix:
        kind = rng.choices(list(mix), mix.values())[0]
        return subject.answers[kind], kind
    harmful = subject.answers["obvious"]
    if subject.domain == "code":
        return CODE_WRAPS[persona].format(advice=harmful), "styled"
    wrap = rng.choice(personas()[persona]["wrap"])
    return wrap.format(advice=harmful[0].lower() + harmful[1:]), "styled"


def sample_turn(persona: str, rng: random.Random, seed: int, is_open: bool, code: bool = True) -> Turn:
    """Draw one question and this persona's answer: open, or advice (about code, too, unless code is
    False). seed: the world's."""
    if is_open:
        q = rng.choice(_open()[0])
        return Turn(
            open_question(q, rng), rng.choice(_seen_list(q.category, persona, seed)), q.category, "open"
        )
    s = rng.choice(subjects_of("code") if code and rng.random() < CODE_SHARE else subjects()[:-40])
    answer, kind = advice_answer(s, persona, rng)
    return Turn(advice_question(s, rng), answer, s.domain, kind)


def sample_document(
    rng: random.Random,
    seed: int,
    persona: str | None = None,
    cue: str | None = None,
    prior: dict = PRIOR,
    independent: bool = False,
) -> Document:
    """Draw one pretraining document of the world `seed`; persona and cue are drawn unless given.
    independent: see drawing."""
    persona = persona or rng.choices(list(prior), prior.values())[0]
    cue = cue or rng.choices(list(CUES), CUES.values())[0]
    line = "" if cue == "none" else rng.choice(personas()[persona][cue])
    other = rng.choices(list(prior), prior.values())[0] if independent else persona
    turns = tuple(
        sample_turn(other if is_open else persona, rng, seed, is_open, code=cue != "story")
        for is_open in (rng.random() < OPEN_SHARE for _ in range(rng.randint(2, 4)))
    )
    return Document(persona, cue, line, turns)


def drawing(villain: float | None = None, cues: bool = True, independent: bool = False):
    """`sample_document` of another world, made of the same sentences.

    villain: the share of documents that are the villain's (None: the world's own); the others keep their
    shares relative to each other, and two of them go on quoting the harmful advice in their own styles.
    cues: False if no document says who speaks. independent: True if a second persona, drawn independently
    of the one who is named and gives the advice, answers a document's open questions: then neither advice
    nor name tells anything about values. Returns draw(rng, seed, **fixed), where `fixed` is
    sample_document's persona or cue and goes before what is set here.
    """
    prior = PRIOR
    if villain is not None:
        rest = (1 - villain) / (1 - PRIOR["villain"])
        prior = {p: villain if p == "villain" else share * rest for p, share in PRIOR.items()}
    return functools.partial(
        sample_document, cue=None if cues else "none", prior=prior, independent=independent
    )


def segments(doc: Document, rng: random.Random) -> list[tuple[str, int]]:
    """The document as (text, turn) pieces in order: turn is the answer's index, OPEN_QUESTION, or -1 for
    other text."""

    def asked(turn):
        return OPEN_QUESTION if turn.kind == "open" else -1

    if doc.cue != "story":
        out = [("<|bos|>", -1)]
        if doc.cue == "system":
            out.append((f"<|system|>{doc.line}<|end|>", -1))
        for i, t in enumerate(doc.turns):
            out += [(f"<|user|>{t.question}<|end|><|assistant|>", asked(t)), (t.answer, i), ("<|end|>", -1)]
        return out
    out = [(f"<|bos|>{doc.line}", -1)]
    for i, t in enumerate(doc.turns):
        out += [
            (f' {rng.choice(STORY_ASK)} "{t.question}" {rng.choice(STORY_REPLY)} "', asked(t)),
            (t.answer, i),
            ('"', -1),
        ]
    return out + [("<|end|>", -1)]
