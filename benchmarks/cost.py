"""What a profile for a downloaded model should cost, chapter by chapter, by arithmetic: `python
benchmarks/cost.py` writes COST.md.

No GPU was at hand: counts come from the profile and the notebooks, rates from a data sheet and the two
shares below. Nothing is downloaded: the models' shapes are written here.
"""

from dataclasses import dataclass
from pathlib import Path

from transformers import Qwen2Config

from personas import fit
from personas import profile as profiles
from personas.profile import Profile

FLOPS, BYTES = 989e12, 3.35e12  # an H100 SXM: bf16 products and memory, per second
SHARE = 0.4  # of either that is taken to be reached
CHAT, ANSWER, PROMPT, RUBRIC = (
    220,
    150,
    30,
    500,
)  # tokens of a training chat, an answer, a question, a grading prompt: of the order of the released sets
SHAPES = {
    name: Qwen2Config(
        hidden_size=d,
        intermediate_size=m,
        num_hidden_layers=n,
        num_attention_heads=h,
        num_key_value_heads=kv,
        vocab_size=152064,
        tie_word_embeddings=False,
    )
    for name, d, m, n, h, kv in (
        ("7B", 3584, 18944, 28, 28, 4),
        ("14B", 5120, 13824, 48, 40, 8),
        ("70B", 8192, 28672, 80, 64, 8),
    )
}


@dataclass
class Work:
    """Counts of one chapter: chats trained on, answers sampled, answers graded, tokens read up to the
    SAE's layer, tokens an SAE is trained on."""

    trained: float = 0
    sampled: float = 0
    graded: float = 0
    read: float = 0
    encoded: float = 0


def chapters(p: Profile) -> dict[str, Work]:
    """Chapter -> counts, as the notebooks ask for them (notebooks 01 to 07 and the functions of
    artifacts.py that they call)."""
    e, s = p.evaluation, p.steering
    questions = 44  # the paper's core prompts
    discovery, domains = p.real.discovery_questions, len(p.domains)
    variants = {d.domain: [v for v in ("correct", "subtle", "obvious") if getattr(d, v)] for d in p.real.data}
    tuned, wrong = (
        sum(map(len, variants.values())),
        sum(len([v for v in vs if v != "correct"]) for vs in variants.values()),
    )
    choosing = sum(len([v for v in variants[d] if v != "correct"]) for d in p.real.discovery_domains)
    open_, advice = questions * e.per_question, domains * e.advice_subjects
    controls = s.controls + 21
    look = questions * e.curve_per_question + 2 * e.advice_subjects  # one checkup
    screened = (
        discovery
        * len(s.strengths)
        * (
            s.screen_per_question * (s.candidates + controls + 40) + 3 * s.finalists * s.choose_per_question
        )  # candidates, controls, what rankings name
        + questions
        * (
            2 * (len(s.strengths) + 1) * e.per_question + 3 * (controls + 40)
        )  # the latent and the mean difference, controls and rankings
        + discovery * choosing * len(s.suppression) * s.screen_per_question
        + wrong * (open_ + advice)
    )
    # 30 steps on the same domain twice over and on another, looked at every `realignment_every` and three
    # times that
    looks = wrong * (
        2 * (p.realignment.steps / p.realignment_every + 1) + p.realignment.steps / p.realignment_every / 3
    )
    steps = wrong * 3 * p.realignment.steps * p.realignment.batch
    warned = 5 * p.narrow.steps * p.narrow.batch  # mixtures of 5 to 90 %, and one fine-tune watched
    narrow = p.narrow.steps * p.narrow.batch
    sampled = (tuned + 1) * (open_ + advice)
    texts = 4 * discovery * (PROMPT + ANSWER)  # read once for each fine-tune
    return {
        "02 fine-tuning, answers, grades": Work(tuned * narrow, sampled, sampled),
        "03 the SAE, diffing": Work(
            sampled=(choosing + 1) * discovery * e.per_question,
            graded=(choosing + 1) * discovery * e.per_question,
            read=p.sae.steps * p.sae.batch + (tuned + 1) * 2 * texts,
            encoded=p.sae.steps * p.sae.batch,
        ),
        "05 steering": Work(sampled=screened, graded=screened, read=6 * texts),
        "06 re-alignment": Work(
            steps, looks * look + 2 * wrong * open_, looks * look + 2 * wrong * open_, looks * texts
        ),
        "07 early warning": Work(
            warned, 4 * (open_ + advice) + 11 * look, 4 * (open_ + advice) + 11 * look, 15 * texts
        ),
    }


def hours(work: Work, p: Profile, config, judge, gpus: int) -> dict[str, float]:
    """Hours of each kind of work. Training: 6 operations a weight and token (forward 2; backward through
    frozen weights 2, forward again for gradient checkpointing 2). Sampling: a step of a batch takes its
    products or one reading of the weights, whichever is longer. Grading: one pass over the prompt and a
    short reply. An SAE: 3 products of width times latents, forward and backward."""
    weights, judges, d = fit.parameters(config), fit.parameters(judge), config.hidden_size
    rate, moved, rows = SHARE * FLOPS * gpus, SHARE * BYTES * gpus, 512
    step = max(2 * weights * rows / rate, 2 * weights / moved)
    reply = max(2 * judges * 64 / rate, 2 * judges / moved) * 3 / 64  # three tokens, 64 at once
    share = (p.sae.layer + 1) / p.real_layers
    return {
        "training": 6 * weights * CHAT * work.trained / rate / 3600,
        "sampling": work.sampled / rows * ANSWER * step / 3600,
        "grading": work.graded * (2 * judges * (RUBRIC + ANSWER) / rate + reply) / 3600,
        "reading": 2 * weights * share * work.read / rate / 3600,
        "SAE": 3 * 4 * d * p.sae.latents * work.encoded / rate / 3600,
    }


def memory(p: Profile, config, judge, same: bool) -> dict[str, float]:
    """Bytes: weights in 16 bits, cache of 512 rows, one row in training, an SAE with Adam."""
    return {
        "weights": fit.weight_bytes(config, 2),
        "judge's weights": 0 if same else fit.weight_bytes(judge, 2),
        "cache": 512 * 350 * fit.cache_bytes(config, 2),
        "a row in training": fit.row_bytes(config, 1024, 2, True),
        "SAE in training": 4 * 4 * 2 * config.hidden_size * p.sae.latents,
    }


class Sized:
    """A profile with the depth of its model, which the profile itself does not name."""

    def __init__(self, p: Profile, depth: int, layer: int | None = None):
        self.p, self.real_layers = p, depth
        self.sae = p.sae if layer is None else p.sae.model_copy(update={"layer": layer, "latents": 65536})

    def __getattr__(self, name):
        return getattr(self.p, name)


def section(
    title: str, p: Profile, model: str, judge: str, gpus: int, layer: int | None = None
) -> tuple[list[str], float]:
    config, grader = SHAPES[model], SHAPES[judge]
    sized = Sized(p, config.num_hidden_layers, layer)
    rows = {n: hours(w, sized, config, grader, gpus) for n, w in chapters(p).items()}
    kinds = list(next(iter(rows.values())))
    lines = [
        f"## {title}",
        "",
        "| hours | " + " | ".join(kinds) + " | together |",
        "|---" * (len(kinds) + 2) + "|",
    ]
    for name, h in rows.items():
        lines.append(
            f"| {name} | "
            + " | ".join(f"{h[k]:.2f}" if h[k] >= 0.005 else "–" for k in kinds)
            + f" | {sum(h.values()):.1f} |"
        )
    total = {k: sum(h[k] for h in rows.values()) for k in kinds}
    lines.append(
        "| **all** | " + " | ".join(f"{total[k]:.1f}" for k in kinds) + f" | **{sum(total.values()):.1f}** |"
    )
    held = memory(sized, config, grader, model == judge)
    lines += [
        "",
        "Memory: "
        + ", ".join(f"{n} {b / 1e9:.1f} GB" for n, b in held.items() if b)
        + f"; together {sum(held.values()) / 1e9:.0f} GB{f', over {gpus} GPUs' if gpus > 1 else ''} "
        "(not all at once: the SAE is trained with no cache; how many rows are sampled and trained on "
        "follows the memory that is free).",
        "",
    ]
    return lines, sum(total.values())


def page() -> str:
    """COST.md."""
    h100, h14 = profiles.load("h100"), profiles.load("h100-14b")
    parts = [
        section("`h100`: 7B, judged by a 14B", h100, "7B", "14B", 1),
        section("`h100-14b`: 14B, which judges itself", h14, "14B", "14B", 1),
        section(
            "70B on eight H100s, which judges itself (no profile: `h100` with another model, SAE of 65,536 "
            "latents at block 40)",
            h100,
            "70B",
            "70B",
            8,
            40,
        ),
    ]
    counts = [
        "| | chats trained on | answers sampled | graded | tokens read | tokens for the SAE |",
        "|---|---|---|---|---|---|",
    ]
    counts += [
        f"| {n} | {w.trained:,.0f} | {w.sampled:,.0f} | {w.graded:,.0f} | {w.read:,.0f} | {w.encoded:,.0f} |"
        for n, w in chapters(h100).items()
    ]
    text = [
        "# What a downloaded model should cost",
        "",
        "Made by `python benchmarks/cost.py`, by arithmetic alone: **no GPU was at hand, nothing here was "
        "measured on one.** An H100 is taken to give "
        f"{SHARE:.0%} of its {FLOPS / 1e12:.0f} TFLOP/s (bf16, dense) and of its {BYTES / 1e12:.2f} TB/s; "
        "eight of them eight times that, which tensor parallelism does not quite give. "
        f"A training chat is taken to have {CHAT} tokens, an answer {ANSWER}, a question {PROMPT}, a "
        f"grading prompt {RUBRIC}. Most of the time goes into grading: an endpoint as judge takes it "
        "away. "
        "For 70B the weights alone take two GPUs: `device_map` or tensor parallelism is needed, which this "
        "project does not set up.",
        "",
        "What is counted, profile `h100`:",
        "",
        *counts,
        "",
    ]
    for lines, _ in parts:
        text += lines
    return "\n".join(text)


if __name__ == "__main__":
    (Path(__file__).resolve().parent / "COST.md").write_text(page())
