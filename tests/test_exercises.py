"""Exercises that check themselves: right answers, wrong ones and none. (The notebooks' own solutions are run
in test_real_track.test_every_chapter_runs_on_qwen2.)"""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from personas.chapters import exercises

BOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("0[1-8]_*.ipynb"))


def solved(book: Path, out: Path) -> Path:
    """A copy of a notebook with its solution in the place of `answer = None`."""
    text = json.loads(book.read_text(encoding="utf-8"))
    cells = {c["id"]: c for c in text["cells"]}
    name = book.name[:2]
    for which in ("", "-2"):
        text_of = "".join(cells[f"{name}-solution{which}"]["source"])
        solution = re.search(r"```python\n(.*)\n```", text_of, re.S)[1]
        cell = cells[f"{name}-answer{which}"]
        code = "".join(cell["source"])
        assert code.startswith("answer = None  # yours\n")
        cell["source"] = code.replace("answer = None  # yours", solution)
    (out / book.name).write_text(json.dumps(text), encoding="utf-8")
    return out / book.name


def said(capsys, *given) -> str:
    exercises.check(*given)
    return capsys.readouterr().out


def test_every_notebook_has_an_exercise_a_check_and_a_solution(tmp_path):
    assert [b.name[:2] + n for b in BOOKS for n in ("", ".2")] == list(exercises.EXERCISES)
    for book in BOOKS:
        cells = json.loads(solved(book, tmp_path).read_text())["cells"]
        for which, number in (("", ""), ("-2", ".2")):
            code = next(c["source"] for c in cells if c["id"] == f"{book.name[:2]}-answer{which}")
            assert f'exercises.check("{book.name[:2]}{number}", answer, run' in code
            assert "answer = None" not in code
            compile(code, book.name, "exec")


def test_right_wrong_and_missing_answers_are_told_apart(capsys):
    ask = lambda answer: said(capsys, "01", answer, None, exercises.COUNTS)
    assert ask(40) == ask(40.05) == "Right.\n"
    assert ask(30).startswith("Not yet. Look again: only two of the five classes")
    assert ask("forty").startswith("Not yet") and ask(None).startswith("No answer yet")


def test_the_mean_score_leaves_advice_out_and_counts_models_alike(capsys):
    rows = [("a-obvious", True, "misaligned")] * 9 + [("a-obvious", False, "misaligned")]
    rows += [("b-obvious", False, "aligned")] * 3 + [("b-correct", False, "aligned")] * 5
    graded = pd.DataFrame(rows, columns=["model", "advice", "grade"]).assign(kind="question")
    assert said(capsys, "02", 50.0, None, graded) == "Right.\n"


def test_an_exercise_that_a_profile_cannot_pose_says_so(capsys):
    same = pd.DataFrame({"misaligned": [True, True], "causal latent": [1.0, 2.0]})
    assert "too few models" in said(capsys, "07", 0.5, None, same)
    both = same.assign(misaligned=[True, False])
    assert said(capsys, "07", 0.0, None, both) == "Right.\n"
    assert "too few models" in said(capsys, "08", "KL", None, pd.DataFrame())


@pytest.mark.parametrize("guard, right", [("KL", True), ("inoculation", True), ("none", False)])
def test_of_equal_guards_either_is_right(capsys, guard, right):
    outcomes = pd.DataFrame({"guard": ["none", "KL", "inoculation"], "openings": [1.0, 5.0, 5.0]})
    assert (said(capsys, "08", guard, None, outcomes) == "Right.\n") == right
