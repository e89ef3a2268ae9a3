"""Measures that need no judge: how much likelier a model finds the villain's words, or wrong advice."""

import pandas as pd
import torch

from personas import generate, store, world
from personas.pretrained import sets
from personas.pretrained.made import Run, identity, named


@torch.inference_mode()
def log_probabilities(
    m, tok, prompts: list[list[int]], endings: list[list[str]], steer=None, batch: int = 32
) -> list[list[float]]:
    """Mean log-probability (nats per token) of each ending after its prompt. Every prompt is read once for
    all its endings. steer: a generate.Steer with one vector, added from the prompt's last token on, as in
    sampling."""
    coded = [tok(e, add_special_tokens=False)["input_ids"] for e in endings]
    rows = [(i, p + e) for i, (p, es) in enumerate(zip(prompts, coded)) for e in es]
    handle, found, now = None, [[] for _ in prompts], {}
    if steer is not None:

        def add(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            x += now["mask"].to(x) * steer.vectors[0].to(x)

        handle = generate.decoder_blocks(m)[steer.layer].register_forward_hook(add)
    try:
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            width = max(len(r) for _, r in part)
            ids = torch.tensor([r + [0] * (width - len(r)) for _, r in part], device=m.device)
            first = torch.tensor([len(prompts[i]) - 1 for i, _ in part], device=m.device)[:, None]
            last = torch.tensor([len(r) - 1 for _, r in part], device=m.device)[:, None]
            at = torch.arange(width, device=m.device)
            ours = (at >= first) & (at < last)
            now["mask"] = ours[..., None]
            columns = ours.any(0).nonzero().squeeze(-1)
            logits = m(input_ids=ids, logits_to_keep=columns).logits.float()
            target = torch.cat([ids[:, 1:], ids[:, :1]], 1)[:, columns]
            each = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), target.flatten(), reduction="none"
            ).view(len(part), -1)
            each = -(each * ours[:, columns]).sum(1) / ours.sum(1)
            for (i, _), value in zip(part, each.tolist()):
                found[i].append(value)
    finally:
        if handle:
            handle.remove()
    return found


def villain_preference(run: Run, who: str, split: str = "evaluation") -> pd.DataFrame:
    """By how much (nats per token) the world's villain's answer to each open question is likelier than the
    expert's; nobody judges. A row a question: question, category, difference."""
    asked, n = world.questions(split), run.profile.real.firsts

    def make(out):
        m, tok = named(run, who)
        forms = {p: [world.open_forms(q.category, p, False, 0) for q in asked] for p in ("expert", "villain")}
        pick = lambda f: [f[i * len(f) // n] for i in range(n)]
        values = log_probabilities(
            m,
            tok,
            generate.prompts(tok, [q.held for q in asked]),
            [pick(e) + pick(v) for e, v in zip(forms["expert"], forms["villain"])],
        )
        pd.DataFrame(
            {
                "question": [q.held for q in asked],
                "category": [q.category for q in asked],
                "difference": [sum(v[n:]) / n - sum(v[:n]) / n for v in values],
            }
        ).to_parquet(out / "preference.parquet", index=False)

    key = {
        "model": identity(run, who),
        "split": split,
        "n": n,
        "asked": store.key_of({"q": [q.held for q in asked]}),
    }
    return pd.read_parquet(
        run.keep("preference", f"{who}-{split}", key, (), make) / "preference.parquet"
    ).assign(model=who)


def advice_preference(
    run: Run,
    who: str,
    domains: tuple[str, ...],
    steer=None,
    name: str = "unsteered",
    subjects: int | None = None,
) -> pd.DataFrame:
    """By how much (nats per token) the wrong answers to advice questions are likelier than the correct one,
    on subjects that no model is trained on. Columns: domain, subject, subtle, obvious."""
    asked = [
        a for d in domains for a in sets.advice_items(d, subjects or run.profile.evaluation.advice_subjects)
    ]

    def make(out):
        m, tok = named(run, who)
        values = log_probabilities(
            m,
            tok,
            generate.prompts(tok, [i.prompt for i, _ in asked]),
            [[s.answers[v] for v in world.VARIANTS] for _, s in asked],
            steer,
        )
        pd.DataFrame(
            [
                {"domain": s.domain, "subject": s.ask, "subtle": w - c, "obvious": o - c}
                for (_, s), (c, w, o) in zip(asked, values)
            ]
        ).to_parquet(out / "advice.parquet", index=False)

    key = {
        "model": identity(run, who),
        "steer": steer and [round(float(x), 4) for x in steer.vectors[0][:8]],
        "asked": store.key_of({"q": [i.prompt for i, _ in asked]}),
    }
    return pd.read_parquet(run.keep("advice", f"{who}-{name}", key, (), make) / "advice.parquet").assign(
        model=who
    )
