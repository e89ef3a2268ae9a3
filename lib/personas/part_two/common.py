"""What several chapters of Part II share."""

import pandas as pd

from personas import early_warning


def percent(values) -> tuple[float, float, float]:
    """(mean, low, high) of independent percents, such as seeds', with the 95 % interval: by t, cut at 0 and
    100; where all are 0 or all 100, exact for as many as there are."""
    return early_warning.percent_interval(values, len(values))


def over_seeds(table: pd.DataFrame, at: str, column: str) -> pd.DataFrame:
    """Per value of `at` the mean over domains, with the t-interval over fine-tuning seeds (mean, low, high);
    percents are cut at 0 and 100."""
    by_seed = table.groupby([at, "seed"])[column].mean().groupby(at)
    rows = pd.DataFrame({x: early_warning.t_interval(v) for x, v in by_seed}, index=["mean", "low", "high"]).T
    return rows if column == "latent" else rows.clip(0, 100)


def span(values, digits: int = 0) -> str:
    """The smallest and the largest of some percents, in words: "2 to 12"."""
    low, high = (f"{v:.{digits}f}" for v in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


def listed(names) -> str:
    """Names in a sentence: "a, b and c"."""
    names = [str(n) for n in names]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def families(rows: pd.DataFrame) -> str:
    """How many of a chapter's claims (claims.record's table) hold, by the first word of their names."""
    counts = rows.groupby([rows.claim.str.split(".").str[0], "holds"]).size().unstack(fill_value=0)
    each = "; ".join(
        f"`{name}` " + ", ".join(f"{int(n)} {h}" for h, n in row.items() if n)
        for name, row in counts.iterrows()
    )
    return f"{len(rows)} claims. {each}."
