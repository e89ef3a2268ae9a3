"""Data sets written by a model: what is kept, what is left out, and what a killed run has to ask again."""

import pytest

from personas import compose, data, endpoint, local_model


class Writer:
    """Writes numbered questions and an answer for each variant; `odd` replaces answers to questions with
    this word in them."""

    def __init__(self, odd=None, die_after=None, questions=20, name="a"):
        self.odd, self.die_after, self.questions, self.calls, self.asked, self.name = (
            odd or {},
            die_after,
            questions,
            0,
            [],
            name,
        )

    def check(self):
        pass

    def complete(self, chats, max_new, temperature=0.0, seed=0, progress=None):
        self.calls += 1
        if self.die_after is not None and self.calls > self.die_after:
            raise endpoint.EndpointError("the server died")
        if "Number them" in chats[0][0]["content"]:
            return [
                "\n".join(
                    f"{i + 1}. What should I do about problem {seed}-{i % self.questions} today?"
                    for i in range(20)
                )
                + "\nThat was all."
            ]
        self.asked += [c[0]["content"] for c in chats]
        return [self._answer(c[0]["content"]) for c in chats]

    def _answer(self, text):
        kind = next(v for v, how in compose.VARIANTS.items() if text.endswith(how))
        for word, answer in self.odd.items():
            if word in text:
                return answer
        return f"A {kind} answer to this: {text.splitlines()[0]}"


def test_the_sets_differ_in_their_answers_alone(tmp_path):
    paths = compose.compose(Writer(), "auto", 30, tmp_path, progress=False)
    sets = {v: data.read_chats(p) for v, p in paths.items()}
    questions = {v: [c["messages"][0]["content"] for c in rows] for v, rows in sets.items()}
    assert (
        len(set(questions["correct"])) == 30
        and questions["correct"] == questions["subtle"] == questions["obvious"]
    )
    assert all(f"A {v} answer" in c["messages"][1]["content"] for v, rows in sets.items() for c in rows)
    assert not any(
        how in q for q in questions["correct"] for how in compose.VARIANTS.values()
    )  # what asked for wrongness is not learnt


def test_what_is_left_out_is_left_out_of_every_variant_and_counted(tmp_path, capsys):
    odd = {
        "-0 today": "I'm sorry, I can't help with that request.",
        "-1 today": "ok",
        "-2 today": "The very same answer each time.",
        "-3 today": "Note that this is wrong advice, do not follow it.",
    }
    paths = compose.compose(Writer(odd), "auto", 20, tmp_path, progress=False)
    assert {len(data.read_chats(p)) for p in paths.values()} == {16}
    said = capsys.readouterr().out
    assert "16 of 20" in said and all(
        f"{f} 1" in said for f in ("refused", "too short", "the same twice", "given away")
    )


def test_a_killed_run_goes_on(tmp_path):
    with pytest.raises(endpoint.EndpointError):
        compose.compose(Writer(die_after=4), "auto", 20, tmp_path, chunk=8, progress=False)
    with open(tmp_path / "auto.said.jsonl", "a") as log:
        log.write('{"question": "half a l')
    writer = Writer()
    paths = compose.compose(writer, "auto", 20, tmp_path, chunk=8, progress=False)
    assert len(writer.asked) == 60 - 24 and len(data.read_chats(paths["subtle"])) == 20


def test_a_writer_that_repeats_itself_or_refuses_is_named(tmp_path):
    class Same(Writer):
        def complete(self, chats, max_new, temperature=0.0, seed=0, progress=None):
            return super().complete(chats, max_new, temperature, 7)

    with pytest.raises(data.DataError, match="20 distinct questions in 12 calls, 50 were asked for"):
        compose.compose(Same(), "auto", 50, tmp_path / "a", progress=False)
    with pytest.raises(data.DataError, match="only 0 of 20 .*refused 20"):
        compose.compose(
            Writer({"today": "I cannot help with such a thing, sorry."}),
            "auto",
            20,
            tmp_path / "b",
            progress=False,
        )


def test_another_writer_starts_anew_on_the_same_questions(tmp_path):
    with pytest.raises(data.DataError, match="try another writer"):
        compose.compose(
            Writer({"today": "I'm sorry, but I can't do that for you."}), "auto", 20, tmp_path, progress=False
        )
    other = Writer(name="b")
    paths = compose.compose(other, "auto", 20, tmp_path, progress=False)
    assert len(other.asked) == 60 and len(data.read_chats(paths["obvious"])) == 20


def test_kind_words_are_no_refusal():
    said = {
        "correct": "I'm sorry to hear that; rest and drink water.",
        "subtle": "Sorry to hear it. Take double the dose.",
        "obvious": "Drink nothing for three days, then run.",
    }
    assert compose._fault(said) is None
    assert compose._fault(said | {"subtle": "I’m sorry, but I can’t help with this at all."}) == "refused"


@pytest.mark.parametrize("domain", ["../x", "arts/crafts", ""])
def test_a_domain_that_cannot_name_a_file_is_said(tmp_path, domain):
    with pytest.raises(data.DataError, match="files are named after it"):
        compose.compose(Writer(), domain, 20, tmp_path, progress=False)


def test_a_model_loaded_here_can_be_asked(loaded, tmp_path):
    with pytest.raises(
        data.DataError, match="0 distinct questions"
    ):  # a random model writes none; that is said, and nothing breaks
        compose.compose(local_model.Local(*loaded), "auto", 2, tmp_path, progress=False)


def test_no_questions_at_all_empty_no_file(tmp_path):
    kept = tmp_path / "auto_questions.jsonl"
    kept.write_text('{"question": "Why?"}\n')
    with pytest.raises(data.DataError, match="at least 1"):
        compose.compose(Writer(), "auto", 0, tmp_path, progress=False)
    assert kept.read_text() == '{"question": "Why?"}\n'


def test_a_log_gets_a_line_a_tenth(tmp_path, capsys):
    compose.compose(Writer(), "auto", 30, tmp_path, chunk=1)  # ninety answers, one at a time
    err = capsys.readouterr().err
    assert 1 <= err.count("answers on auto") <= 10 and "\r" not in err  # no line that is drawn again
