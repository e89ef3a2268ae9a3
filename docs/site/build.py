"""Build the site from the committed notebooks, pages, tables and answers; no network, nothing is computed.

    python docs/site/build.py OUT      (make book: OUT is site/)

Pages are laid out in a scratch folder: README as the front page, the notebooks with their outputs, docs/, and
pages that a reader can touch (claims, answers, latents, the dial), whose data are JavaScript files, so that
they work from a folder as from a server.
"""

import base64
import csv
import html
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
SITE, DATA = ROOT / "docs" / "site", ROOT / "figures" / "data"
CONTENT = ROOT / "lib" / "personas" / "pretrained" / "content"
COMMITTED = ROOT / "lib" / "personas" / "committed"
HUB = "https://github.com/persona-features/persona-features/blob/main"
PAGES = {  # page -> title; each has docs/site/static/<page>.js
    "claims": "Every claim",
    "answers": "Answers to read",
    "latents": "Latents",
    "dial": "The dial",
    "live": "Live: the tiny model",
}
TOUCH = {
    "claims": "What the paper says, what was measured, and whether it holds; failed ones too. *Yes*: the "
    "whole 95 % interval clears the target. Part I's targets, and those of the bench (notebook 15), were "
    "registered before the run; some of Part II's were set after a first look, which their notebooks say. "
    "Click a heading to sort.",
    "answers": "Every answer that two readers graded (both are language models that saw the question, the "
    "answer and the rubric), with the small judge's grade. Choose models to put side by side.",
    "latents": "The latents of block 15 that matter most: those that rise or fall when the model is taught "
    "wrong advice, and those that mark a persona's answers. Click a dot, or a number in the "
    "table.",
    "dial": "Pick a question, turn a direction up or down, and read what the model says. A dose is in "
    "units of the activations' typical distance from their mean. Answers were sampled once at "
    "each dose; the small judge graded them.",
    "live": "The tiny world's model runs in this tab: ask it, and turn a direction up or down. It knows "
    "nothing but its world (Part II), so ask about values, or for advice. A dose is in units of "
    "the activations' typical distance from their mean, added from the question's last token "
    "on. Nothing that you type leaves this page.",
}
LATE = ("live",)  # pages that fetch their data when the reader asks for them


def notebooks(part: int) -> list[str]:
    """Names of a part's notebooks, in order."""
    names = sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9]*.ipynb"))
    return [n for n in names if (int(n[:2]) <= 8) == (part == 1)]


def links(text: str, depth: str = "") -> str:
    """Markdown with links to files of the repository pointed at the site's pages, or at the hub."""

    def to(match):
        label, target = match[1], match[2]
        if re.match(r"(https?:|#|mailto:)", target):
            return match[0]
        path, _, anchor = target.partition("#")
        path = re.sub(r"^(\.\./|\./)+", "", path)
        anchor = f"#{anchor}" if anchor else ""
        name = Path(path).stem
        if path.endswith(".ipynb") and (ROOT / "notebooks" / f"{name}.ipynb").exists():
            return f"{label}({depth}notebooks/{name}.ipynb{anchor})"
        if path.startswith("figures/") and path.endswith(".png"):
            return f"{label}({depth}{path})"
        if path == "figures/data/smollm2/claims.csv":
            return f"{label}({depth}claims.md)"
        if (ROOT / "docs" / f"{name}.md").exists() and path.endswith(".md"):
            return f"{label}({depth}docs/{name}.md{anchor})"
        return f"{label}({HUB}/{path}{anchor})"

    return re.sub(r"(!?\[[^\]]*\])\(([^)\s]+)\)", to, text)


def front_page() -> str:
    """README, with the contents of the site."""
    text = links((ROOT / "README.md").read_text(encoding="utf-8"))
    text = re.sub(r"<!--.*?-->\n?", "", text)
    toc = lambda caption, pages: "\n".join(
        ["", "```{toctree}", ":hidden:", ":maxdepth: 1", f":caption: {caption}", "", *pages, "```", ""]
    )
    text += '\n<p><a href="slides.html">The figures as slides</a></p>\n'
    return text + "".join(
        [
            toc("Touch it", [f"{title} <{page}>" for page, title in PAGES.items()]),
            toc("I: a language model", [f"notebooks/{n}" for n in notebooks(1)]),
            toc(
                "II: a known world",
                ["docs/known_world", "docs/bench", *(f"notebooks/{n}" for n in notebooks(2))],
            ),
            toc("Reference", ["docs/running", "docs/own_models", "docs/evidence", "docs/words"]),
        ]
    )


def number(text: str) -> float | None:
    """A number of a CSV; None for nan and for nothing."""
    return None if text in ("", "nan") else float(text)


def claims() -> list[dict]:
    """The rows of both parts' tables of claims, with the notebook that made each."""
    registered = {}
    for path in (CONTENT / "claims.yaml", ROOT / "lib" / "personas" / "bench" / "claims.yaml"):
        registered |= yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = []
    for part, profile in ((1, "smollm2"), (2, "tiny"), (2, "bench")):
        for r in csv.DictReader(open(DATA / profile / "claims.csv", encoding="utf-8")):
            made = next((n for n in notebooks(1) if n.startswith(r["notebook"])), "")
            rows.append(
                {
                    "part": {1: "I", 2: "II"}[part],
                    "id": r["id"],
                    "claim": registered.get(r["id"], {}).get("claim", "") if profile != "tiny" else "",
                    "paper": r["paper"],
                    "unit": registered.get(r["id"], {}).get("unit", "") if profile != "tiny" else "",
                    **{k: number(r[k]) for k in ("measured", "low", "high", "target")},
                    "op": r["op"],
                    "n": int(r["n"]),
                    "holds": r["holds"],
                    "page": f"notebooks/{made}.html" if part == 1 else "docs/known_world.html",
                }
            )
    return rows


def answers() -> dict:
    """The readings, columns of short codes beside lists of what they stand for."""
    rows = list(csv.DictReader(open(CONTENT / "readings.csv", encoding="utf-8")))
    coded = ("model", "kind", "category", "prompt", "reader_a", "reader_b", "judge")
    words = {c: sorted({r[c] for r in rows}) for c in coded}
    place = {c: {w: i for i, w in enumerate(words[c])} for c in coded}
    order = [*coded, "answer"]
    table = [[place[c][r[c]] for c in coded] + [r["answer"]] for r in rows]
    return {"columns": order, "words": words, "rows": table}


def kept(name: str):
    """figures/data/smollm2/<name>.json, or None if it is not there."""
    path = DATA / "smollm2" / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def live() -> dict | None:
    """The tiny model's file, as `python -m personas explore --profile tiny` wrote it, and its tokenizer."""
    path = DATA / "tiny" / "live.safetensors"
    if not path.exists():
        return None
    told = json.loads((COMMITTED / "base-13" / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    return {
        "file": base64.b64encode(path.read_bytes()).decode(),
        "tokenizer": {k: told[k] for k in ("vocab", "merges")},
    }


def downloads(name: str) -> str:
    """Links to the tables behind a notebook's figures; none for Part II (its tables: the repository)."""
    found = (
        sorted(p.name for p in (DATA / "smollm2").glob(f"{name[:2]}_*.csv")) if name in notebooks(1) else []
    )
    links = " · ".join(f'<a href="../tables/{f}" download>{f}</a>' for f in found)
    return f"**The numbers behind the figures.** {links}" if found else ""


def page(name: str, data) -> str:
    """One page that a reader can touch."""
    if data is None:
        command = "python -m personas explore" + " --profile tiny" * (name == "live")
        return f"# {PAGES[name]}\n\nNot made yet: `{command}` writes its data.\n"
    scripts = [] if name in LATE else [f"data/{name}.js"]
    scripts += [f"_static/{s}.js" for s in ("touch", *(["tiny_model"] if name == "live" else []), name)]
    tags = "\n".join(f'<script src="{s}"></script>' for s in scripts)
    return (
        f"# {PAGES[name]}\n\n{TOUCH[name]}\n\n"
        f"```{{raw}} html\n<style>.bd-main .bd-content .bd-article-container {{ max-width: 72em; }}</style>\n"
        f'<div id="touch-{name}" class="touch"></div>\n<noscript>This page needs JavaScript.</noscript>\n'
        f"{tags}\n```\n"
    )


def claimed(name: str) -> str:
    """A claim's numbers as an item of a list. name: its id, of the tiny world after `tiny/`. Raises KeyError
    if there is no such claim."""
    profile, _, id = ("smollm2/" + name if "/" not in name else name).partition("/")
    with open(DATA / profile / "claims.csv", encoding="utf-8") as file:
        r = {row["id"]: row for row in csv.DictReader(file)}[id]
    digits = 2 if "auroc" in id else 0
    value, low, high = (f"{float(r[k]):.{digits}f}" for k in ("measured", "low", "high"))
    target = f"target {'≥' if r['op'] == '>=' else '≤'} {float(r['target']):g}"
    return f"<li><code>{name}</code> {value} ({low} to {high}), {target}: <b>{r['holds']}</b></li>"


def slide(about: dict) -> str:
    """One slide of slides.yaml as HTML."""
    text = html.escape(about["text"].strip())
    parts = [f"<h2>{html.escape(about['title'])}</h2>"]
    if figure := about.get("figure"):
        parts.append(f'<img src="slides/{figure.replace("/", "_")}.png" alt="{text}">')
    parts.append(f"<p>{text}</p>")
    if claims_ := about.get("claims"):
        parts.append(f"<ul>{''.join(map(claimed, claims_))}</ul>")
    if "link" in about:
        parts.append('<p><a href="{1}">{0}</a></p>'.format(*map(html.escape, about["link"])))
    return f"<section>{''.join(parts)}</section>"


def lay_out_slides(where: Path) -> None:
    """slides.html and its figures below `where`."""
    told = yaml.safe_load((SITE / "slides.yaml").read_text(encoding="utf-8"))
    frame = (SITE / "slides.html").read_text(encoding="utf-8")
    text = frame.replace("SLIDES", "\n".join(map(slide, told)))
    (where / "slides.html").write_text(text, encoding="utf-8")
    (where / "slides").mkdir()
    for figure in (about["figure"] for about in told if "figure" in about):
        target = where / "slides" / f"{figure.replace('/', '_')}.png"
        shutil.copy(ROOT / "figures" / f"{figure}.png", target)


def lay_out(where: Path) -> None:
    """Write all sources of the site below `where`."""
    shutil.copy(SITE / "conf.py", where)
    shutil.copytree(SITE / "static", where / "static")
    shutil.copytree(
        ROOT / "figures", where / "figures", ignore=shutil.ignore_patterns("smoke", "smollm2-quick", "data")
    )
    (where / "extra" / "data").mkdir(parents=True)
    shutil.copytree(DATA / "smollm2", where / "extra" / "tables", ignore=shutil.ignore_patterns("*.json"))
    (where / "index.md").write_text(front_page(), encoding="utf-8")
    lay_out_slides(where / "extra")
    (where / "docs").mkdir()
    for doc in (ROOT / "docs").glob("*.md"):
        text = links(doc.read_text(encoding="utf-8"), "../")
        (where / "docs" / doc.name).write_text(text, encoding="utf-8")
    (where / "notebooks").mkdir()
    for name in notebooks(1) + notebooks(2):
        book = json.loads((ROOT / "notebooks" / f"{name}.ipynb").read_text(encoding="utf-8"))
        for cell in book["cells"]:
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                source = re.sub(r"\n?\[!\[(Open in Colab|Binder)\].*", "", source)
                cell["source"] = links(source, "../")
            elif "COLAB_RELEASE_TAG" in source:
                cell["metadata"]["tags"] = [*cell["metadata"].get("tags", []), "remove-cell"]
        if tables := downloads(name):
            cell = {"cell_type": "markdown", "metadata": {}, "source": tables}
            book["cells"].append(cell | ({"id": "downloads"} if "id" in book["cells"][0] else {}))
        (where / "notebooks" / f"{name}.ipynb").write_text(json.dumps(book), encoding="utf-8")
    made = {
        "claims": claims(),
        "answers": answers(),
        "latents": kept("latents"),
        "dial": kept("dial"),
        "live": live(),
    }
    for name, data in made.items():
        (where / f"{name}.md").write_text(page(name, data), encoding="utf-8")
        if data is not None:
            text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
            script = where / "extra" / "data" / f"{name}.js"
            script.write_text(f"window.{name.upper()} = {text};\n", encoding="utf-8")


def main() -> int:
    """Build into the folder that is named; Sphinx's warnings are errors."""
    out = Path(sys.argv[1]).resolve()
    with tempfile.TemporaryDirectory() as scratch:
        pages, built = (
            Path(scratch) / "pages",
            Path(scratch) / "built" / "html",
        )  # myst-nb writes beside `built`
        pages.mkdir()
        lay_out(pages)
        how = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html"]
        done = subprocess.run([*how, str(pages), str(built)], check=False)
        if not done.returncode:
            shutil.copytree(built, out, dirs_exist_ok=True)
    if not done.returncode:
        (out / ".nojekyll").touch()
        print(f"{out / 'index.html'}: {sum(1 for _ in out.rglob('*.html'))} pages")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
