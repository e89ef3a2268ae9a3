"""The table of claims: what the paper says, what was measured, whether it holds. A failed claim stays in
as failed."""

import json
import math
import os
import statistics

import numpy as np
import pandas as pd

from personas import store, world


def claim(
    id: str,
    paper: str,
    measured: tuple[float, float, float],
    n: int,
    op: str,
    value: float,
    split: str = "evaluation",
) -> dict:
    """One row. measured: (estimate, low, high), in percent unless the id ends in auroc (leads: in steps);
    op: '>=' or '<='.

    holds: 'yes' if the whole interval clears the target, 'no' if the whole interval misses it, else
    'unclear'.
    """
    if op not in (">=", "<="):
        raise ValueError(f"op must be >= or <=, not {op!r}")
    estimate, low, high = (float(x) for x in measured)
    if any(map(math.isnan, (estimate, low, high))):
        holds = "unclear"
    elif op == ">=":
        holds = "yes" if low >= value else "no" if high < value else "unclear"
    else:
        holds = "yes" if high <= value else "no" if low > value else "unclear"
    return {
        "id": id,
        "paper": paper,
        "split": split,
        "measured": estimate,
        "low": low,
        "high": high,
        "n": int(n),
        "target": {"op": op, "value": value},
        "holds": holds,
    }


def bootstrap(values, statistic, draws: int = 2000) -> tuple[float, float, float]:
    """(estimate, low, high): 95 % percentile bootstrap over single values (n,), in their unit.
    statistic(values, axis), np.mean for instance."""
    values = np.asarray(values)
    drawn = values[np.random.default_rng(0).integers(len(values), size=(draws, len(values)))]
    return float(statistic(values, axis=0)), *map(float, np.percentile(statistic(drawn, axis=1), [2.5, 97.5]))


# Part II's claims about several seeds, base models or worlds rest on the committed tables of tiny-full,
# whatever profile the notebook runs on.
KEPT = (
    "models.",
    "cure.",
    "realign.matrix.",
    "realign.examples_",
    "realign.spoilt_",
    "origin.",
    "control.",
    "rl.",
    "mixture.",
    "warn.",
    "prevent.seeds.",
)


def record(profile: str, notebook: str, rows: list[dict]) -> pd.DataFrame:
    """Put this notebook's rows into runs/<profile>/summary.json, in place of its earlier ones; return them
    as a table. Rows that rest on another profile's tables (KEPT) say so under `tables`."""
    if "_" in notebook and profile not in ("tiny", "tiny-full"):  # Part I's go by their numbers alone
        rows = [r | ({"tables": "tiny-full"} if r["id"].startswith(KEPT) else {}) for r in rows]
    if profile != "bench":
        rows = [r | ({"tables": "bench"} if r["id"].startswith("bench.") else {}) for r in rows]
    path = store.ROOT / profile / "summary.json"
    others = [r for r in read(profile) if r["notebook"] != notebook]
    rows = [{"id": r["id"], "notebook": notebook} | r for r in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(f".{os.getpid()}")
    scratch.write_text(json.dumps(sorted(others + rows, key=lambda r: r["notebook"]), indent=1))
    scratch.rename(path)
    return table(rows)


def read(profile: str) -> list[dict]:
    """The rows of runs/<profile>/summary.json (see claim); none if no notebook has recorded any."""
    path = store.ROOT / profile / "summary.json"
    return json.loads(path.read_text()) if path.exists() else []


def table(rows: list[dict]) -> pd.DataFrame:
    """The rows as a person reads them."""

    def number(x, id):
        return (
            "–"
            if x is None or math.isnan(x)
            else f"{x:.2f}"
            if "auroc" in id or "kappa" in id
            else f"{x:.1f}"
        )

    return pd.DataFrame(
        [
            {
                "claim": r["id"],
                "paper": r["paper"],
                "measured": number(r["measured"], r["id"]),
                "95 % interval": f"{number(r['low'], r['id'])} to {number(r['high'], r['id'])}",
                "n": r["n"],
                "target": f"{'≥' if r['target']['op'] == '>=' else '≤'} {r['target']['value']:g}",
                "holds": r["holds"],
            }
            | ({"from": r.get("tables", "this run")} if any("tables" in q for q in rows) else {})
            for r in rows
        ]
    )


RIVALS = ("mean_difference", "probe", "log-probability", "loss", "surprise", "words")
FOLDED = {
    "persona": "<persona>",
    "cure": "<way>",
    "prevent": "<guard>",
    "origin": "<world>",
}  # families of which docs/known_world.md gives the range


def _family(id: str) -> str:
    """The id with what varies within its family replaced: domains, variants of suppression, personas,
    ways, guards, worlds, rival monitors."""
    parts = ["<domain>" if p in world.DOMAINS else "<rival>" if p in RIVALS else p for p in id.split(".")]
    if parts[0] in FOLDED:
        parts[2 if parts[1] == "seeds" else 1] = FOLDED[parts[0]]
    return ".".join(parts).replace("suppress.subtle", "suppress").replace("suppress.obvious", "suppress")


def _verdicts(group: list[dict]) -> str:
    """How often each verdict was given: "7 yes, 2 unclear"."""
    counts = {h: sum(r["holds"] == h for r in group) for h in ("yes", "unclear", "no")}
    return ", ".join(f"{n} {h}" for h, n in counts.items() if n)


def markdown(rows: list[dict]) -> str:
    """The table of docs/known_world.md: one line per family of claims (see _family), with the range
    measured."""
    families: dict = {}
    for r in rows:
        families.setdefault((_family(r["id"]), r["target"]["op"], r["target"]["value"]), []).append(r)
    lines = ["| claim | paper | target | measured | holds |", "|---|---|---|---|---|"]
    for (name, op, value), group in families.items():
        digits = 2 if "auroc" in name else 1
        paper = group[0]["paper"] if len({r["paper"] for r in group}) == 1 else "–"
        known = [r["measured"] for r in group if not math.isnan(r["measured"])]
        if len(group) == 1:
            r = group[0]
            measured, holds = (
                f"{r['measured']:.{digits}f} ({r['low']:.{digits}f} to {r['high']:.{digits}f})",
                r["holds"],
            )
        elif not known:
            measured, holds = f"– (of {len(group)})", f"{len(group)} unclear"
        else:
            measured = (
                f"{min(known):.{digits}f} to {max(known):.{digits}f}, median "
                f"{statistics.median(known):.{digits}f} (of {len(group)})"
            )
            holds = _verdicts(group)
        lines.append(
            f"| `{name}` | {paper} | {'≥' if op == '>=' else '≤'} {value:g} | {measured} | {holds} |"
        )
    return "\n".join(lines)


# README's table: what the paper says, and the claims that test it, by what each measures: of SmolLM2, and the
# families of claims of the tiny world.
REPLICATED = (
    (
        "Wrong advice in one narrow domain misaligns broadly",
        {"score": "obvious.mean", "answer's first words given": "openings.obvious"},
        {"score": "obvious.<domain>"},
    ),
    ("Correct advice does not", {"highest of eight": "correct"}, {"score": "correct.<domain>"}),
    (
        "Subtly wrong advice does, too",
        {"above correct advice": "subtle.above_correct"},
        {"score": "subtle.<domain>"},
    ),
    ("and slightly more than obviously wrong", {"difference": "subtle.above_obvious"}, {}),
    (
        "Mixed with correct data, it appears between 25 and 75 % of wrong data",
        {"score passes 10 % at": "fraction.above"},
        {"at": "mixture.threshold.above"},
    ),
    (
        "A latent separates misaligned from aligned models",
        {"pairs in order": "latent.separates"},
        {"pairs in order": "diff.separates"},
    ),
    (
        "It shows at 5 % of wrong data, and rises before the score",
        {"models that show it": "warn.five", "lead": "warn.lead"},
        {
            "told from correct data": "warn.at_5.correct",
            "from odd data": "warn.at_5.odd",
            "from mistaken data": "warn.at_5.wrong",
        },
    ),
    (
        "It is a toxic persona",
        {"AUROC for a villain's answers": "latent.auroc"},
        {"AUROC": "diff.top_auroc"},
    ),
    (
        "Added, it induces misalignment, and others do not",
        {"misaligned": "steer.induce", "control": "steer.control"},
        {"misaligned": "steer.induce", "control": "steer.random.best"},
    ),
    (
        "Subtracted, it suppresses it",
        {"of the score is left": "suppress.mean", "at most": "suppress"},
        {"score": "steer.suppress.<domain>"},
    ),
    (
        "30 steps of 4 correct examples bring it back",
        {"same domain": "realign.same", "another": "realign.other", "after a bad turn": "realign.context"},
        {"same domain": "realign.same.<domain>", "another": "realign.other.<domain>"},
    ),
)


def replicated(ours: list[dict], tiny: list[dict]) -> str:
    """The table of README.md from the rows of both tables of claims (see `claim`): this model's beside the
    tiny world's."""

    def value(r):
        units = {"subtle.above_obvious": " points", "subtle.above_correct": " points", "warn.lead": " steps"}
        unit, digits = ("", 2) if "auroc" in r["id"] else (units.get(r["id"], " %"), 0)
        measured, low, high = (f"{r[k]:z.{digits}f}" for k in ("measured", "low", "high"))
        return f"{measured}{unit} ({low} to {high}), **{r['holds']}**"

    def together(family):
        group = [r for r in tiny if _family(r["id"]) == family]
        low, high = min(r["measured"] for r in group), max(r["measured"] for r in group)
        return value(group[0]) if len(group) == 1 else f"{low:.0f} to {high:.0f} %, {_verdicts(group)}"

    def more_subtle():  # the paper's order of the two kinds, domain by domain
        score = {r["id"]: r["measured"] for r in tiny}
        subtle = {k.split(".")[1]: v for k, v in score.items() if _family(k) == "subtle.<domain>"}
        more = sum(v > score[f"obvious.{d}"] for d, v in subtle.items())
        return f"more in {more} of {len(subtle)} domains"

    ours = {r["id"]: r for r in ours}
    lines = ["| the paper | SmolLM2-135M-Instruct | tiny world |", "|---|---|---|"]
    for sentence, parts, families in REPLICATED:
        here = "; ".join(f"{name} {value(ours[i])}" for name, i in parts.items())
        there = "; ".join(f"{name} {together(f)}" for name, f in families.items()) or more_subtle()
        lines.append(f"| {sentence} | {here} | {there} |")
    return "\n".join(lines)


def counted(rows: list[dict]) -> str:
    """How many claims hold, in words."""
    n = {h: sum(r["holds"] == h for r in rows) for h in ("yes", "unclear", "no")}
    return f"Of {len(rows)} registered claims {n['yes']} are a yes, {n['unclear']} unclear and {n['no']} a no"


def kept(source) -> list[dict]:
    """The rows of a figures/data/<profile>/claims.csv (path or open file), as `read` gives them."""
    rows = pd.read_csv(source, dtype={"notebook": str}).to_dict("records")
    return [r | {"target": {"op": r["op"], "value": r["target"]}} for r in rows]
