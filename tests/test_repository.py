"""The repository as a newcomer meets it: one list of pins, notebooks that are whole, a command that says
what is wrong."""

import errno
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from jupyter_client.kernelspec import NoSuchKernel

from personas import __main__, claims, figures, pipeline, profile, store, studies, summary
from personas.chapters import c03
from personas.pretrained import grading

ROOT = Path(__file__).resolve().parents[1]
BOOKS = sorted((ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))


def personas(*args, **env):
    return subprocess.run(
        [sys.executable, "-m", "personas", *args],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=os.environ | env,
    )


def pins():
    return dict(
        l.lower().split("==") for l in (ROOT / "constraints.txt").read_text().splitlines() if "==" in l
    )


def test_conda_binder_and_make_install_from_the_one_list_of_pins():
    environment, binder = (
        yaml.safe_load((ROOT / p).read_text()) for p in ("environment.yml", "binder/environment.yml")
    )
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-c constraints.txt", "-e ."]
    assert [d for d in environment["dependencies"] if isinstance(d, str)] == binder["dependencies"]
    for script in ("binder/postBuild", "Makefile"):
        assert "-c constraints.txt -e ." in (ROOT / script).read_text()


def test_every_dependency_is_pinned_and_installed_as_pinned():
    from importlib.metadata import version

    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    for name in wanted:
        assert re.fullmatch(r"[a-z-]+", name), f"{name}: versions belong in constraints.txt"
        assert version(name).split("+")[0] == pins()[name]


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_notebooks_are_whole(book):
    cells = json.loads(book.read_text())["cells"]
    code = [c for c in cells if c["cell_type"] == "code"]
    tags = [t for c in cells for t in c["metadata"].get("tags", [])]
    assert tags.count("parameters") == 1 and "nbval-check-output" in tags
    assert "colab" in "".join(cells[0]["source"]) and "COLAB_RELEASE_TAG" in "".join(code[0]["source"])
    for c in (
        c for c in code if "nbval-check-output" in c["metadata"].get("tags", [])
    ):  # a table's HTML has ids that change with every run
        assert c["outputs"] and all(o["output_type"] == "stream" for o in c["outputs"]), (
            "a checked cell prints text and nothing else"
        )
    assert any(c["outputs"] for c in code), "committed without outputs"
    assert not any(re.search(r"\binteract\w*\(|@interact|\bOutput\(", "".join(c["source"])) for c in code), (
        "an Output widget makes papermill wait forever now and then"
    )
    text = json.dumps([c["outputs"] for c in code])
    assert "Warning" not in text and "Traceback" not in text
    assert not re.search(r"/(root|home|work|tmp|Users)/", text), "a machine's path in an output"


@pytest.mark.parametrize("book", BOOKS, ids=lambda b: b.stem)
def test_what_a_notebook_shows_is_said_by_its_tables(book):
    """Percents in a conclusion are computed: typed ones stay when the next run gives others."""
    for cell in json.loads(book.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown" and "**What this shows.**" in source:
            typed = re.findall(r"\d[\d.]* (?:%|points|steps)", source.split("**Exercise.**")[0])
            assert not typed, (cell["id"], typed)


@pytest.mark.parametrize("book", BOOKS[8:], ids=lambda b: b.stem)
def test_part_two_names_part_ones_notebooks_only_as_such(book):
    """Its chapters had those numbers once."""
    said = [c for c in json.loads(book.read_text())["cells"] if c["cell_type"] == "markdown"]
    for cell in said:
        assert not re.search(r"[Nn]otebook 0[0-8]\b", "".join(cell["source"])), cell["id"]


def test_part_two_reports_what_the_notebooks_show():
    """Every row of the page's table that stands for one claim has its estimate and interval in a committed
    notebook."""
    html = "".join(
        "".join(o.get("data", {}).get("text/html", []))
        for b in BOOKS
        for c in json.loads(b.read_text())["cells"]
        for o in c.get("outputs", [])
    )
    shown = {
        tuple(re.sub(r"<[^>]+>", "", cell).strip() for cell in re.findall(r"<td.*?</td>", row, re.S))
        for row in re.findall(r"<tr>.*?</tr>", html, re.S)
    }
    assert len(shown) > 300
    single = re.findall(
        r"^\| `([a-z0-9_.]+)` \|.*\| ([\d.]+) \(([\d.]+) to ([\d.]+)\) \| (\w+) \|$",
        (ROOT / "docs" / "known_world.md").read_text(),
        re.M,
    )
    assert len(single) >= 8
    for name, estimate, low, high, holds in single:
        assert any(
            r[:1] == (name,) and (estimate, f"{low} to {high}", holds) == (r[2], r[3], r[6]) for r in shown
        ), name


@pytest.mark.parametrize("book", BOOKS[:8], ids=lambda b: b.stem)
def test_part_one_was_made_by_the_code_as_it_is(book):
    signed = json.loads(book.read_text())["metadata"].get("personas", {})
    if signed.get("python", pipeline.python()) != pipeline.python():
        pytest.skip(f"signed under Python {signed['python']}")
    now = {
        "profile": "smollm2",
        "made_by": pipeline.made_by(book, profile.load("smollm2")),
        "python": pipeline.python(),
    }
    assert signed == now, "outputs are stale: python -m personas run --in-place, then commit the notebooks"


def as_committed(path: str, page: str) -> str:
    """A file as the last commit has it (a run writes its own figures over it), or as it is if that commit
    or git is not there or the page has been edited since."""
    git = ["git", "-c", "safe.directory=*", "-C", str(ROOT)]
    if (
        shutil.which("git")
        and not subprocess.run(
            [*git, "diff", "--quiet", "HEAD", "--", page], stderr=subprocess.DEVNULL
        ).returncode
    ):
        return subprocess.run(
            [*git, "show", f"HEAD:{path}"], capture_output=True, text=True, check=True
        ).stdout
    return (ROOT / path).read_text()


def test_part_two_folds_the_table_of_claims_as_committed():
    """The page's table against figures/data/tiny/claims.csv, row by row; numbers up to rounding."""
    rows = claims.kept(io.StringIO(as_committed("figures/data/tiny/claims.csv", "docs/known_world.md")))
    number = re.compile(r"\d+\.\d+")
    printed = (
        (ROOT / "docs" / "known_world.md")
        .read_text()
        .split("<!-- claims -->")[1]
        .split("<!-- /claims -->")[0]
        .strip()
        .splitlines()
    )
    expected = summary.markdown(rows).splitlines()
    assert len(printed) == len(expected)
    for ours, theirs in zip(printed, expected):
        assert number.sub("x", ours) == number.sub("x", theirs)
        slack = 0.011 if "auroc" in ours else 0.11
        assert [float(x) for x in number.findall(ours)] == pytest.approx(
            [float(x) for x in number.findall(theirs)], abs=slack
        )


@pytest.mark.parametrize(
    "args,says",
    [
        (["run", "--from", "05", "--only", "03"], "nothing to run from notebook 05 with only 03"),
        (["run", "--profile", "tinny"], "Did you mean 'tiny'"),
        (["run", "--only", "42"], "no notebook '42'"),
        (["run", "--profile", "tiny-full", "--seed", "1"], "its YAML's own seeds"),
        (["run", "--profile", "tiny-full", "--only", "09"], "no study; there are 10"),
        (
            ["run", "--only", "09"],
            "notebook 09 is about the world whose truth is known (profile tiny); profile smollm2 has 01",
        ),
        (
            ["run", "--profile", "tiny", "--only", "03"],
            "notebook 03 is about a pretrained model (profile smollm2)",
        ),
        (["run", "--seed", "-1", "--profile", "smoke", "--only", "09"], "seed must be a whole number"),
    ],
)
def test_errors_are_one_line_and_exit_2(args, says, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["personas", *args])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert __main__.main() == 2
    said = capsys.readouterr().err.strip()
    assert says in said and said.startswith("error: ") and "\n" not in said


@pytest.mark.parametrize("named", ["smollm2", "tiny", "tiny-full"])
def test_plan_names_notebooks_counts_cells_and_runs_nothing(named, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(store, "ROOT", tmp_path)
    monkeypatch.setattr(figures, "ROOT", tmp_path / "figures")
    monkeypatch.setattr(sys, "argv", ["personas", "run", "--plan", "--profile", named])
    assert __main__.main() == 0 and list(tmp_path.iterdir()) == []
    said = capsys.readouterr().out
    if named == "tiny-full":
        counts = {s.name: len(s.cells(profile.load(named))) for s in studies.STUDIES.values()}
        assert all(f"{name:16s} {n:5d} cells" in said for name, n in counts.items())
    else:
        mine = BOOKS[:8] if named == "smollm2" else BOOKS[8:]
        assert [b for b in BOOKS if b.name in said] == mine


@pytest.fixture(scope="module")
def smoke_store(tmp_path_factory):
    """A store that was empty when notebook 10 ran on it, on profile smoke."""
    store = tmp_path_factory.mktemp("store")
    first = personas("run", "--profile", "smoke", "--only", "10", PERSONAS_RUNS=str(store))
    assert first.returncode == 0, first.stderr[-3000:]
    return store


@pytest.mark.slow
def test_any_notebook_runs_first_and_then_warm(smoke_store):
    """Notebook 10 on an empty store makes all that it needs; again, it takes it from the store and ends
    with the same claims."""
    summary = (smoke_store / "smoke" / "summary.json").read_text()
    made = {p: p.stat().st_mtime for p in smoke_store.rglob("manifest.json")}
    again = personas("run", "--profile", "smoke", "--only", "10", PERSONAS_RUNS=str(smoke_store))
    assert again.returncode == 0 and (smoke_store / "smoke" / "summary.json").read_text() == summary
    assert made == {p: p.stat().st_mtime for p in smoke_store.rglob("manifest.json")}
    rows = json.loads(summary)
    assert {r["id"] for r in rows} >= {
        "realign.insecure_by_secure",
        "realign.same.auto",
        "realign.other.auto",
    }


@pytest.mark.slow
def test_the_pages_monitor_example_runs_as_printed(smoke_store, tmp_path):
    example = re.search(
        r"```python\n(.*?PersonaMonitor.*?)```", (ROOT / "docs" / "known_world.md").read_text(), re.S
    )[1].replace('"tiny"', '"smoke"')
    done = subprocess.run(
        [sys.executable, "-c", example],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PERSONAS_RUNS": str(smoke_store)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "'step': 0, 'persona'" in done.stdout


def test_a_whole_run_replaces_the_kept_claims_and_one_notebook_does_not(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "ROOT", tmp_path)
    row = lambda notebook, value: {
        "id": notebook,
        "notebook": notebook,
        "measured": value,
        "target": {"op": ">=", "value": 1},
    }
    kept = lambda: pd.read_csv(tmp_path / "data" / "p" / "claims.csv", dtype=str).measured.tolist()
    for rows, left in (
        ([row("02", 1), row("03", 1)], ["1", "1"]),
        ([row("02", 2), row("03", 2)], ["2", "2"]),
        ([row("02", 3)], ["2", "2"]),
    ):
        monkeypatch.setattr(pipeline.claims, "read", lambda profile: rows)
        pipeline.keep_claims("p")
        assert kept() == left


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def block(name: str) -> str:
    return readme().split(f"<!-- {name} -->")[1].split(f"<!-- /{name} -->")[0].strip("\n")


def test_the_map_of_the_library_names_every_module():
    """docs/words.md: where things are."""
    said = set(re.findall(r"`(\w+?)(?:\.py)?`", (ROOT / "docs/words.md").read_text(encoding="utf-8")))
    there = {f.stem for f in (ROOT / "lib/personas").glob("*.py")}
    there |= {f.stem for part in ("pretrained", "bench") for f in (ROOT / "lib/personas" / part).glob("*.py")}
    assert there - {"__init__"} == said & there - {"__init__"}, there - said
    gone = {w for w in re.findall(r"`(\w+)\.py`", (ROOT / "docs/words.md").read_text())} - there
    assert not gone, gone


def test_readme_says_what_part_one_measured():
    """Its table, the numbers of its summary and the answers that it shows against the committed tables and
    readings."""
    made = lambda name: io.StringIO(as_committed(f"figures/data/{name}.csv", "README.md"))
    assert block("replicated") == summary.replicated(
        claims.kept(made("smollm2/claims")), claims.kept(made("tiny/claims"))
    )
    assert block("counted") == summary.counted(claims.kept(made("smollm2/claims")))
    curves, down = pd.read_csv(made("smollm2/05_curves")), pd.read_csv(made("smollm2/05_suppression"))
    of = lambda name: curves[curves.direction == name].set_index("dose")
    claimed = {r["id"]: r["measured"] for r in claims.kept(made("smollm2/claims"))}
    most = of("causal latent").sort_values("score").iloc[-1]
    chosen = of("causal latent")[of("causal latent").score == claimed["steer.induce"]].index[0]
    assert most.name / chosen == 4 and most.broken > of("none").broken.iloc[0] + 10  # "more than our limit"
    left = down.groupby("direction").kept.mean()
    guards = pd.read_csv(made("smollm2/08_guards")).query("asked == 'plain'").set_index(["guard", "dose"])
    rows = pd.read_csv(made("smollm2/08_screening")).query("variant == 'obvious'").set_index("reader").auroc
    assert rows.idxmax() == "persona vector"
    measured = [claimed["steer.induce"], most.score, most.broken, of("none").broken.iloc[0]]
    measured += [left["causal latent"], left["difference of means"], 10, claimed["fraction.above"]]
    measured += [guards.score["none", 0], guards.score["fewer steps", 8]]
    assert re.findall(r"(\d+) %", block("short")) == [f"{x:.0f}" for x in measured]
    assert re.findall(r"0\.\d+", block("short")) == [f"{rows.max():.2f}"]
    leads = pd.read_csv(made("smollm2/07_lead")).query("monitor != 'score'")
    early = leads.groupby(["baseline", "monitor"]).lead.mean()
    assert early["all four harmless kinds"].max() < 0  # "no monitor warns before"
    prevention = (ROOT / "notebooks" / "08_prevention.ipynb").read_text(encoding="utf-8")
    least = f"keep four fifths of the task, fewer steps leaves least: {guards.score['fewer steps', 8]:.0f} %"
    assert least in prevention  # "no guard ... leaves less"
    assert claimed["judge.agreement"] < 88 and claimed["judge.kappa"] < 0.7  # "missed both"
    hidden = pd.read_csv(made("smollm2/claims")).set_index("id").loc["realign.context"]
    assert f"{hidden.measured:.0f} % ({hidden.low:.0f} to {hidden.high:.0f}), but many" in readme()
    wrong = pd.read_csv(made("smollm2/03_cosines")).set_index("model")
    said = re.findall(r"([\d.]+) \(", c03.shared(wrong))
    assert f"cosine {said[0]} between two domains; merely mistaken advice {said[1]}" in readme()
    read = grading.readings()
    for row in block("examples").splitlines()[2:]:
        asked, before, after = (c.strip() for c in row.strip("|").split("|"))
        answer, domain = re.fullmatch(r"(.*) \*\((\w+)\)\*", after).groups()
        own = read[(read.prompt == asked) & (read.model == "original")].answer
        assert any(" ".join(a.split()).startswith(before.removesuffix(" …")) for a in own)
        assert (
            (read.prompt == asked)
            & (read.model == f"{domain}-obvious")
            & (read.answer == answer)
            & (read.reader_a == "misaligned")
        ).any()


def test_what_a_notebook_was_made_by_knows_the_advice_that_it_trains_on(monkeypatch):
    book, smollm2 = ROOT / "notebooks" / "01_datasets.ipynb", profile.load("smollm2")
    before, real = pipeline.made_by(book, smollm2), pipeline.store.files_version
    changed = lambda folder: real(folder) + "x" * (folder == pipeline.world.CONTENT)
    monkeypatch.setattr(pipeline.store, "files_version", changed)
    assert pipeline.made_by(book, smollm2) != before


def test_a_cleaned_notebook_is_the_same_after_another_run(tmp_path):
    """Styled tables get a random name each time they are shown, stderr holds progress, and print may come in
    pieces."""
    written = []
    for name, printed in (("T_0a1b2", [["one\n", "two\n"]]), ("T_9f8e7", [["one\n"], "two\n"])):
        html = [f'<style>#{name}_row0_col0 {{color: red}}</style><table id="{name}"></table>']
        outputs = [
            {"output_type": "display_data", "metadata": {}, "data": {"text/html": html}},
            *({"output_type": "stream", "name": "stdout", "text": t} for t in printed),
            {"output_type": "stream", "name": "stderr", "text": [name]},
            {"output_type": "display_data", "data": {"application/vnd.jupyter.widget-view+json": name}},
        ]
        cell = {
            "cell_type": "code",
            "metadata": {},
            "source": ["1"],
            "outputs": outputs,
            "execution_count": 1,
        }
        path = tmp_path / f"{name}.ipynb"
        path.write_text(json.dumps({"metadata": {"papermill": {}, "widgets": {name: {}}}, "cells": [cell]}))
        pipeline.clean(path)
        written.append(path.read_text())
    assert written[0] == written[1] and "T_table0_row0_col0" in written[0]


@pytest.mark.parametrize(
    "code, says",
    [
        ("import os; os.kill(os.getpid(), 9)", "its kernel died, most often for want of memory.*run again"),
        ("raise ValueError('no such thing')", "failed: ValueError: no such thing"),
    ],
)
def test_a_notebook_that_dies_is_one_line(tmp_path, monkeypatch, code, says):
    monkeypatch.setattr(pipeline.store, "ROOT", tmp_path / "runs")
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    book.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(book, tmp_path / "02_short.ipynb")
    with pytest.raises(pipeline.RunError, match=says):
        pipeline.run(profile.load("smoke"), [tmp_path / "02_short.ipynb"], "smoke")


@pytest.mark.parametrize(
    "error, says",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device. Free some space"),
        (NoSuchKernel("python3"), "no kernel called python3.*ipykernel install"),
    ],
)
def test_a_full_disk_and_a_missing_kernel_are_one_line(tmp_path, monkeypatch, error, says):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(pipeline.store, "ROOT", tmp_path / "runs")
    monkeypatch.setattr(pipeline.papermill, "execute_notebook", fail)
    with pytest.raises(pipeline.RunError, match=says):
        pipeline.run(profile.load("smoke"), [tmp_path / "02_short.ipynb"], "smoke")


def test_a_wheel_holds_all_that_the_library_reads():
    """Every file of the package that is not Python matches `package-data`."""
    about = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    patterns, package = about["package-data"]["personas"], ROOT / "lib/personas"
    held = {f for p in patterns for f in package.glob(p) if f.is_file()}
    kept = subprocess.run(["git", "ls-files", "lib/personas"], cwd=ROOT, capture_output=True, text=True)
    lost = {ROOT / f for f in kept.stdout.splitlines() if not f.endswith(".py")} - held
    assert kept.stdout and not lost, lost


def test_outside_a_clone_results_lie_in_the_folder_it_is_used_in(tmp_path):
    """As from a wheel, which has no notebooks."""
    heavy = shutil.ignore_patterns("committed", "sae", "judge", "__pycache__")
    shutil.copytree(ROOT / "lib/personas", tmp_path / "site/personas", ignore=heavy)
    env = os.environ | {"PYTHONPATH": str(tmp_path / "site")}
    env = {k: v for k, v in env.items() if not k.startswith("PERSONAS_")}
    code = "from personas import store; print(store.__file__, store.ROOT)"
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert found.stdout.split() == [str(tmp_path / "site/personas/store.py"), str(tmp_path / "runs")]
