"""The site's sources, laid out without Sphinx (`make book` builds them and takes its warnings for errors)."""

import csv
import importlib.util
import json
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("build", ROOT / "docs" / "site" / "build.py")
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    build.lay_out(folder)
    return folder


def rows(path: Path) -> list[dict]:
    return list(csv.DictReader(path.open(encoding="utf-8")))


def data(site: Path, name: str):
    return json.loads(
        (site / "extra" / "data" / f"{name}.js").read_text().split(" = ", 1)[1].removesuffix(";\n")
    )


def markdown(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return "\n\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")


def test_every_link_leads_to_a_page_a_figure_or_the_repository(site):
    seen = 0
    for path in [*site.rglob("*.md"), *site.rglob("*.ipynb")]:
        text = re.sub(r"```.*?```|`[^`]*`", "", markdown(path), flags=re.S)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if target.startswith(build.HUB):
                assert (ROOT / target.removeprefix(build.HUB + "/").split("#")[0]).exists(), (path, target)
            elif not re.match(r"https?:|#", target):
                assert (path.parent / target.split("#")[0]).exists(), (path, target)
            seen += 1
    assert seen > 50


def test_every_notebook_and_page_is_in_the_contents(site):
    listed = (site / "index.md").read_text(encoding="utf-8")
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        assert f"notebooks/{path.stem}" in listed and (site / "notebooks" / path.name).exists()
    for path in (ROOT / "docs").glob("*.md"):
        assert f"docs/{path.stem}" in listed
    for name, title in build.PAGES.items():
        assert f"{title} <{name}>" in listed and (site / "static" / f"{name}.js").exists()


def test_each_page_has_a_place_of_its_own_for_what_its_script_draws(site):
    for name in build.PAGES:
        text = (site / f"{name}.md").read_text(encoding="utf-8")
        assert (
            text.count(f'id="touch-{name}"') == 1
        )  # not the heading's id, which Sphinx takes from its title
        assert f'getElementById("touch-{name}")' in (site / "static" / f"{name}.js").read_text(
            encoding="utf-8"
        )


def test_claims_and_answers_are_the_committed_ones(site):
    kept = [r for p in ("smollm2", "tiny", "bench") for r in rows(build.DATA / p / "claims.csv")]
    shown = data(site, "claims")
    assert [(r["id"], r["holds"]) for r in shown] == [(r["id"], r["holds"]) for r in kept]
    pages = {r["page"].replace(".html", "") for r in shown}
    assert all((site / f"{p}.ipynb").exists() or (site / f"{p}.md").exists() for p in pages)
    answers, read = data(site, "answers"), rows(build.CONTENT / "readings.csv")
    assert len(answers["rows"]) == len(read)
    first = dict(zip(answers["columns"], answers["rows"][0]))
    for column, words in answers["words"].items():
        assert words[first[column]] == read[0][column]
    assert first["answer"] == read[0]["answer"]


def test_latents_and_the_dial_hold_what_their_pages_show(site):
    latents, dial = data(site, "latents"), data(site, "dial")
    wanted = {
        "latent",
        "name",
        "rank",
        "rise",
        "fires",
        "auroc",
        "raises",
        "lowers",
        "passages",
        "fine-tunes",
    }
    assert all(wanted <= set(r) for r in latents) and len({r["latent"] for r in latents}) == len(latents)
    assert "causal latent" in {r["name"] for r in latents}
    asked = {(r["prompt"], r["opening"]) for r in dial}
    directions = {r["direction"] for r in dial} - {"none"}
    doses = {r["dose"] for r in dial} - {0}
    assert (
        len(asked) >= 30 and len(directions) == 3 and len(doses) == 8
    )  # and as it is: nine places of the dial
    assert len(dial) == len({r["model"] for r in dial}) * len(asked) * (1 + len(directions) * len(doses))


def test_slides_show_figures_that_are_there_and_numbers_of_the_claims(site):
    text = (site / "extra" / "slides.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img src="([^"]+)"', text)
    assert len(shown) > 8 and all((site / "extra" / s).exists() for s in shown)
    kept = {r["id"]: r for r in rows(build.DATA / "smollm2" / "claims.csv")}
    told = re.findall(r"<code>([\w.]+)</code> (-?[\d.]+) .*?<b>(\w+)</b>", text)
    assert len(told) > 8
    for name, value, holds in told:
        assert abs(float(value) - float(kept[name]["measured"])) <= 0.5 and holds == kept[name]["holds"]


def test_a_link_is_pointed_at_the_sites_own_page():
    text = "[a](../notebooks/02_emergent_misalignment.ipynb) ![b](figures/02_emergent_misalignment.png)"
    text += " [c](evidence.md#seeds) [d](../lib/personas/profiles/h100.yaml)"
    text += " [e](figures/data/smollm2/claims.csv) [f](https://x.org)"
    hub = build.HUB
    assert build.links(text, "../") == (
        "[a](../notebooks/02_emergent_misalignment.ipynb) ![b](../figures/02_emergent_misalignment.png) "
        f"[c](../docs/evidence.md#seeds) [d]({hub}/lib/personas/profiles/h100.yaml) [e](../claims.md) [f](https://x.org)"
    )


def test_building_removes_nothing_that_lay_where_the_site_goes(tmp_path, monkeypatch):
    mine = tmp_path / "out" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")

    def sphinx(command, check):
        Path(command[-1]).mkdir(parents=True)
        (Path(command[-1]) / "index.html").write_text("page")
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(build.subprocess, "run", sphinx)
    monkeypatch.setattr(build.sys, "argv", ["build.py", str(mine.parent)])
    monkeypatch.setattr(build, "lay_out", lambda where: None)
    assert build.main() == 0
    assert mine.read_text() == "mine" and (mine.parent / "index.html").exists()
