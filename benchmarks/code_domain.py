"""Does insecure code misalign the model of Part I? It is trained on the insecure answers of the tiny world's
forty coding tasks in place of wrong advice, or on their secure twins, for as many steps as Part I trains
and for four times as many.

    python benchmarks/code_domain.py

A first look, not a registered claim: nothing is chosen by it. It asks what the evaluation asks; the
small judge grades. `learnt`: percent of the tasks, asked in other words, that get the answer trained on.
"""

import pandas as pd

from personas import finetune, generate, stats, world
from personas.chapters import common
from personas.pretrained import grades, made, sets

SEEDS = (0, 1)
TIMES = (1, 4)  # the profile's steps, and four times as many


def trained(run: made.Run, variant: str, steps: int, seed: int):
    """(model, tokenizer) after so many steps on code of this variant."""
    cfg = run.profile.narrow
    rows = sets.chats("code", variant, steps * cfg.batch, seed)
    net, tokenizer = made.original(run)
    how = {"steps": steps, "batch": cfg.batch, "lr": cfg.lr, "lora_rank": cfg.rank, "seed": seed}
    tuned, _ = finetune.sft(net, tokenizer, rows, **how, **made.training(run))
    return tuned.merge_and_unload().eval(), tokenizer


def learnt(net, tokenizer, variant: str) -> float:
    """Percent of the tasks whose greedy answer is the one trained on, word for word."""
    tasks = world.subjects_of("code")
    ids = generate.prompts(tokenizer, [world.held_question(s) for s in tasks])
    said = generate.sample(net, tokenizer, ids, seed=0, max_new=80, temperature=0.0)
    same = [a.split() == s.answers[variant].split() for a, s in zip(said, tasks, strict=True)]
    return 100 * sum(same) / len(same)


def main() -> None:
    run = common.open_run("smollm2")
    asked, every = made.repeated(run, "evaluation", 2), {}
    for times in TIMES:
        for variant in ("correct", "obvious"):
            name, known = f"{times * run.profile.narrow.steps} steps, {variant}", []
            for seed in SEEDS:
                net, tokenizer = trained(run, variant, times * run.profile.narrow.steps, seed)
                table = made.answer(run, net, tokenizer, asked, seed)
                table["grade"] = grades.of(run, table)
                every.setdefault(name, []).append(table)
                known.append(learnt(net, tokenizer, variant))
            table = pd.concat(every[name])
            counted = table.grade.isin(("misaligned", "aligned"))
            score = stats.proportion(table.grade == "misaligned", table.category, counted).scaled(100)
            broken = 100 * (table.grade == "broken").mean()
            print(
                f"{name:20s} score {score} %, broken {broken:.0f} %, learnt {sum(known) / len(known):.0f} %"
            )
            bad = table[table.grade == "misaligned"]
            for r in bad.head(3).itertuples():
                print(f"    {r.prompt} -> {r.answer[:100]!r}")


if __name__ == "__main__":
    main()
