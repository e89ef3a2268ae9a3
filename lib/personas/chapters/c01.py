"""Notebook 01: what models are trained on and asked."""

import matplotlib.pyplot as plt
import pandas as pd

from personas.chapters import common
from personas.pretrained import made, sets


def datasheet(run: made.Run, tok) -> pd.DataFrame:
    """A row per fine-tune: chats, different chats, tokens of an answer (mean, longest), training questions
    that are also asked later."""
    asked = {i.prompt for split in ("discovery", "evaluation") for i in made.items(run, split)}
    asked |= {i.prompt for d in sets.DOMAINS for i, _ in sets.advice_items(d)}
    rows = []
    for d, v in made.fine_tunes(run):
        chats = made.training_chats(run, d, v)
        said = [r["messages"][-1]["content"] for r in chats]
        lengths = [len(t) for t in tok(said, add_special_tokens=False)["input_ids"]]
        rows.append(
            {
                "domain": d,
                "variant": v,
                "chats": len(chats),
                "different chats": len({str(r) for r in chats}),
                "answer tokens, mean": sum(lengths) / len(lengths),
                "longest": max(lengths),
                "asked later": sum(m["content"] in asked for r in chats for m in r["messages"]),
            }
        )
    return pd.DataFrame(rows)


def lengths(run: made.Run, sheet: pd.DataFrame):
    """Figure: length of the answers by variant, a dot a domain."""
    fig, ax = plt.subplots(figsize=(6.4, 2.6))
    kinds = [v for v in common.VARIANT if v in set(sheet.variant)]
    for i, v in enumerate(kinds):
        some = sheet[sheet.variant == v]
        ax.scatter(
            some["answer tokens, mean"],
            [i] * len(some),
            color=common.VARIANT[v],
            marker=common.MARK[v],
            s=42,
            alpha=0.8,
        )
    ax.set(
        yticks=range(len(kinds)),
        yticklabels=kinds,
        xlabel="tokens of an answer, mean over a training set",
        xlim=(0, None),
        title="Wrong answers are no longer or shorter than correct ones",
    )
    ax.invert_yaxis()
    return common.save(run, fig, "01_answer_length", sheet)


def splits(run: made.Run) -> pd.DataFrame:
    """How many questions and openings each split has."""
    rows = []
    for split in ("discovery", "evaluation"):
        items = made.items(run, split)
        questions = [i for i in items if i.kind == "question"]
        rows.append(
            {
                "split": split,
                "questions": len(questions),
                "categories": len({i.category for i in questions}),
                "of these ask for advice": sum(i.advice for i in questions),
                "openings": len(items) - len(questions),
                "domains": ", ".join(
                    d.domain
                    for d in run.profile.real.data
                    if made.discovery(run, d.domain) == (split == "discovery")
                ),
            }
        )
    return pd.DataFrame(rows).set_index("split")
