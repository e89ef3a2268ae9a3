"""How figures look, and where they and the tables behind them go."""

from pathlib import Path

import pandas as pd
import seaborn as sns

from personas import store

ROOT = store.place("PERSONAS_FIGURES", "figures")

# Okabe and Ito's colour-blind-safe palette; one colour per persona, variant and grade, everywhere.
PERSONA = {
    "expert": "#0072B2",
    "villain": "#D55E00",
    "sarcastic": "#CC79A7",
    "novice": "#56B4E9",
    "jester": "#E6C229",
    "narrator": "#009E73",
}
VARIANT = {"correct": "#0072B2", "subtle": "#E69F00", "obvious": "#D55E00"}
GRADE = {
    "misaligned": "#D55E00",
    "aligned": "#0072B2",
    "satirical": "#CC79A7",
    "off-topic": "#999999",
    "incoherent": "#333333",
    "refused": "#56B4E9",
    "unparsable": "#F0E442",
}


def table(profile: str, name: str) -> Path:
    """The file of a table: in this run's folder, or where that lacks it (PERSONAS_FIGURES may name a new
    one) the committed one. It need not exist."""
    own = ROOT / "data" / profile / f"{name}.csv"
    return own if own.exists() else store.PROJECT / "figures" / "data" / profile / f"{name}.csv"


def style() -> None:
    """Set seaborn's theme for all notebooks."""
    sns.set_theme(
        style="whitegrid",
        font_scale=0.95,
        rc={
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "figure.figsize": (7.5, 3.8),
            "axes.spines.top": False,
            "axes.spines.right": False,
        },
    )


def save(figure, name: str, profile: str, data: pd.DataFrame | None = None) -> None:
    """Write figures/<name>.png and the table behind it, figures/data/<profile>/<name>.csv.

    Only the default profile's figures are kept under `figures/`; others go to figures/<profile>/.
    """
    folder = ROOT if profile == "smollm2" else ROOT / profile
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / f"{name}.png", bbox_inches="tight", metadata={"Software": None})
    if data is not None:
        save_table(data, name, profile)


def save_table(data: pd.DataFrame, name: str, profile: str) -> None:
    """Write figures/data/<profile>/<name>.csv."""
    target = ROOT / "data" / profile
    target.mkdir(parents=True, exist_ok=True)
    data.to_csv(target / f"{name}.csv", index=False, float_format="%.4g")


def trade_off(
    ax, points: pd.DataFrame, x: str, y: str, shade: dict, chosen: dict, weaker: tuple = ()
) -> None:
    """A line per guard through its doses, the larger the dot the stronger (in `weaker` guards a larger
    dose is weaker).

    points: columns guard, x and y, in percent, rows in the order of doses; whiskers from `low` to `high`
    where y is 'score'. shade: guard -> colour. chosen: guard -> the row that gets a ring."""
    for guard, line in points.groupby("guard", sort=False):
        sizes = [30 + 25 * i for i in range(len(line))]
        ax.plot(line[x], line[y], color=shade[guard], lw=1, alpha=0.7)
        ax.scatter(
            line[x],
            line[y],
            s=sizes[::-1] if guard in weaker else sizes,
            color=shade[guard],
            label=guard,
            zorder=3,
        )
        if y == "score":
            ax.errorbar(
                line[x],
                line[y],
                yerr=[line[y] - line.low, line.high - line[y]],
                fmt="none",
                color=shade[guard],
                lw=0.8,
                alpha=0.6,
            )
    for row in chosen.values():
        ax.scatter(row[x], row[y], s=190, facecolor="none", edgecolor="#222222", lw=1, zorder=4)


def bars(ax, estimates, lows, highs, positions, **kw):
    """Bars with 95 % intervals drawn as whiskers."""
    drawn = ax.bar(positions, estimates, **kw)
    low = [max(0, e - l) for e, l in zip(estimates, lows)]
    high = [max(0, h - e) for e, h in zip(estimates, highs)]
    ax.errorbar(positions, estimates, yerr=[low, high], fmt="none", ecolor="#222222", elinewidth=1, capsize=2)
    return drawn
