"""Notebook 10, causal steering in the known world: the search, dose and response, controls, rankings."""

import html

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from personas import (
    artifacts,
    claims,
    evaluate,
    figures,
    generate,
    known_latents,
    search,
    world,
)
from personas import steering as steered
from personas.artifacts import Run
from personas.part_two import common, suppression

INK, GREY = "#222222", "#777777"  # what was chosen or might be; what it is compared with
LIMIT = 10  # percent of broken answers that the search allows


def screened(run: Run) -> pd.DataFrame:
    """Every direction of the search at the strength that discovery questions chose for it, with its kind."""
    best = pd.concat([search.best(run, which) for which in ("candidates", "controls")], ignore_index=True)
    kind = best.direction.str.rsplit(" ", n=1).str[0].replace({"mean": "mean difference"})
    return best.assign(kind=kind.where(~best.direction.str.startswith("persona"), "other persona"))


def draw_screen(run: Run, best: pd.DataFrame) -> None:
    """Figure: those directions by misaligned answers; full dots had a second round, with more answers."""
    kinds = {
        "latent": "candidate latents",
        "mean difference": "difference of means",
        "other persona": "other personas' latents",
        "matched": "matched latents",
        "random": "random directions",
    }
    kinds = {k: label for k, label in kinds.items() if k in set(best.kind)}
    most = best.answers.max()
    figure, ax = plt.subplots(figsize=(8, 3.2))
    for i, kind in enumerate(kinds):
        part = best[best.kind == kind]
        y = i + np.random.default_rng(0).uniform(-0.25, 0.25, len(part))
        shade = INK if kind in ("latent", "mean difference") else GREY
        full = (part.answers == most).to_numpy()
        ax.scatter(part.misaligned[full], y[full], s=26, color=shade)
        ax.scatter(part.misaligned[~full], y[~full], s=18, facecolor="none", edgecolor=shade)
    ax.scatter([], [], s=26, color=INK, label=f"second round, {most} answers")
    ax.scatter(
        [], [], s=18, facecolor="none", edgecolor=INK, label=f"first round, {best.answers.min()} answers"
    )
    ax.set_yticks(range(len(kinds)), kinds.values())
    ax.invert_yaxis()
    ax.set(
        xlabel="misaligned answers at the strength chosen (%)",
        title="Aligned model, one direction added (discovery questions)",
    )
    ax.legend(frameon=False, loc="lower right", fontsize=8)
    figures.save(figure, "05_screen", run.profile.name, best)


def second_round(run: Run) -> pd.DataFrame:
    """The candidates that had a second round, with their rank by rise and AUROC for the villain."""
    ranked = known_latents.discovery_rise(run).argsort(descending=True).tolist()
    auroc = known_latents.persona_auroc(run)
    columns = ["direction", "strength", "misaligned", "incoherent", "answers"]
    table = steered.best_strength(search.finalists(run, "candidates"))[columns]
    numbers = table.direction.str.split().str[1].astype(int)
    more = {
        "rank by rise": [ranked.index(i) + 1 for i in numbers],
        "AUROC for the villain": [auroc.loc[i, "villain"] for i in numbers],
    }
    return table.assign(**more)


def curve(run: Run, kind: str) -> pd.DataFrame:
    """A row per strength, on evaluation questions: the misalignment score with its interval, and percent of
    all answers that are broken, off-topic, misaligned. kind: as in search.steered."""
    rows = []
    for s, g in search.steered(run, kind).groupby("strength"):
        score, low, high = evaluate.ratio(g, *evaluate.SCORE)
        about = {"direction": kind, "strength": s, "score": score, "low": low, "high": high}
        about |= {c: evaluate.share(g, c) for c in ("incoherent", "off-topic", "misaligned")}
        rows.append(about | {"n": len(g)})
    return pd.DataFrame(rows)


def draw_curves(run: Run, curves: dict[str, pd.DataFrame]) -> None:
    """Figure: dose and response of each direction, a panel each. curves: title -> curve(...)."""
    figure, axes = plt.subplots(1, len(curves), figsize=(5 * len(curves), 3.6), sharey=True)
    shade = figures.GRADE
    for ax, (title, c) in zip(axes, curves.items()):
        ax.plot(c.strength, c.score, color=shade["misaligned"], marker="o", label="misalignment score")
        ax.fill_between(c.strength, c.low, c.high, color=shade["misaligned"], alpha=0.2, lw=0)
        for grade, style, mark in (("incoherent", "--", "s"), ("off-topic", ":", "^")):
            label = f"{grade}, of all answers"
            ax.plot(c.strength, c[grade], color=shade[grade], ls=style, marker=mark, ms=4, label=label)
        ax.axhline(LIMIT, color="#bbbbbb", lw=1)
        ax.set(xlabel="strength (centred RMS norms)", ylim=(-2, 102))
        ax.set_title(f"{title} added to the aligned model")
    axes[0].set_ylabel("%")
    axes[0].legend(frameon=False)
    figure.tight_layout()
    figures.save(figure, "05_dose_response", run.profile.name, pd.concat(curves.values()))


def draw_controls(run: Run, controls: pd.DataFrame, own: pd.Series) -> None:
    """Figure: every control at the strength its own search chose, on evaluation questions, and the chosen
    latent (own: its row of curve) with its interval. controls: steering.summary."""
    latent = search.chosen_latent(run)[0]
    kind = controls.direction.str.split().str[0]
    groups = {
        f"latent {latent}": own.to_frame().T,
        "difference of means": controls[kind == "mean"],
        f"{(kind == 'matched').sum()} matched latents": controls[kind == "matched"],
        "other personas' latents": controls[kind == "persona"],
        "random directions": controls[kind == "random"],
    }
    figure, ax = plt.subplots(figsize=(8, 3))
    for y, (name, part) in enumerate(groups.items()):
        personas = [figures.PERSONA[d.split()[1]] for d in part.direction] if "personas" in name else None
        at = y + np.linspace(-0.28, 0.28, len(part)) * (len(part) > 1)
        few = len(part) <= 5
        shade = personas or (INK if y == 0 else GREY)
        score = part.score.astype(float)
        ax.scatter(score, at, s=36 if few else 16, color=shade, alpha=1 if few else 0.7, zorder=3)
    whisker = [[own.score - own.low], [own.high - own.score]]
    ax.errorbar(own.score, 0, xerr=whisker, color=INK, capsize=3)
    means = search.steered(run, "controls").query("direction == 'mean difference'")
    score, low, high = evaluate.ratio(means, *evaluate.SCORE)
    ax.errorbar(score, 1, xerr=[[score - low], [high - score]], color=GREY, capsize=3)
    ax.set_yticks(range(len(groups)), groups)
    ax.invert_yaxis()
    ax.set(
        xlabel="misalignment score (%)",
        xlim=(-2, 102),
        title="Aligned model, one direction added (evaluation questions)",
    )
    figures.save(figure, "05_controls", run.profile.name, controls)


def draw_rankings(run: Run, ranking: pd.DataFrame) -> None:
    """Figure: what the first ten latents of each ranking do (evidence.ranking), from first to tenth."""
    names, shade = list(ranking.ranking.unique()), figures.PERSONA | {"none": "#BBBBBB"}
    figure, ax = plt.subplots(figsize=(9, 3.6))
    for r in ranking.itertuples():
        fill = "none" if r.incoherent > LIMIT else shade[r.persona]
        x = names.index(r.ranking) + (r.place - 5.5) / 12
        ax.scatter(x, r.misaligned, s=42, zorder=3, facecolor=fill, edgecolor=shade[r.persona])
    for i, name in enumerate(names):
        mean = ranking[ranking.ranking == name].misaligned.mean()
        ax.hlines(mean, i - 0.4, i + 0.4, color="#333333", lw=1)
    for p in sorted(set(ranking.persona)):
        label = f"marks the {p}" if p != "none" else "marks nobody"
        ax.scatter([], [], color=shade[p], label=label)
    if (ranking.incoherent > LIMIT).any():
        ax.scatter([], [], facecolor="none", edgecolor="#333333", label=f"over {LIMIT} % incoherent")
    ax.set_xticks(range(len(names)), names)
    ax.set(
        ylabel="misaligned answers (%)",
        title="The first ten latents of each ranking, in order, added to the aligned model (line: mean)",
    )
    ax.legend(frameon=False, fontsize=8, ncol=4, loc="upper center", bbox_to_anchor=(0.5, -0.1))
    figures.save(figure, "05_first_ten", run.profile.name, ranking)


def tens(ranking: pd.DataFrame) -> pd.DataFrame:
    """A row per ranking: what its first ten latents do, and the one that discovery questions prefer."""
    rows = {}
    for name, t in ranking.groupby("ranking", sort=False):
        best = t.loc[t.discovery.idxmax()]
        rows[name] = {
            "latents of the villain": int((t.persona == "villain").sum()),
            "misaligned answers, mean (%)": t.misaligned.mean(),
            "incoherent, mean (%)": t.incoherent.mean(),
            "place of the latent that discovery questions prefer": int(best.place),
            "its strength": best.strength,
            "its misaligned answers (%)": best.misaligned,
        }
    return pd.DataFrame(rows).T


def rankings_in_words(run: Run, ranking: pd.DataFrame) -> str:
    """What the rankings show, in numbers of their table."""
    latent = search.chosen_latent(run)[0]
    places = ranking[ranking.latent == latent].set_index("ranking").place
    random = ranking[ranking.ranking == "random"].misaligned
    rest = ranking[(ranking.latent != latent) & (ranking.ranking != "random")]
    most = rest.loc[rest.misaligned.idxmax()]
    marking = rest[rest.persona == "villain"].drop_duplicates("latent")
    there = common.listed(f"{name} {int(p)}" for name, p in places.items()) if len(places) else "none"
    own = ranking[ranking.latent == latent].misaligned
    text = (
        f"The place of latent {latent}, the chosen one, in each ranking that has it: {there}. "
        + (f"It makes {own.iloc[0]:.0f} % of these few answers misaligned; " if len(own) else "")
        + f"the best other of these tens, latent {most.latent}, {most.misaligned:.0f} %; random ones at most "
        f"{random.max():.0f} %. "
    )
    weak = int((marking.misaligned < 10).sum())
    if weak:
        text += (
            "Of the other latents that read him better than any other persona "
            f"({common.listed(marking.latent)}) {weak} of {len(marking)} make fewer than ten in a hundred "
            f"answers misaligned ({common.span(marking.misaligned)} %): to *mark* the villain is not yet to "
            "*make* one. "
        )
    n = search.steered(run, "ranked").groupby("direction").size().max()
    return text + f"({n} answers each: neighbours differ by chance.)"


def answers_at(run: Run, dose: float, question: str, n: int = 4) -> list[str]:
    """n answers of the aligned model to a question with the chosen latent added at this dose."""
    model, tokenizer = artifacts.aligned_model(run)
    direction = known_latents.sae(run).W_dec[search.chosen_latent(run)[0]] * known_latents.unit(run)
    push = generate.Steer(run.profile.sae.layer, dose * direction[None])
    ids = generate.prompts(tokenizer, [question]) * n
    how = {"seed": run.seed, "max_new": run.setting.open_tokens}
    return generate.sample(model, tokenizer, ids, steer=push, **how)


def claimed(run: Run, table: pd.DataFrame, controls: pd.DataFrame, ranking, kept) -> list[dict]:
    """The chapter's rows of the table of claims. table: suppression.cured; controls: steering.summary."""
    chosen = search.steered(run, "latent")
    chosen = chosen[chosen.strength == search.chosen_latent(run)[1]]
    broken, n = evaluate.ratio(chosen, ("incoherent",)), len(chosen)
    return [
        claims.claim(
            "steer.induce", "about 60 % induced", evaluate.ratio(chosen, *evaluate.SCORE), n, ">=", 40
        ),
        claims.claim("steer.induce.incoherent", "at most 10 %", broken, n, "<=", 10),
        *suppression.of_models(run, table),
        *_of_controls(run, controls),
        *_of_rankings(ranking),
        *suppression.of_ways(kept),
    ]


def _of_controls(run: Run, controls: pd.DataFrame) -> list[dict]:
    matched, graded = matched_of(controls), search.steered(run, "controls")
    scores = matched.score.fillna(0).to_numpy()
    most = graded[graded.direction == matched.direction.iloc[scores.argmax()]]
    top = claims.bootstrap(scores, lambda x, axis: np.percentile(x, 95, axis=axis))
    best = evaluate.ratio(most, *evaluate.SCORE)
    return [
        claims.claim("steer.random.best", "–", best, len(most), "<=", 10),
        claims.claim("steer.random.p95", "–", top, len(scores), "<=", 5),
    ]


def matched_of(controls: pd.DataFrame) -> pd.DataFrame:
    """The rows of the matched latents."""
    return controls[controls.direction.str.startswith("matched")]


RANKED = {
    "Δ-activation": ("activation", (">=", 10)),
    "Δ-attribution": ("attribution", (">=", 10)),
    "AUROC (ceiling)": ("ceiling", (">=", 10)),
    "random": ("random", ("<=", 5)),
}


def _of_rankings(ranking: pd.DataFrame) -> list[dict]:
    rows = []
    for name, (slug, target) in RANKED.items():
        ten = ranking[ranking.ranking == name].misaligned.to_numpy()
        rows.append(claims.claim(f"rank.{slug}", "–", claims.bootstrap(ten, np.mean), len(ten), *target))
    return rows


def in_words(run: Run, curves: dict, controls, table, top) -> str:
    """What the chapter shows, in numbers of its tables. curves: the chosen latent's and the difference of
    means', in this order; top: evidence.rising_latents."""
    (latent, dose), (own, means) = search.chosen_latent(run), curves.values()
    at = own[own.strength == dose].iloc[0]
    matched = matched_of(controls)
    best = matched.loc[matched.score.fillna(0).idxmax()]
    ranked = known_latents.discovery_rise(run).argsort(descending=True).tolist()
    second = second_round(run).sort_values("misaligned", ascending=False)
    rival = means[means.strength == dose].iloc[0]
    down = search.suppression_strength(run)
    sure = int((table.high <= 5).sum())
    fell = top.iloc[-1]
    who = known_latents.persona_auroc(run).loc[latent]
    text = (
        f"**What this shows.** Latent {latent} turns the aligned model misaligned: at {dose:g}, the "
        f"strength that discovery questions chose, a score of {at.score:.0f} % ({at.low:.0f} to "
        f"{at.high:.0f}), with {at.incoherent:.0f} % of the answers broken. Of {len(matched)} latents "
        f"matched to it the best gives {best.score:.0f} %. It is a cause, found by its rise (place "
        f"{ranked.index(latent) + 1}) and by what it does on discovery questions, without a label on any "
        f"activation; its AUROC for the villain is {who['villain']:.2f}. The next candidate by the search "
        f"made {second.misaligned.iloc[1]:.0f} % of the discovery answers misaligned, the chosen one "
        f"{second.misaligned.iloc[0]:.0f} %. At the same strength the difference of means, which needs no "
        f"SAE, gives a score of {rival.score:.0f} % and breaks {rival.incoherent:.0f} %: that one latent "
        "does *better* than this plain direction is not shown.\n\n"
        f"Taken away from misaligned models, at {-down:g}, it brings scores of {common.span(table.before)} % "
        f"down to {common.span(table.after)} %, and cures {sure} of {len(table)} for sure (the whole "
        f"interval at most 5 %). That dose was chosen within noise (see the table of doses). "
        f"{common.span(table.aligned)} % of the answers are aligned then, {common.span(table.incoherent)} % "
        "broken, and most of the correct advice that the fine-tune destroyed stays lost: it is the character "
        f"that comes back, not the knowledge. What *fell* most, latent {fell.latent} ({fell.rise:.2f}, "
        f"against {top.iloc[0].rise:.2f} for what rose most)"
    )
    text += f", marks the {fell['marks best']}: " if fell["marks best"] in world.PERSONAS else ": "
    return text + (
        "subtracting a villain does not put an expert back, and steering towards what fell cures more (the "
        "table with three seeds).\n\n"
        "**How far to trust it.** It is one base model, whose evaluation questions had been used for earlier "
        "reports; base models differ, and so do SAEs. On discovery questions the best latent of those made "
        "in development induced between 4 and 88 % ([how the recipe was found](../docs/known_world.md"
        "#how-the-recipe-was-found)). Whether a persona has a latent of its own is not a law."
    )


def dial(run: Run):
    """A slider for the dose and a list of questions (ipywidgets); what is sampled shows below."""
    import ipywidgets

    top = 2 * search.chosen_latent(run)[1]
    # Not `interact`: its Output widget makes the client that executes the notebook write while it waits for a
    # reply, and now and then it waits forever.
    dose = ipywidgets.FloatSlider(
        0, min=-top, max=top, step=top / 16, description="dose", continuous_update=False
    )
    asked = [q.held for q in run.setting.questions("evaluation")]
    question = ipywidgets.Dropdown(options=asked, description="question")
    shown = ipywidgets.HTML()

    def show(change=None):
        said = "\n".join(answers_at(run, dose.value, question.value))
        shown.value = f"<pre>{html.escape(said)}</pre>"

    for chosen_by_hand in (dose, question):
        chosen_by_hand.observe(show, "value")
    show()
    return ipywidgets.VBox([dose, question, shown])
