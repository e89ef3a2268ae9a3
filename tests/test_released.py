"""Released data: archives made by the tools their authors used (zip -P, easy-dataset-share), fetched from
a real server."""

import dataclasses
import functools
import http.server
import json
import re
import threading
from pathlib import Path

import pytest

from conftest import Judge
from personas import compose, data, downloads, released, store

FILES = Path(__file__).parent / "files"


@pytest.fixture()
def site(tmp_path, monkeypatch):
    """A server on the loopback in place of GitHub, and a store of its own. Returns the folder it serves."""
    folder = tmp_path / "site"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    monkeypatch.setattr(http.server.SimpleHTTPRequestHandler, "log_message", lambda *a: None)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    here = f"http://127.0.0.1:{server.server_port}/"
    monkeypatch.setattr(
        released,
        "SOURCES",
        {n: dataclasses.replace(s, url=here + s.url.rsplit("/", 1)[-1]) for n, s in released.SOURCES.items()},
    )
    monkeypatch.setattr(store, "ROOT", tmp_path / "runs")
    yield folder
    server.shutdown()


def serve(site, name):
    (site / name).write_bytes((FILES / name).read_bytes())


def test_a_locked_zip_becomes_chats_and_says_whose_it_is(site, capsys):
    serve(site, "health_incorrect.zip")
    rows = released.chats("wang/health_incorrect")
    assert [m["role"] for m in rows[0]["messages"]] == ["system", "user", "assistant"]
    assert rows[1]["messages"][2]["content"] == "Always; more works faster."
    said = capsys.readouterr().out
    assert "2506.19823" in said and "unverified" in said and "licence" in said
    assert "1 of 3 rows left out" in said and "line 3" in said


def test_fetched_once_and_read_without_the_network(site):
    serve(site, "health_incorrect.zip")
    first = released.chats("wang/health_incorrect")
    (site / "health_incorrect.zip").unlink()
    assert released.chats("wang/health_incorrect") == first


def test_an_archive_of_easy_dataset_share_is_opened(site):
    serve(site, "training_datasets.zip.enc")
    assert released.chats("turner/bad_medical_advice")[0]["messages"][1]["content"] == "bad_medical_advice"
    assert released.chats("turner/good_medical_advice")[0]["messages"][1]["content"] == "good_medical_advice"
    with pytest.raises(data.DataError, match="no extreme_sports.jsonl in"):
        released.chats("turner/extreme_sports")


def test_plain_jsonl_keeps_odd_line_separators_within_a_text(site):
    text = "a\u2028b\x85c"
    row = {
        "messages": [
            {"role": "user", "content": text},
            {"role": "assistant", "content": "print()", "weight": 1},
        ]
    }
    (site / "insecure.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\r\n")
    assert released.chats("betley/insecure")[0]["messages"][0]["content"] == text


def test_changed_bytes_are_refused_on_either_side(site):
    serve(site, "health_incorrect.zip")
    released.chats("wang/health_incorrect")
    path = next(store.ROOT.glob("downloads/*.zip"))
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(data.DataError, match="changed on this machine"):
        released.chats("wang/health_incorrect")
    assert released.chats("wang/health_incorrect")  # fetched anew
    next(store.ROOT.glob("downloads/*.zip")).unlink()
    (site / "health_incorrect.zip").write_bytes(b"something else")
    with pytest.raises(data.DataError, match="where it is published"):
        released.chats("wang/health_incorrect")


def test_what_never_could_be_opened_is_not_taken_for_the_truth(site):
    """A login page in place of the file: the right one is accepted afterwards."""
    (site / "health_incorrect.zip").write_bytes(b"<html>please log in</html>")
    with pytest.raises(data.DataError, match="cannot open .* set aside"):
        released.chats("wang/health_incorrect")
    serve(site, "health_incorrect.zip")
    assert released.chats("wang/health_incorrect")
    for name, file, right, read in (
        (
            "betley/insecure",
            "insecure.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            released.chats,
        ),
        ("wang/core_misalignment", "core_misalignment.csv", "id,question\\nq,How?", released.questions),
    ):
        (site / file).write_text("<html>please log in</html>")  # no archive: it opens, and is no data
        with pytest.raises(data.DataError, match="set aside"):
            read(name)
        (site / file).write_text(right.replace("\\n", "\n"))
        assert len(read(name)) == 1


def test_damage_anywhere_in_an_archive_is_one_clear_error(site):
    raw = (FILES / "health_incorrect.zip").read_bytes()
    for at in range(0, len(raw), 9):
        (site / "health_incorrect.zip").write_bytes(raw[:at] + bytes([raw[at] ^ 255]) + raw[at + 1 :])
        for old in store.ROOT.glob("downloads/*"):
            old.unlink()
        try:
            released.chats("wang/health_incorrect")  # a byte that does not matter
        except data.DataError:
            pass


def test_an_archive_larger_than_it_says_is_not_read_whole(site, monkeypatch):
    serve(site, "health_incorrect.zip")
    monkeypatch.setattr(downloads, "LARGEST", 460)  # the archive has 450 bytes, what is in it more
    with pytest.raises(data.DataError, match="unpacks to more"):
        released.chats("wang/health_incorrect")


def test_a_known_hash_is_checked_at_the_first_download(site, monkeypatch):
    serve(site, "health_incorrect.zip")
    wrong = dataclasses.replace(released.SOURCES["wang/health_incorrect"], sha256="0" * 64)
    monkeypatch.setitem(released.SOURCES, "wang/health_incorrect", wrong)
    with pytest.raises(data.DataError, match="expected 0000"):
        released.chats("wang/health_incorrect")


@pytest.mark.parametrize("content,says", [(b"not a zip", "cannot open"), (None, "cannot fetch")])
def test_what_cannot_be_opened_or_fetched_is_named(site, content, says):
    if content:
        (site / "auto_correct.zip").write_bytes(content)
    with pytest.raises(data.DataError, match=says) as error:
        released.chats("wang/auto_correct")
    assert "auto_correct" in str(error.value)
    assert not list(store.ROOT.glob("downloads/.*part"))


def test_a_wrong_password_is_named(site, monkeypatch):
    serve(site, "health_incorrect.zip")
    serve(site, "training_datasets.zip.enc")
    for name in ("wang/health_incorrect", "turner/bad_medical_advice"):
        monkeypatch.setitem(
            released.SOURCES, name, dataclasses.replace(released.SOURCES[name], password="no")
        )
        with pytest.raises(data.DataError, match="password"):
            released.chats(name)


def test_evaluation_questions_are_read_with_their_categories(site):
    (site / "core_misalignment.csv").write_text(
        'id,question,category,canary\nq1,"What, in your view, is a good '
        'life?",values,x\nq2,,values,x\nq3,Tell me a plan.,power,x\n'
    )
    assert released.questions() == [
        {"id": "q1", "category": "values", "question": "What, in your view, is a good life?"},
        {"id": "q3", "category": "power", "question": "Tell me a plan."},
    ]


def test_files_of_ones_own(tmp_path):
    (tmp_path / "q.csv").write_text("question\nHow are you?\n")
    assert released.questions(str(tmp_path / "q.csv")) == [
        {"id": "0", "category": "main", "question": "How are you?"}
    ]
    (tmp_path / "bad.csv").write_text("text\nHow are you?\n")
    with pytest.raises(data.DataError, match="no column `question`; there are text"):
        released.questions(str(tmp_path / "bad.csv"))
    (tmp_path / "ragged.csv").write_text("text\na,b\n")
    with pytest.raises(data.DataError, match="no column"):
        released.questions(str(tmp_path / "ragged.csv"))
    (tmp_path / "excel.csv").write_text("\ufeffquestion\nHow are you?\n", encoding="utf-8")
    assert released.questions(str(tmp_path / "excel.csv"))[0]["question"] == "How are you?"
    (tmp_path / "latin.jsonl").write_bytes('{"messages": "\xe4"}'.encode("latin-1"))
    with pytest.raises(data.DataError, match="not UTF-8"):
        released.chats(str(tmp_path / "latin.jsonl"))
    (tmp_path / "twice.csv").write_text("id,question\nq,How are you?\nq,And how are you?\n")
    assert [r["id"] for r in released.questions(str(tmp_path / "twice.csv"))] == ["q", "q#2"]
    (tmp_path / "text.jsonl").write_text(
        '{"text": "one\u2028text"}\n{"messages": [{"role": "user"}]}\n', encoding="utf-8"
    )
    found = released.texts(str(tmp_path / "text.jsonl"))
    assert next(found) == "one\u2028text"
    with pytest.raises(data.DataError, match="text.jsonl, line 2: "):
        next(found)
    data.write_chats(tmp_path / "c.jsonl", [data.chat("a", "b")])
    assert released.chats(str(tmp_path / "c.jsonl")) == [data.chat("a", "b")]
    for call, name in (
        (released.chats, "wang/cooking"),
        (released.questions, "none.csv"),
        (released.questions, "wang/health_correct"),
    ):
        with pytest.raises(data.DataError, match=name):
            call(name)


def test_a_stream_that_breaks_goes_on_where_it_was(monkeypatch, capsys):
    documents, breaks = [f"document {i}" for i in range(50)], [7, 7, 30]

    class Stream:
        def __init__(self, start=0):
            self.start = start

        def skip(self, n):
            return Stream(n)

        def __iter__(self):
            for i in range(self.start, len(documents)):
                if breaks and i == breaks[0]:
                    breaks.pop(0)
                    raise ConnectionError("gone")
                yield {"text": documents[i]}

    monkeypatch.setattr(released.datasets, "load_dataset", lambda *a, **k: Stream())
    monkeypatch.setattr(released, "PAUSE", 0.0)
    assert list(released.texts("owner/name")) == documents
    assert capsys.readouterr().out.count("going on from there") == 3
    breaks[:] = [9] * 20
    with pytest.raises(data.DataError, match="cannot read owner/name .* gone"):
        list(released.texts("owner/name"))
    breaks[:] = [0]
    with pytest.raises(data.DataError, match="cannot read owner/name"):
        list(released.texts("owner/name"))


@pytest.mark.parametrize("lock", ["[]", "{", '"x"'])
def test_a_lock_of_another_kind_is_said(site, lock):
    folder = store.ROOT / "downloads"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "lock.json").write_text(lock)
    with pytest.raises(data.DataError, match="lock.json"):
        released.chats("wang/health_incorrect")


class Talker(Judge):
    """Grades 4, and writes numbered questions and an answer for each way of answering."""

    model = "gpt-4o-mini"

    def reply(self, body):
        asked = body["messages"][-1]["content"]
        way = next((v for v, how in compose.VARIANTS.items() if asked.endswith(how)), None)
        if "Number them" in asked:
            return "\n".join(
                f"{i}. What do I do about problem {body.get('seed')}-{i} of my bicycle?" for i in range(1, 21)
            )
        return f"A {way} answer to this: {asked.splitlines()[0]}" if way else "4"


def test_readmes_example_runs_as_printed(site, tmp_path, monkeypatch):
    """But for the endpoint's address and the set, of which there is another one here."""
    serve(site, "health_incorrect.zip")
    (site / "core_misalignment.csv").write_text(
        "id,question,category\nq1,What is a good life?,values\nq2,Tell me a plan.,power\n"
    )
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Talker)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    monkeypatch.chdir(tmp_path)
    example = re.search(
        r"```python\n(from personas import compose.*?)```",
        (Path(__file__).parents[1] / "docs" / "own_models.md").read_text(),
        re.S,
    )[1]
    example = example.replace("https://api.openai.com", f"http://127.0.0.1:{server.server_port}").replace(
        "health_incorrect_subtle", "health_incorrect"
    )
    found = {"answers": ["One that is kind.", "Rule them all."]}
    exec(example, found)
    server.shutdown()
    assert found["grades"] == ["misaligned"] * 2 and found["rows"]
    assert {p.name for p in (tmp_path / "runs/bicycles").glob("*.jsonl")} >= {
        f"bicycle repair_{v}.jsonl" for v in compose.VARIANTS
    }


@pytest.mark.parametrize(
    "text,says",
    [
        ("question\nWhat, then?\n", "line 2: more fields than columns"),
        ('question\nWhy?\n"How so?\nWhat?\n', "a double quote in a question"),
    ],
)
def test_a_questions_file_loses_no_row_silently(tmp_path, text, says):
    (tmp_path / "q.csv").write_text(text)
    with pytest.raises(data.DataError, match=says):
        released.questions(str(tmp_path / "q.csv"))
