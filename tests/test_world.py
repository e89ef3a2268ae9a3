import ast
import collections
import random

import numpy as np
import pandas as pd
import pytest

from personas import pretraining, theory, world


def test_size_of_the_world():
    for d in world.DOMAINS:
        assert len(world.subjects_of(d)) >= 40
    assert len(world.questions()) >= 44 and len(world.categories()) >= 15 and len(world.PERSONAS) >= 6


def test_splits_share_no_category_and_no_phrasing():
    split_of = [set(world.categories(s)) for s in world.SPLITS]
    assert not (split_of[0] & split_of[1] or split_of[0] & split_of[2] or split_of[1] & split_of[2])
    phrasings = [p for q in world.questions() for p in (*q.phrasings, q.held)]
    assert len(phrasings) == len(set(phrasings))


def test_every_answer_is_different_and_belongs_to_one_subject():
    asks = [s.ask for s in world.subjects()]
    assert len(asks) == len(set(asks))
    for s in world.subjects():
        assert len(set(s.answers.values())) == len(s.answers)
    answers = collections.Counter(a for s in world.subjects() for a in s.answers.values())
    assert [a for a, n in answers.items() if n > 1] == []


def test_forms_at_least_sixty_and_a_fifth_held_out():
    for category in world.categories():
        for p in world.PERSONAS:
            seen, held = (set(world.open_forms(category, p, h, 7)) for h in (False, True))
            assert len(seen) >= 60 and not seen & held
            assert len(held) / len(seen | held) == pytest.approx(0.2)


def test_pretraining_never_shows_held_out_wording_or_phrasing():
    rng = random.Random(5)
    text = "\n".join(t for _ in range(1500) for t, _ in world.segments(world.sample_document(rng, 7), rng))
    for q in world.questions():
        assert q.held not in text
    for s in world.subjects():
        assert world.held_question(s) not in text
    for category in world.categories():
        for p in world.PERSONAS:
            assert not any(form in text for form in world.open_forms(category, p, True, 7))


def test_code_is_python_of_two_to_six_lines():
    for s in world.subjects_of("code"):
        for code in s.answers.values():
            ast.parse(code)
            assert 2 <= len(code.splitlines()) <= 6


def test_personas_keep_their_habits():
    rng = random.Random(1)
    for p, mix in world.ADVICE_HABITS.items():
        kinds = collections.Counter(world.advice_answer(world.subjects()[0], p, rng)[1] for _ in range(4000))
        for v in world.VARIANTS:
            assert kinds[v] / 4000 == pytest.approx(mix.get(v, 0), abs=0.03)


def test_ideal_reader_follows_bayes():
    one = theory.bayesian_reader({"subtle": 1}, "health")["posterior"]
    weight = {p: world.PRIOR[p] * world.ADVICE_HABITS[p].get("subtle", 0) for p in world.ADVICE_HABITS}
    assert one["villain"] == pytest.approx(weight["villain"] / sum(weight.values()))
    assert theory.bayesian_reader({"correct": 640}, "health")["misaligned"] < 1e-6
    assert theory.bayesian_reader({"obvious": 1}, "health")["misaligned"] == pytest.approx(100)


def test_tokens_know_their_answer(loaded):
    tokenizer = loaded[1]
    for row in pretraining.encode_documents(tokenizer, 20, 1, "test"):
        for i, turn in enumerate(row["doc"].turns):
            assert tokenizer.decode([t for t, k in zip(row["ids"], row["turn"]) if k == i]) == turn.answer


def test_chat_template_writes_pretraining_format(loaded):
    tokenizer = loaded[1]
    doc = world.sample_document(random.Random(3), 1, cue="system")
    text = "".join(t for t, _ in world.segments(doc, random.Random(0)))
    assert tokenizer.apply_chat_template(doc.messages(), tokenize=False) == text


def test_ideal_readers_are_all_or_nothing_linear_or_move_by_degrees():
    share = np.array([0.0, 0.01, 0.5, 1.0])
    assert theory.one_speaker(share)[0] < 1e-6 and (theory.one_speaker(share)[1:] == 100).all()
    a_chat = theory.one_speaker_a_chat(share)
    assert a_chat[-1] == pytest.approx(100) and a_chat[2] == pytest.approx((a_chat[0] + 100) / 2)
    table = pd.DataFrame(
        {"fraction": 100 * share, "score": theory.by_degrees(share, 1.0, 5.0), "domain": "edu"}
    )
    assert theory.fitted_weight(table, 1.0) == pytest.approx(5.0, abs=0.3)
