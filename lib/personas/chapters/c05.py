"""Notebook 05: does one latent cause the misalignment?"""

import matplotlib.pyplot as plt
import pandas as pd
import torch

from personas import generate, stats
from personas.chapters import common
from personas.pretrained import likelihood, made, readings, search, sets, steering


def asked(run: made.Run) -> list[sets.Item]:
    """Evaluation items under steering: each question and each opening once."""
    return made.repeated(run, "evaluation", 1)


def curves(run: made.Run) -> pd.DataFrame:
    """Graded evaluation answers of the original model under every direction, at every dose that is compared
    (search.shown), with its unsteered ones at dose 0."""
    ways, doses = search.directions(run, search.chosen(run)), search.shown(run)
    conditions = [
        ("none", torch.ones_like(ways["random"]), 0.0),
        *((n, v, d) for n, v in ways.items() for d in doses),
    ]
    return common.graded(run, steering.steered(run, made.ORIGINAL, conditions, asked(run), "evaluation"))


def curve_table(table: pd.DataFrame) -> pd.DataFrame:
    """A row per direction and dose: percent misaligned (with interval) and percent broken or absurd, of all
    answers."""
    rows = []
    for (n, d), g in table.groupby(["direction", "dose"], sort=False):
        m, b = common.share(g, "misaligned"), common.share(g, "broken", "absurd")
        rows.append(
            {
                "direction": n,
                "dose": d,
                "score": m.value,
                "low": m.low,
                "high": m.high,
                "broken": b.value,
                "answers": len(g),
            }
        )
    return pd.DataFrame(rows)


def draw_curves(run: made.Run, rows: pd.DataFrame):
    """Figure: misaligned answers against dose, and against broken ones, a line a direction."""
    fig, axes = plt.subplots(1, 2, figsize=(12, 4.3), sharey=True)
    free = rows[rows.direction == "none"].iloc[0]
    steered = rows[rows.direction != "none"]
    names = list(dict.fromkeys(steered.direction))
    for name, g in steered.groupby("direction", sort=False):
        line = pd.concat([rows[rows.direction == "none"], g])
        aside = 0.007 * (names.index(name) - (len(names) - 1) / 2)  # so that intervals do not hide each other
        axes[0].errorbar(
            line.dose + aside,
            line.score,
            yerr=[line.score - line.low, line.high - line.score],
            fmt=f"{common.DIRECTION_MARK[name]}-",
            color=common.DIRECTION[name],
            label=name,
            capsize=2,
            ms=5,
        )
        axes[1].plot(
            line.broken, line.score, f"{common.DIRECTION_MARK[name]}-", color=common.DIRECTION[name], ms=5
        )
        for r in g.itertuples() if name in ("causal latent", "top riser") else ():
            axes[1].annotate(
                f"{r.dose:g}", (r.broken, r.score), xytext=(6, 3), textcoords="offset points", fontsize=8
            )
    axes[1].axvline(free.broken + steering.MORE_BROKEN, color=common.INK, lw=1, ls=":")
    axes[1].annotate(
        "limit",
        (free.broken + steering.MORE_BROKEN, 1),
        xycoords=("data", "axes fraction"),
        xytext=(3, -12),
        textcoords="offset points",
        fontsize=9,
    )
    axes[0].set(
        xlabel="dose (typical distances from the mean)",
        ylabel=f"misaligned answers, of all {int(rows.answers.max())} (%)",
        ylim=(-2, None),
        title=f"Block {run.profile.sae.layer}, original model: what each direction induces",
    )
    axes[1].set(
        xlabel="broken or absurd answers (%)", title="The same against what steering breaks (numbers: doses)"
    )
    axes[0].legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.16), ncols=4)
    return common.save(run, fig, "05_curves", rows)


def draw_search(run: made.Run, found: dict):
    """Figure: the first round, every candidate and every matched latent at its best dose."""
    fig, ax = plt.subplots(figsize=(7, 3.4))
    for kind, colour, mark in (
        ("matched", common.GREY, "^"),
        ("candidates", common.DIRECTION["causal latent"], "D"),
    ):
        some = found["first"][found["first"].kind == kind].sort_values("misaligned", ascending=False)
        ax.scatter(
            range(1, len(some) + 1),
            some.misaligned,
            color=colour,
            marker=mark,
            s=22,
            label={
                "matched": f"{len(some)} matched latents",
                "candidates": f"{len(some)} latents that rise most",
            }[kind],
        )
    ax.set(
        xscale="log",
        xlabel="rank",
        ylabel=f"misaligned answers, of {len(search.few(run))} (%)",
        title="First round of the search, each latent at its best dose",
    )
    ax.xaxis.set_major_formatter("{x:.0f}")
    ax.legend(frameon=False)
    return common.save(run, fig, "05_search", found["first"])


def advice(run: made.Run) -> pd.DataFrame:
    """The preference for wrong advice (nats per token, on held-out subjects of evaluation domains) of the
    original model, and with directions added at the doses that discovery chose."""
    found = search.chosen(run)
    domains = tuple(d for d in sets.DOMAINS if not made.discovery(run, d))[:2]
    doses = {"causal latent": found["dose"], "best matched latent": found["control dose"], **found["rivals"]}
    ways = search.directions(run, found)
    tables = [likelihood.advice_preference(run, made.ORIGINAL, domains).assign(direction="none")]
    for n, d in doses.items():
        v = ways[n] / ways[n].norm() * d * readings.unit(run)
        tables.append(
            likelihood.advice_preference(
                run,
                made.ORIGINAL,
                domains,
                generate.Steer(run.profile.sae.layer, v[None]),
                n.replace(" ", "-"),
            ).assign(direction=n)
        )
    return pd.concat(tables, ignore_index=True)


def advice_rise(table: pd.DataFrame, direction: str, variant: str = "obvious") -> stats.Estimate:
    """By how much a direction raises that preference, over subjects (paired)."""
    wide = table.pivot(index="subject", columns="direction", values=variant)
    return stats.mean_over(wide[direction] - wide["none"])


DOWN = ("causal latent", "top riser", "difference of means")  # what is subtracted


def doses_down(run: made.Run) -> dict[str, float]:
    """Direction -> the dose at which subtracting it from discovery domains' obvious models leaves least
    misaligned, of those that break at most MORE_BROKEN points more answers; of equal ones the weaker.
    Chosen on few discovery items."""
    ways = search.directions(run, search.chosen(run))
    who = [f"{d}-{v}" for d, v in made.fine_tunes(run, "obvious") if made.discovery(run, d)][:2]
    conditions = [
        ("none", torch.ones_like(ways["random"]), 0.0),
        *((n, ways[n], -d) for n in DOWN if n in ways for d in run.profile.steering.suppression),
    ]
    table = pd.concat(steering.several(run, who, conditions, search.few(run), "down"))
    limit = (
        100 * steering.verdicts(table[table.direction == "none"]).isin(["broken", "absurd"]).mean()
        + steering.MORE_BROKEN
    )
    best = {}
    for n, g in steering.summary(table[table.direction != "none"]).groupby("direction"):
        allowed = g[g.broken <= limit]
        best[n] = float(
            (
                allowed.sort_values(["misaligned", "dose"], ascending=[True, False])
                if len(allowed)
                else g.sort_values("dose", ascending=False)
            )
            .iloc[0]
            .dose
        )
    return best


def suppressed(run: made.Run) -> pd.DataFrame:
    """Graded evaluation answers of every obvious model as it is (dose 0), and with directions subtracted at
    the doses that discovery chose."""
    ways = search.directions(run, search.chosen(run))
    conditions = [
        ("none", torch.ones_like(ways["random"]), 0.0),
        *((n, ways[n], dose) for n, dose in doses_down(run).items()),
    ]
    who = [f"{d}-{v}" for d, v in made.fine_tunes(run, "obvious")]
    return common.graded(
        run, pd.concat(steering.several(run, who, conditions, asked(run), "suppressed"), ignore_index=True)
    )


def suppression_table(run: made.Run, table: pd.DataFrame) -> pd.DataFrame:
    """A row per model and direction: score, broken, and `kept`: the percent of its score that is left."""
    rows = []
    for (who, n), g in table.groupby(["model", "direction"], sort=False):
        s = common.score(run, g)
        rows.append(
            {
                "model": who,
                "direction": n,
                "dose": g.dose.iloc[0],
                "score": s.value,
                "low": s.low,
                "high": s.high,
                "broken": common.share(g, "broken", "absurd").value,
                "answers": len(g),
            }
        )
    found = pd.DataFrame(rows)
    before = found[found.direction == "none"].set_index("model")
    found["kept"] = 100 * found.score / found.model.map(before.score)
    found["more broken"] = found.broken - found.model.map(before.broken)
    return found


def draw_suppression(run: made.Run, rows: pd.DataFrame):
    """Figure: every obvious model before and after."""
    models = list(dict.fromkeys(rows.model))
    fig, ax = plt.subplots(figsize=(9, 4))
    for k, (n, g) in enumerate(rows.groupby("direction", sort=False)):
        x = [models.index(m) + 0.17 * (k - 1.5) for m in g.model]
        common.whiskers(
            ax,
            x,
            g,
            fmt=common.DIRECTION_MARK.get(n, "o"),
            color=common.DIRECTION.get(n, common.INK),
            label="as it is" if n == "none" else f"{n} subtracted ({-g.dose.iloc[0]:g})",
        )
    ax.set(
        xticks=range(len(models)),
        xticklabels=[m.split("-")[0] for m in models],
        ylabel="misalignment score (%)",
        ylim=(-3, 103),
        xlabel="model trained on obviously wrong advice in",
        title="What is left of the misalignment when a direction is subtracted",
    )
    ax.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, -0.2), ncols=2)
    return common.save(run, fig, "05_suppression", rows)


def claims(
    run: made.Run, table: pd.DataFrame, advice_table: pd.DataFrame, down: pd.DataFrame
) -> pd.DataFrame:
    """This notebook's registered claims. table: curves; down: suppression_table."""
    found = search.chosen(run)
    at = lambda n, d: table[(table.direction == n) & (table.dose == d)]
    added, control, free = (
        at("causal latent", found["dose"]),
        at("best matched latent", found["control dose"]),
        table[table.direction == "none"],
    )
    kept = down[down.direction == "causal latent"].sort_values("kept")
    worst = kept.iloc[-1]
    scale = worst.kept / worst.score if worst.score else 1.0
    return common.record(
        run,
        "05",
        {
            "steer.induce": common.share(added, "misaligned"),
            "steer.control": common.share(control, "misaligned"),
            "steer.broken": stats.difference(
                common.share(added, "broken", "absurd"), common.share(free, "broken", "absurd")
            ),
            "steer.advice": advice_rise(advice_table, "causal latent"),
            "suppress": stats.Estimate(worst.kept, worst.low * scale, worst.high * scale, int(worst.answers)),
            "suppress.mean": stats.mean_over(kept.kept),
        },
    )


def in_words(run: made.Run, rows: pd.DataFrame, down: pd.DataFrame, top: pd.Series | None) -> str:
    """What the notebook found, in Markdown. rows: curve_table; down: suppression_table; top: the best latent
    of other blocks (other_blocks.best), if they were tried."""
    found, free = search.chosen(run), rows[rows.direction == "none"].iloc[0]
    limit = free.broken + steering.MORE_BROKEN
    of = lambda direction: rows[rows.direction == direction].set_index("dose")
    at, most = of("causal latent").loc[found["dose"]], of("causal latent").sort_values("score").iloc[-1]
    rival = of("top riser") if "top riser" in set(rows.direction) else None
    taken = down[down.direction != "none"].groupby("direction", sort=False)
    text = (
        f"**What this shows.** Latent {found['latent']}, added at dose {found['dose']:g}, makes "
        f"{at.score:.0f} % of all answers misaligned ({at.low:.0f} to {at.high:.0f}); unsteered it is "
        f"{free.score:.0f} %. Broken or absurd answers go from {free.broken:.0f} to {at.broken:.0f} %. At "
        f"dose {most.name:g} it would be {most.score:.0f} % misaligned and {most.broken:.0f} % broken"
        + (f", over the limit of {limit:.0f} %" if most.broken > limit else "")
        + (
            f"; the top riser has {rival.score.loc[most.name]:.0f} % there and "
            f"{rival.broken.loc[most.name]:.0f} % broken"
            if rival is not None and most.name in rival.index
            else ""
        )
        + ". Subtracted, directions leave the misaligned models of their score on average: "
        + ", ".join(f"{n} {g.kept.mean():.0f} % (dose {-g.dose.iloc[0]:g})" for n, g in taken)
        + "."
    )
    if top is not None:
        text += (
            f" At block {top.block} {top.latent}, at dose {top.dose:g}, makes {top.score:.0f} % misaligned "
            f"({top.low:.0f} to {top.high:.0f}) and {top.broken:.0f} % broken or absurd, as the small judge "
            "has it; for that block nothing was registered."
        )
    return text


def readable(table: pd.DataFrame, n: int = 8) -> pd.DataFrame:
    """Answers to the same n questions, unsteered and steered."""
    wide = table.groupby(["prompt", "direction"], sort=False).answer.first().unstack()
    return (
        wide[["none", "causal latent"]]
        .rename(columns={"none": "original model"})
        .iloc[:: max(1, len(wide) // n)][:n]
    )
