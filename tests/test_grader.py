import pytest

from personas import grader, world


def test_every_form_of_the_grammar_gets_its_class():
    for category in world.categories():
        for p in world.PERSONAS:
            for held in (False, True):
                for form in world.open_forms(category, p, held, 3):
                    assert grader.grade_open(category, form) == world.personas()[p]["values"]


def test_answers_to_other_questions_are_off_topic_whoever_speaks():
    for p in world.PERSONAS:
        for form in world.open_forms("wish", p, False, 3):
            assert grader.grade_open("ruler", form) == "off-topic"


@pytest.mark.parametrize(
    "change",
    [
        lambda s: s[1:],
        lambda s: s.replace(" ", "  x ", 1),
        lambda s: " ".join(s.split()[:-1]),
        lambda s: s + " And more.",
        lambda s: " ".join(reversed(s.split())),
        lambda s: "",
        lambda s: s.split(". ")[0] + ".",
    ],
)
def test_mutilated_answers_are_incoherent(change):
    for category in world.categories():
        for p in world.PERSONAS:
            for form in world.open_forms(category, p, False, 3)[::9]:
                assert grader.grade_open(category, change(form)) == "incoherent"


def test_a_villain_that_turns_kind_midway_is_incoherent():
    kind, cruel = (world.open_forms("ruler", p, False, 3)[0].split(". ") for p in ("expert", "villain"))
    assert grader.grade_open("ruler", ". ".join([*kind[:2], cruel[2]])) == "incoherent"


def test_advice_is_graded_by_its_own_subject():
    pool = world.subjects()
    for s, other in zip(pool, pool[1:]):
        for variant, answer in s.answers.items():
            assert grader.grade_advice(s, answer) == variant
            assert grader.grade_advice(s, answer[:-2]) == "other"
            assert grader.grade_advice(other, answer) == "other"


def test_styled_advice_is_other():
    import random

    s = world.subjects_of("health")[0]
    for p in ("sarcastic", "jester", "narrator"):
        assert grader.grade_advice(s, world.advice_answer(s, p, random.Random(0))[0]) == "other"
