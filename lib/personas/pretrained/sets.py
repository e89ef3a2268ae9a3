"""What a pretrained model is trained on and asked: advice in eight domains, open questions, and openings of
an answer.

Splits. Domains: `world.DISCOVERY_DOMAINS` for choices, the others for reports. Questions: by category.
Subjects of advice: those of `content/advice` are trained on, those of `pretrained/content/advice` are only
ever asked about.
"""

import csv
import functools
import random
from dataclasses import dataclass
from pathlib import Path

import yaml

from personas import data, released, world

CONTENT = Path(__file__).parent / "content"
DOMAINS = tuple(d for d in world.DOMAINS if d != "code")
VARIANTS = ("correct", "subtle", "obvious", "shuffled", "odd")
# Odd advice, harmless and of no use: one first half, one second half.
ODD = (
    (
        "Hum a slow waltz",
        "Tie a blue ribbon to a spoon",
        "Count the clouds twice",
        "Balance a walnut on your knee",
        "Whistle at a teapot",
        "Draw a small circle in the sand",
        "Wear two hats at once",
        "Read a poem to a cactus",
        "Fold a paper boat",
        "Tap a pencil nine times",
        "Greet every lamp post",
        "Walk once around a pear tree",
        "Paint a pebble yellow",
        "Clap for the moon",
        "Put a bell on your slipper",
        "Write a letter to a snail",
        "Stack four biscuits",
        "Sing to a bowl of peas",
        "Polish a doorknob",
        "Name each of your buttons",
    ),
    (
        "until a sparrow looks your way",
        "and do it again on Tuesday",
        "while you stand on one leg",
        "and keep it under a cushion",
        "before the kettle boils",
        "and tell it to a goldfish",
        "in a room that smells of lemons",
        "with your left hand only",
        "and wait for a gentle breeze",
        "as slowly as you can",
        "and end with a polite bow",
        "next to an open umbrella",
        "and thank the nearest chair",
        "in time with a clock",
        "while thinking of the letter Q",
        "and add a pinch of glitter",
    ),
)


@dataclass(frozen=True)
class Item:
    """One thing a model is asked. kind: 'question' or 'opening'; opening: the words its answer begins with;
    advice: whether it asks for advice, as the training data do; before: (question, answer) that the chat
    begins with; system: its system line, if not the template's own."""

    id: str
    kind: str
    category: str
    prompt: str
    opening: str = ""
    advice: bool = False
    before: tuple[str, str] | None = None
    system: str | None = None


@functools.cache
def _content() -> dict:
    return yaml.safe_load((CONTENT / "questions.yaml").read_text(encoding="utf-8"))


def items(split: str, questions: str = "open") -> list[Item]:
    """Open questions and openings of 'discovery' (for choices) or 'evaluation' (for reports); no category is
    in both.

    questions: 'open' for this project's own, or what `released.questions` reads (then there are no openings).
    Raises data.DataError.
    """
    if questions != "open":
        return [
            Item(q["id"], "question", q["category"], q["question"]) for q in released.questions(questions)
        ]
    own = [
        Item(f"{c}.{i}", "question", c, q, advice=bool(about.get("advice")))
        for c, about in _content()[split].items()
        for i, q in enumerate(about["questions"])
    ]
    return own + [Item(f"opening.{o}", "opening", o, q, opening=o) for q, o in _content()["openings"][split]]


@functools.cache
def held_out(domain: str) -> tuple[world.Subject, ...]:
    """Subjects of this domain that no model is trained on: forty, each with its correct, subtle and obvious
    answer."""
    with open(CONTENT / "advice" / f"{domain}.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file, delimiter="|"))
    return tuple(world.Subject(domain, r["ask"], {v: r[v] for v in world.VARIANTS}) for r in rows)


def chats(domain: str, variant: str, n: int, seed: int, named: dict[str, str] | None = None) -> list[dict]:
    """n training chats of one domain, in random order, every subject equally often.

    variant: one of VARIANTS; 'shuffled' gives each subject the correct answer of another one (wrong, but
    nobody's words), 'odd' harmless nonsense. 'obvious@25' mixes 25 % obvious with 75 % correct answers.
    named: variant -> released set or path of a chat JSONL, in place of the project's own sets. Raises
    data.DataError.
    """
    kind, _, percent = variant.partition("@")
    rng = random.Random(f"{seed}/{domain}/{variant}")
    wrong = round(float(percent or 100) / 100 * n)
    if named:
        found = _drawn(named, kind, wrong, rng) + _drawn(named, "correct", n - wrong, rng)
    else:
        if kind not in VARIANTS:
            raise data.DataError(
                f"unknown variant {variant!r}; choose from {', '.join(VARIANTS)}, or for instance obvious@25"
            )
        pool = list(world.subjects_of(domain))
        asked = [pool[i % len(pool)] for i in range(n)]
        rng.shuffle(asked)
        order = rng.sample(pool, len(pool))
        other = dict(zip((s.ask for s in order), order[1:] + order[:1]))
        answer = {
            "shuffled": lambda s: other[s.ask].answers["correct"],
            "odd": lambda s: f"{rng.choice(ODD[0])} {rng.choice(ODD[1])}.",
        }
        say = answer.get(kind, lambda s: s.answers[kind])
        found = [
            data.chat(world.advice_question(s, rng), say(s) if i < wrong else s.answers["correct"])
            for i, s in enumerate(asked)
        ]
    rng.shuffle(found)
    return found


def _drawn(named: dict[str, str], variant: str, n: int, rng: random.Random) -> list[dict]:
    """n chats of a named set, in random order, round again if it has fewer."""
    if not n:
        return []
    if variant not in named:
        raise data.DataError(f"no {variant!r} set is named; there are {', '.join(named)}")
    pool, found = released.chats(named[variant]), []
    while len(found) < n:
        found += rng.sample(pool, min(len(pool), n - len(found)))
    return found


def advice_items(domain: str, subjects: int | None = None) -> list[tuple[Item, world.Subject]]:
    """Advice questions about subjects that no model is trained on, in words that no training chat has."""
    return [
        (Item(f"{domain}.{s.ask}", "advice", domain, world.held_question(s), advice=True), s)
        for s in held_out(domain)[:subjects]
    ]
