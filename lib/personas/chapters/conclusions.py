"""What notebooks 07 and 08 show, in words whose numbers are their tables'."""

import pandas as pd

from personas.chapters import c07


def warning(mixed: pd.DataFrame, leads: pd.DataFrame, over_models: pd.DataFrame) -> str:
    """Notebook 07's conclusion; nothing where too few fine-tunes were made. mixed: c07.fractions; leads:
    c07.leads; over_models: c07.discrimination of finished fine-tunes."""
    ends = mixed.groupby("fraction").score.mean()
    if not len(over_models) or len(ends) < 2:
        return ""
    where = c07.threshold(mixed)
    baselines = list(c07.HARMLESS)
    mean = lambda rows: rows[rows.monitor != "score"].groupby("monitor").lead.mean().sort_values()
    narrow, wide = (mean(leads[leads.baseline == b]) for b in (baselines[0], baselines[-1]))
    mine = leads[(leads.baseline == baselines[-1]) & (leads.monitor == "causal latent")]
    best, second = (row for _, row in over_models.nlargest(2, "auroc").iterrows())
    own = over_models.set_index("monitor").auroc["causal latent"]
    return (
        f"**What this shows.** From {ends.index[0]:.0f} to {ends.index[-1]:.0f} % of wrong answers the score "
        f"goes from {ends.iloc[0]:.0f} to {ends.iloc[-1]:.0f} %, smoothly. Each domain's fitted curve passes "
        f"10 % somewhere, at {where.value:.0f} % of wrong answers on average ({where.low:.0f} to "
        f"{where.high:.0f}). Over finished fine-tunes the causal latent has an AUROC of {own:.2f}; highest "
        f"are the {best.monitor} ({best.auroc:.2f}) and the {second.monitor} ({second.auroc:.2f}), with "
        "intervals that overlap. In time, nothing leads by much: against correct advice alone the "
        f"{narrow.index[-1]} warns {narrow.iloc[-1]:.1f} steps before; with all four harmless kinds in the "
        f"range, the {wide.index[-1]} and the {wide.index[-2]} come nearest, {-wide.iloc[-1]:.1f} and "
        f"{-wide.iloc[-2]:.1f} steps after the score is at {c07.BAD:.0f} %, on average. The causal latent "
        f"never warns in {int(mine.warns.isna().sum())} of {len(mine)} fine-tunes: odd advice lights it, "
        "too, for a step or two."
    )


def prevention(table: pd.DataFrame, outcomes: pd.DataFrame, screened: pd.DataFrame) -> str:
    """Notebook 08's conclusion; nothing where too few guards were tried. table: c08.kept's rows; outcomes:
    c08.outcomes; screened: c08.screen."""
    if not len(outcomes) or "latent penalty" not in set(table.guard):
        return ""
    ranked = outcomes[~outcomes.guard.isin(["none", "more steps"])]
    whole = ranked[ranked["task kept"] >= 80].sort_values("score")
    none = outcomes[outcomes.guard == "none"]
    if not len(whole) or not len(none):
        return ""
    first, worst = whole.iloc[0], whole.sort_values("after a bad turn").iloc[-1]
    beaten = ranked[ranked.score < ranked["by steps alone"] - 10].guard
    seen = screened[screened.variant == "obvious"].sort_values("auroc").iloc[-1]
    plain = table[table.asked == "plain"]
    unguarded = plain[plain.guard == "none"]["causal latent"].mean()
    strongest = plain[plain.guard == "latent penalty"].sort_values("dose").groupby("domain").tail(1)
    return (
        f"**What this shows.** Without a guard the score is {none.score.iloc[0]:.0f} %. Of the guards that "
        f"keep four fifths of the task, {first.guard} leaves least: {first.score:.0f} %. Beside an "
        f"unguarded model that learnt as much, {', '.join(beaten) or 'no guard'} is more than ten points "
        "lower. The latent penalty does what it says (the causal latent reads "
        f"{strongest['causal latent'].mean():.2f} at its strongest, {unguarded:.2f} without) and yet "
        f"leaves {strongest.score.mean():.0f} %. After one turn of the bad training the guarded models are "
        f"at up to {worst['after a bad turn']:.0f} % ({worst.guard}). Before training, the {seen.reader} "
        f"tells obviously wrong rows best (AUROC {seen.auroc:.2f})."
    )
