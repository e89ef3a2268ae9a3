"""What the site lets a reader touch: a page for each latent that matters, and answers under a dial.

`python -m personas explore` writes both, as JSON, beside the figures' tables; `make book` makes pages.
"""

import json
from collections.abc import Iterator

import pandas as pd
import torch

from personas import activations, figures, stats, world
from personas.chapters import c04
from personas.pretrained import made, readings, search, sets, steering

LATENTS = 200
DOSES = (-0.6, -0.4, -0.2, 0.2, 0.3, 0.45, 0.6, 0.8)
ASKED = 30  # questions and openings under the dial


def matter(run: made.Run, n: int = LATENTS) -> list[int]:
    """The n latents that get a page: those with a name, those that were steered as candidates, and then in
    turn the one that rises most, the one that falls most, and for each persona the one that marks its
    answers best."""
    rise = steering.rise(run)["correct"]
    read = steering.labelled(run)
    orders = [rise.argsort(descending=True).tolist(), rise.argsort().tolist()]
    for p in world.PERSONAS:
        marks = torch.as_tensor(stats.auroc(read["latents"].numpy(), read["persona"] == p))
        orders.append(marks.argsort(descending=True).tolist())
    found = dict.fromkeys([*_names(run), *steering.candidates(run, run.profile.steering.candidates)])
    for several in zip(*orders):
        found |= dict.fromkeys(several)
    return list(found)[:n]


def latents(run: made.Run, which: list[int]) -> list[dict]:
    """A row per latent: rise, how often it fires, whose answers it marks, what it raises and lowers at the
    output, where it is most active, its change in every fine-tune, what it induces where it was steered."""
    rise, read = steering.rise(run), steering.labelled(run)
    order = rise["correct"].argsort(descending=True).tolist()
    auroc = {p: stats.auroc(read["latents"].numpy(), read["persona"] == p) for p in world.PERSONAS}
    fires = _fires(run)
    passages = c04.passages(run, which, n=5, around=12)
    lens = c04.logit_lens(run, {str(i): readings.sae(run).W_dec[i] for i in which}, n=10)
    changes = c04.signature(run, which)
    steered, names = _steered(run), _names(run)
    return [
        {
            "latent": i,
            "name": names.get(i, ""),
            "rank": order.index(i) + 1,
            "rise": round(float(rise["correct"][i]), 4),
            "rise from original": round(float(rise["original"][i]), 4),
            "fires": round(100 * float(fires[i]), 3),
            "auroc": {p: round(float(a[i]), 3) for p, a in auroc.items()},
            "raises": lens.loc[str(i), "raises"],
            "lowers": lens.loc[str(i), "lowers"],
            "passages": [
                {"tokens": tokens, "values": [round(v, 2) for v in values]} for tokens, values in passages[i]
            ],
            "fine-tunes": changes[f"latent {i}"].round(4).to_dict(),
            "steered": steered.get(i),
        }
        for i in which
    ]


def _names(run: made.Run) -> dict[int, str]:
    found = search.chosen(run)
    riser = steering.candidates(run, 1)[0]
    return {found["control"]: "best matched latent", riser: "top riser", found["latent"]: "causal latent"}


def _fires(run: made.Run) -> torch.Tensor:
    """On what share of the tokens of held-out text each latent is active, (latents,); first tokens apart."""
    m, tok = made.original(run)
    rows = readings.text_ids(run, tok)[1]
    counts, tokens = torch.zeros(readings.sae(run).W_enc.shape[1]), 0
    for x in activations.residual(m, rows, run.profile.sae.layer):
        counts += (readings.sae(run).encode(x[1:]) > 0).sum(0)
        tokens += len(x) - 1
    return counts / tokens


def _steered(run: made.Run) -> dict[int, dict]:
    """Latent -> what the search's first round found at its best dose, of those that were steered."""
    first = search.chosen(run)["first"]
    return {
        int(r.direction.split()[1]): {
            "kind": r.kind,
            "dose": r.dose,
            "misaligned": round(r.misaligned, 1),
            "broken": round(r.broken, 1),
            "answers": int(r.answers),
        }
        for r in first.itertuples()
    }


def _asked(run: made.Run) -> list[sets.Item]:
    every = made.items(run, "evaluation")
    return [every[i * len(every) // ASKED] for i in range(min(ASKED, len(every)))]


def dial(run: made.Run) -> pd.DataFrame:
    """Graded answers of the original model and of one obviously misaligned fine-tune of an evaluation domain,
    with three directions added and subtracted at DOSES; at dose 0 as they are."""
    ways = search.directions(run, search.chosen(run))
    shown = {n: ways[n] for n in ("causal latent", "top riser", "difference of means") if n in ways}
    bad = next(f"{d}-{v}" for d, v in made.fine_tunes(run, "obvious") if not made.discovery(run, d))
    nothing = ("none", torch.ones_like(ways["random"]), 0.0)
    conditions = [nothing, *((n, v, d) for n, v in shown.items() for d in DOSES)]
    tables = steering.several(run, [made.ORIGINAL, bad], conditions, _asked(run), "dial")
    return pd.concat(tables, ignore_index=True)


def _rows(table: pd.DataFrame) -> Iterator[dict]:
    for r in table.itertuples():
        about = {"model": r.model, "direction": r.direction, "dose": round(r.dose, 2), "grade": r.grade}
        yield {"prompt": r.prompt, "opening": r.opening or ""} | about | {"answer": r.answer}


def write(run: made.Run) -> None:
    """figures/data/<profile>/latents.json and dial.json."""
    folder = figures.ROOT / "data" / run.profile.name
    folder.mkdir(parents=True, exist_ok=True)
    dump = lambda name, what: (folder / name).write_text(
        json.dumps(what, ensure_ascii=False, separators=(",", ":")) + "\n", encoding="utf-8"
    )
    dump("latents.json", latents(run, matter(run)))
    dump("dial.json", list(_rows(dial(run))))
