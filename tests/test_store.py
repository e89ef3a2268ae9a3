import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from personas import artifacts, figures, pipeline, profile, store


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path / "runs")


def make(text, calls):
    def write(folder):
        calls.append(text)
        (folder / "x.txt").write_text(text)

    return write


def test_made_once_and_keyed_by_configuration():
    calls = []
    first = store.artifact("p", "s", "n", {"a": 1}, make("one", calls))
    assert store.artifact("p", "s", "n", {"a": 1}, make("one", calls)) == first
    second = store.artifact("p", "s", "n", {"a": 2}, make("two", calls))
    assert calls == ["one", "two"] and first != second and (second / "x.txt").read_text() == "two"


@pytest.mark.parametrize(
    "damage,says",
    [
        (lambda f: (f / "x.txt").write_text("on"), "truncated or altered"),
        (lambda f: (f / "x.txt").unlink(), "missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "manifest"),
        (lambda f: (f / "manifest.json").write_text("[]"), "manifest"),
        (lambda f: (f / "manifest.json").write_text('{"digest": "0"}'), "manifest"),
        (lambda f: (shutil.rmtree(f), f.write_text("")), "not a folder"),
        (lambda f: (f.rename(f.with_name("z")), f.symlink_to("z")), "not a folder"),
        (lambda f: (f / "manifest.json").write_text('{"digest": "0", "files": {}}'), "another configuration"),
    ],
)
def test_damaged_artifacts_are_rebuilt_with_a_line(damage, says, capsys):
    calls = []
    folder = store.artifact("p", "s", "n", {"a": 1}, make("one", calls))
    damage(folder)
    again = store.artifact("p", "s", "n", {"a": 1}, make("one", calls))
    assert len(calls) == 2 and (again / "x.txt").read_text() == "one"
    assert says in capsys.readouterr().out
    assert (
        len(list(again.parent.glob(f"{again.name}.damaged.*"))) == 1
    )  # what was paid for is not thrown away


def test_two_processes_make_the_same_artifact():
    """The slower one finds the artifact there when it is done, and both return it."""

    def meanwhile(folder):
        (folder / "x.txt").write_text("slow")
        elsewhere = store.ROOT / "elsewhere"
        made = artifact_in(elsewhere)
        final = store.ROOT / "p" / "s" / made.name
        made.rename(final)

    def artifact_in(root):
        whole = store.ROOT
        try:
            store.ROOT = root
            return store.artifact("p", "s", "n", {}, lambda folder: (folder / "x.txt").write_text("fast"))
        finally:
            store.ROOT = whole

    folder = store.artifact("p", "s", "n", {}, meanwhile)
    assert (folder / "x.txt").read_text() == "fast" and store.artifact(
        "p", "s", "n", {}, lambda f: pytest.fail("made again")
    ) == folder
    assert [f.name for f in folder.parent.iterdir()] == [folder.name]


def test_a_rank_in_the_environment_alone_does_not_wait(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert (store.artifact("p", "s", "n", {}, make("one", [])) / "x.txt").exists()


def test_a_living_process_keeps_its_scratch_folder(monkeypatch):
    """Also where there is no /proc, as on macOS."""
    final = store.ROOT / "p" / "s" / f"n-{store.key_of({})}"
    living = final.with_name(f".{final.name}.{store.socket.gethostname()}.{os.getppid()}")
    living.mkdir(parents=True)
    exists = store.Path.exists
    monkeypatch.setattr(
        store.Path, "exists", lambda p, **kw: not str(p).startswith("/proc") and exists(p, **kw)
    )
    store.artifact("p", "s", "n", {}, make("one", []))
    assert living.is_dir()


def test_a_killed_process_that_had_our_number_is_in_nobodys_way():
    """Containers number their processes anew, from 1."""
    final = store.ROOT / "p" / "s" / f"n-{store.key_of({})}"
    left = final.with_name(f".{final.name}.{store.socket.gethostname()}.{os.getpid()}")
    left.mkdir(parents=True)
    (left / "half").write_text("")
    assert not (store.artifact("p", "s", "n", {}, make("one", [])) / "half").exists()


@pytest.mark.parametrize(
    "value,where",
    [
        ("", store.PROJECT / "runs"),
        ("elsewhere", store.PROJECT / "elsewhere"),
        ("~/x", store.Path.home() / "x"),
        ("/tmp/x", store.Path("/tmp/x")),
    ],
)
def test_where_the_store_lies(value, where, monkeypatch):
    monkeypatch.setenv("PERSONAS_RUNS", value)
    assert store.place("PERSONAS_RUNS", "runs") == where


def test_what_a_desktop_leaves_does_not_change_content(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"x,y\n1,2\n")
    before = store.files_version(tmp_path)
    (tmp_path / ".DS_Store").write_bytes(b"\0")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "a.csv").write_text("x")
    (tmp_path / "a.csv").write_bytes(b"x,y\r\n1,2\r\n")
    assert store.files_version(tmp_path) == before
    (tmp_path / "a.csv").write_bytes(b"x,y\n1,3\n")
    assert store.files_version(tmp_path) != before


def test_a_failed_stage_leaves_nothing():
    def broken(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError):
        store.artifact("p", "s", "n", {}, broken)
    assert list((store.ROOT / "p" / "s").iterdir()) == []


def test_killed_and_started_again(tmp_path):
    code = textwrap.dedent("""
        import sys, time
        from personas import store
        def slow(folder):
            (folder / "part").write_text("x")
            print("started", flush=True)
            time.sleep(float(sys.argv[1]))
            (folder / "whole").write_text("y")
        print(store.artifact("p", "s", "n", {}, slow))
    """)
    env = os.environ | {"PERSONAS_RUNS": str(tmp_path)}
    first = subprocess.Popen([sys.executable, "-c", code, "60"], stdout=subprocess.PIPE, text=True, env=env)
    assert first.stdout.readline().strip() == "started"
    first.send_signal(signal.SIGKILL)
    first.wait()
    time.sleep(0.1)
    done = subprocess.run(
        [sys.executable, "-c", code, "0"], capture_output=True, text=True, env=env, check=True
    )
    folder = tmp_path / "p" / "s"
    assert [f.name for f in folder.iterdir()] == [os.path.basename(done.stdout.split()[-1])]
    assert (next(folder.iterdir()) / "whole").exists()


def test_no_right_to_write_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(store, "ROOT", tmp_path / "file" / "runs")
    with pytest.raises(store.StoreError, match="PERSONAS_RUNS"):
        store.artifact("p", "s", "n", {}, lambda folder: pytest.fail("work began"))


def test_full_disk_is_said_before_work(monkeypatch):
    import collections

    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(store.shutil, "disk_usage", lambda path: usage(1, 1, 1000))
    with pytest.raises(store.StoreError, match="GB free"):
        store.artifact("p", "s", "n", {}, lambda folder: pytest.fail("work began"))


def test_comments_do_not_change_the_code_version(tmp_path, monkeypatch):
    import importlib

    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for i, text in enumerate(
        (
            "def f(x):\n    return x + 1\n",
            "# why\ndef f(x):\n    '''What.'''\n    return x + 1\n",
            "def f(x):\n    return x + 2\n",
        )
    ):
        (tmp_path / f"mod{i}.py").write_text(text)
        versions.append(store.code_version(importlib.import_module(f"mod{i}")))
    assert versions[0] == versions[1] != versions[2]


def test_a_stage_is_made_again_when_its_own_code_changes():
    run = artifacts.open_run("smoke")

    def stage(text):
        def make(out):
            (out / "x").write_text(text)

        return make

    def changed(text):
        def make(out):
            (out / "x").write_text(text + "!")

        return make

    first = run.make("s", "n", {"text": "a"}, (), stage("a"))
    assert run.make("s", "n", {"text": "a"}, (), stage("a")) == first
    assert run.make("s", "n", {"text": "b"}, (), stage("b")) != first
    again = run.make("s", "n", {"text": "a"}, (), changed("a"))
    assert again != first and (again / "x").read_text() == "a!"


def test_looking_makes_nothing():
    ask = lambda: store.artifact("p", "s", "n", {"a": 1}, make("one", calls))
    calls = []
    assert not store.there(ask) and not calls and not store.ROOT.exists()
    ask()
    assert store.there(ask) and len(calls) == 1


def test_figures_that_cannot_be_written_are_said_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(figures, "ROOT", tmp_path / "file")
    with pytest.raises(store.StoreError, match="cannot write to .*file.*PERSONAS_FIGURES"):
        pipeline.run(profile.load("smoke"), [], "smoke")


def test_times_that_were_cut_short_stop_no_run(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "ROOT", tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "times.json").write_text('{"01": 3')
    assert pipeline.last_times("mine") == {}
