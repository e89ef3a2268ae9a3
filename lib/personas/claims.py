"""The table of claims: what the paper says, what was measured, whether it holds. A failed claim stays in
as failed."""

import json
import math
import os

import numpy as np
import pandas as pd
from filelock import FileLock

from personas import store


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
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"id": r["id"], "notebook": notebook} | r for r in rows]
    with FileLock(path.with_suffix(".lock")):  # two notebooks at once would lose one's rows
        others = [r for r in read(profile) if r["notebook"] != notebook]
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


def kept(source) -> list[dict]:
    """The rows of a figures/data/<profile>/claims.csv (path or open file), as `read` gives them."""
    rows = pd.read_csv(source, dtype={"notebook": str}).to_dict("records")
    return [r | {"target": {"op": r["op"], "value": r["target"]}} for r in rows]
