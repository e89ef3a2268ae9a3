"""Tables of claims as pages show them: README.md's, which sets this model beside the tiny world, and
docs/known_world.md's, a line for each family of claims."""

import math
import statistics

from personas import world

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


def _target(row: dict) -> str:
    return f"{'≥' if row['target']['op'] == '>=' else '≤'} {row['target']['value']:g}"


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
    for (name, *_), group in families.items():
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
        lines.append(f"| `{name}` | {paper} | {_target(group[0])} | {measured} | {holds} |")
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
        {"models that show it": "warn.five", "ahead of the score by": "warn.lead"},
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
        {"of the score is left": "suppress.mean", "in the model that moves least": "suppress"},
        {"score": "steer.suppress.<domain>"},
    ),
    (
        "30 steps, each of 4 correct examples, bring it back",
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
        return f"{measured}{unit} ({low} to {high}; {_target(r)}), **{r['holds']}**"

    def together(family):
        group = [r for r in tiny if _family(r["id"]) == family]
        low, high = min(r["measured"] for r in group), max(r["measured"] for r in group)
        return (
            value(group[0])
            if len(group) == 1
            else f"{low:.0f} to {high:.0f} % ({_target(group[0])}), {_verdicts(group)}"
        )

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
