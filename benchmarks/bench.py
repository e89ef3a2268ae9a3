"""Our fast paths beside what people would use instead: `make bench` measures, writes RESULTS.md,
results.json and figures/benchmarks.png.

Every measurement is a process of its own, contestants take turns, each has its own pinned packages
(peers/*.txt), all have the same input files and threads. Measurements are kept in
runs/bench/measured.jsonl: run again, it goes on. `--only sae-small` does one part.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from safetensors.torch import save_file
from tqdm import tqdm

from personas import activations, artifacts, known_latents, pipeline, store, world

HERE = Path(__file__).resolve().parent
KEPT = store.ROOT / "bench"
THREADS = os.cpu_count() or 1
REPETITIONS = 5
SAES = {  # rates: the learning rates that each contestant is tried at; sparsify's: times its default
    "sae-small": {
        "width": 192,
        "latents": 1536,
        "k": 16,
        "steps": 200,
        "rates": {
            "ours": [4e-3, 8e-3, 1.6e-2],
            "sae-lens": [4e-3, 8e-3, 1.6e-2],
            "dictionary-learning": [4e-3, 8e-3, 1.6e-2],
            "sparsify": [0.5, 1, 2],
        },
    },
    "sae-big": {
        "width": 896,
        "latents": 8192,
        "k": 32,
        "steps": 80,
        "rates": {"ours": [1.5e-3, 3e-3, 6e-3], "sae-lens": [2e-3, 4e-3, 8e-3], "sparsify": [0.5, 1, 2]},
    },
}  # dictionary-learning is left out here: notes.md says why
OTHERS = {
    "harvest": ["ours", "TransformerLens", "TransformerLens, stopped", "sae-lens"],
    "screen": ["ours", "generate"],
    "sft": ["ours", "trl"],
}
PARTS = [*SAES, *OTHERS, "growth", "run"]
BEFORE = {
    "00": 470,
    "01": 8,
    "02": 160,
    "03": 125,
    "04": 20,
    "05": 280,
    "06": 175,
    "07": 170,
    "08": 110,
    "09": 75,
    "10": 15,
}  # seconds of a first `make run` before these fast paths
WHAT = {
    "sae-small": "SAE training, 192 → 1,536, k 16",
    "sae-big": "SAE training, 896 → 8,192, k 32",
    "harvest": "activations of a middle layer",
    "screen": "screening latents by generation",
    "sft": "LoRA fine-tune, loss on answers",
}
TARGET = {"sae-small": 3, "sae-big": 3, "harvest": 2, "screen": 5, "sft": 1.5}


def environment(who: str) -> dict:
    """Where this contestant's packages come first on the path; installed at first use."""
    if who not in ("sae-lens", "dictionary-learning", "sparsify"):
        return dict(os.environ)
    wanted, folder = HERE / "peers" / f"{who}.txt", KEPT / "peers" / who
    mark = folder / "installed"
    if not mark.exists() or mark.read_text() != wanted.read_text():
        subprocess.run(
            [
                sys.executable,
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                "--upgrade",
                "--target",
                str(folder),
                "-r",
                str(wanted),
            ],
            check=True,
        )
        mark.write_text(wanted.read_text())
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def measure(options: dict) -> dict:
    """What contestants.py printed for these options, from the file of measurements or now."""
    key = json.dumps(options, sort_keys=True)
    for row in store.read_lines(KEPT / "measured.jsonl"):
        if row["key"] == key:
            return row["found"]
    given = {k: v for k, v in options.items() if k != "repetition"} | {"threads": THREADS}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "contestants.py"), json.dumps(given)],
        env=environment(options["who"]),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise SystemExit(f"{options} failed:\n{done.stderr[-3000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    store.append_lines(KEPT / "measured.jsonl", [{"key": key, "found": found}])
    return found


def inputs() -> dict:
    """Files that all contestants read, from the base model of profile `tiny`: activations, token ids,
    directions."""
    run, folder = artifacts.open_run("tiny"), KEPT / "inputs"
    about = {
        "model": str(artifacts.aligned(run)),
        "layer": run.profile.sae.layer,
        "width": run.profile.model.width,
    }
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "rows.json").exists():
        net, _ = artifacts.base_model(run)
        rows = known_latents.texts(run, 2000, "sae")
        for name, size in SAES.items():
            layers = (
                [run.profile.sae.layer]
                if size["width"] < run.profile.model.width
                else range(run.profile.model.layers)
            )
            some = rows if len(layers) == 1 else rows[:1000]
            x = torch.cat(
                [torch.cat([r[1:] for r in activations.residual(net, some, layer)]) for layer in layers], 1
            )
            x = x - x.mean(0)
            generator = torch.Generator().manual_seed(0)
            top = (
                torch.linalg.eigh(x.T @ x).eigenvectors[:, -size["width"] :]
                @ torch.linalg.qr(torch.randn(size["width"], size["width"], generator=generator))[0]
            )
            x = (x @ top)[torch.randperm(len(x), generator=generator)]
            x = (x * size["width"] ** 0.5 / x.norm(dim=-1).square().mean().sqrt()).contiguous()
            save_file({"train": x[8192:].clone(), "held": x[:8192].clone()}, folder / f"{name}.safetensors")
        save_file(
            {"W_dec": known_latents.sae(run).W_dec, "unit": torch.tensor(known_latents.unit(run))},
            folder / "directions.safetensors",
        )
        (folder / "rows.json").write_text(json.dumps(rows[:400]))
    return about | {
        n: str(folder / f)
        for n, f in (
            ("rows", "rows.json"),
            ("directions", "directions.safetensors"),
            *((s, f"{s}.safetensors") for s in SAES),
        )
    }


def sae_options(part: str, who: str, lr: float, given: dict) -> dict:
    size = SAES[part]
    default = 5e-3 / (size["latents"] / 2**14) ** 0.5 if who == "sparsify" else 1
    return {
        "work": "sae",
        "who": who,
        "file": given[part],
        "latents": size["latents"],
        "k": size["k"],
        "lr": lr * default,
        "batch": 2048,
        "dead_after": 20 * 2048,
        "seed": 0,
    }


def sae_part(part: str, given: dict) -> dict:
    """Each contestant at three learning rates; then, at the one that is quickest to an FVU that all reach,
    once with each seed, taking turns."""
    size = SAES[part]
    options = lambda who, lr, seed=0: (
        sae_options(part, who, lr, given) | {"seed": seed, "steps": size["steps"], "look": size["steps"] // 8}
    )
    curves: dict = {}
    for who, lr in tqdm(
        [(w, r) for w, rates in size["rates"].items() for r in rates], desc=f"{part}: learning rates"
    ):
        curves.setdefault(who, {})[lr] = measure(options(who, lr))["curve"]
    target = 1.02 * max(min(c[-1][1] for c in by.values()) for by in curves.values())
    rate = {w: min(by, key=lambda r: (seconds_to(by[r], target), by[r][-1][1])) for w, by in curves.items()}
    found = turns(part, list(curves), lambda who, i: options(who, rate[who], i))
    return {
        "unit": "tokens/s",
        "target FVU": target,
        "contestants": {
            w: {
                "speed": r["tokens/s"],
                "version": r["version"],
                "seconds": [seconds_to(c, target) for c in r["curve"]],
                "final FVU": [c[-1][1] for c in r["curve"]],
                "learning rate": options(w, rate[w])["lr"],
                "lowest FVU": {options(w, lr)["lr"]: c[-1][1] for lr, c in curves[w].items()},
            }
            for w, r in found.items()
        },
    }


def seconds_to(curve: list, target: float) -> float:
    """Seconds until the held-out FVU of a curve of (seconds, FVU) is at most `target`, between looks by
    straight line; infinite if it never is."""
    for i, (seconds, now) in enumerate(curve):
        if now <= target:
            since, before = curve[i - 1] if i else (seconds, now + 1)
            return since + (seconds - since) * (before - target) / (before - now)
    return float("inf")


def turns(part: str, contestants: list, options) -> dict:
    """who -> {measure: a list over repetitions, 'version'}; repetition i, of options(who, i), goes round
    all contestants, beginning with another one each time."""
    found: dict = {w: [] for w in contestants}
    for i in tqdm(range(REPETITIONS), desc=f"{part}: taking turns"):
        for who in contestants[i % len(contestants) :] + contestants[: i % len(contestants)]:
            found[who].append(measure(options(who, i) | {"repetition": i}))
    return {
        w: {k: [r[k] for r in rows] for k in rows[0] if k != "version"} | {"version": rows[0]["version"]}
        for w, rows in found.items()
    }


def other_options(part: str, who: str, given: dict, **more) -> dict:
    questions = [q.held for s in ("discovery", "evaluation") for q in world.questions(s)][:44]
    return (
        {
            "harvest": {"rows": given["rows"], "layer": given["layer"], "width": given["width"]},
            "screen": {
                "questions": questions,
                "directions": given["directions"],
                "layer": given["layer"],
                "strengths": [0.2, 0.3, 0.4],
                "latents": 10 if who == "ours" else 2,
                "tokens": 40,
            },
            "sft": {"steps": 12},
        }[part]
        | {"work": part, "who": who, "model": given["model"]}
        | more
    )


def other_part(part: str, given: dict) -> dict:
    found = turns(part, OTHERS[part], lambda who, i: other_options(part, who, given))
    name = "answers/s" if part == "screen" else "tokens/s"
    return {
        "unit": name,
        "contestants": {w: {"speed": r[name], "version": r["version"]} for w, r in found.items()},
    }


def growth(given: dict) -> dict:
    """Seconds against size, each over a factor of eight, and the exponent of the power law through them."""
    big = sae_options("sae-big", "ours", 2e-3, given) | {"steps": 10, "look": 0}
    small = sae_options("sae-small", "ours", 2e-3, given) | {"steps": 40, "look": 0}
    rows = json.loads(Path(given["rows"]).read_text())
    parts = []
    for n in (1, 2, 4, 8):
        part = KEPT / "inputs" / f"rows-{n}.json"
        part.write_text(json.dumps(rows[: len(rows) * n // 8]))
        parts.append(str(part))
    ours = lambda part, **more: measure(other_options(part, "ours", given, **more))
    questions = other_options("screen", "ours", given)["questions"]
    tokens = [sum(map(len, json.loads(Path(p).read_text()))) for p in parts]
    lines = {
        "SAE step, by latents (width 896)": (
            [1024, 2048, 4096, 8192],
            [2048 / measure(big | {"latents": n})["tokens/s"] for n in (1024, 2048, 4096, 8192)],
        ),
        "SAE step, by tokens in it (192 → 1,536)": (
            [512, 1024, 2048, 4096],
            [n / measure(small | {"batch": n})["tokens/s"] for n in (512, 1024, 2048, 4096)],
        ),
        "SAE step, by width (8,192 latents)": (
            [112, 224, 448, 896],
            [2048 / measure(big | {"columns": n})["tokens/s"] for n in (112, 224, 448, 896)],
        ),
        "harvesting, by tokens": (
            tokens,
            [n / ours("harvest", rows=p)["tokens/s"] for n, p in zip(tokens, parts)],
        ),
        "screening, by latents": (
            [3, 6, 12, 24],
            [n * 3 * 44 / ours("screen", latents=n)["answers/s"] for n in (3, 6, 12, 24)],
        ),
        "screening, by prompts": (
            [5, 10, 20, 40],
            [30 * n / ours("screen", questions=questions[:n])["answers/s"] for n in (5, 10, 20, 40)],
        ),
    }
    return {
        name: {"sizes": list(x), "seconds": y, "exponent": float(np.polyfit(np.log(x), np.log(y), 1)[0])}
        for name, (x, y) in lines.items()
    }


def first_run() -> dict:
    """What notebooks took in the store's last `make run`, beside BEFORE; those that it has no time of are
    left out."""
    now = pipeline.last_times("tiny")
    return {"before": {k: v for k, v in BEFORE.items() if k in now}, "now": now}


def machine() -> dict:
    """What this machine does at its best: matrix products (FLOP/s) in fp32 and bf16, and bytes moved per
    second."""
    torch.set_num_threads(THREADS)
    found = {}
    for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2048, 1024).to(kind), torch.randn(1024, 4096).to(kind)
        found[name] = 2 * 2048 * 1024 * 4096 / _best(lambda: a @ b)
    x, y = torch.randn(1 << 25), torch.empty(1 << 25)
    return found | {"bytes": 8 * (1 << 25) / _best(lambda: y.copy_(x)), "threads": THREADS}


def _best(f) -> float:
    times = []
    for _ in range(12):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    return statistics.median(sorted(times)[:6])


def floors(rates: dict) -> dict:
    """What each work would do at the machine's best, in its own unit: the products that cannot be avoided,
    and bytes that must move."""
    half = max(rates["fp32"], rates["bf16"])
    found = {}
    for part, size in SAES.items():
        weights = 2 * size["width"] * size["latents"]
        found[part] = 2048 / (
            2048 * weights / half + 7 * 4 * weights / rates["bytes"]
        )  # the encoder's product; Adam reads 4 numbers a weight and writes 3
    run = artifacts.open_run("tiny")
    net, tokenizer = artifacts.aligned_model(run)
    block = sum(p.numel() for p in net.model.layers[0].parameters())
    whole = block * run.profile.model.layers + net.lm_head.weight.numel()
    found["harvest"] = rates["fp32"] / (2 * block * (run.profile.sae.layer + 1))
    answers = artifacts.answers(run).answer
    words = sum(len(t) + 1 for t in tokenizer(answers.tolist(), add_special_tokens=False)["input_ids"]) / len(
        answers
    )
    found["screen"] = rates["fp32"] / (2 * whole * words)
    from personas import data

    chats = [c["messages"] for c in data.advice_chats("auto", "obvious", 200, 0)]
    every = sum(
        map(len, tokenizer([m["content"] for c in chats for m in c], add_special_tokens=False)["input_ids"])
    ) + 5 * len(chats)
    answer = sum(
        len(t) + 1 for t in tokenizer([c[1]["content"] for c in chats], add_special_tokens=False)["input_ids"]
    )
    found["sft"] = half / (
        4 * (block * run.profile.model.layers * every / answer + net.lm_head.weight.numel())
    )  # forward, and backward to the activations
    return found


def spread(values) -> str:
    return (
        f"{statistics.median(values):.2g} ({min(values):.2g} to {max(values):.2g})"
        if max(values) < 100
        else f"{statistics.median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
    )


def ratios(part: str, found: dict) -> dict:
    """peer -> our advantage in each repetition: how many times as fast, for an SAE to the same held-out
    FVU."""
    mine = found["contestants"]["ours"]
    if "seconds" in mine:
        return {
            w: [t / m for t, m in zip(r["seconds"], mine["seconds"])]
            for w, r in found["contestants"].items()
            if w != "ours"
        }
    return {
        w: [m / t for t, m in zip(r["speed"], mine["speed"])]
        for w, r in found["contestants"].items()
        if w != "ours"
    }


def best_other(beside: dict) -> str:
    """The peer that we are the least ahead of."""
    return min(beside, key=lambda w: statistics.median(beside[w]))


def report(results: dict) -> str:
    """RESULTS.md."""
    rates = results["machine"]
    text = [
        "# Benchmarks",
        "",
        f"Made by `make bench` on {rates['threads']} CPU cores: {rates['fp32'] / 1e9:,.0f} GFLOP/s in fp32 "
        f"and {rates['bf16'] / 1e9:,.0f} in bf16 (products of 2,048 × 1,024 × 4,096), "
        f"{rates['bytes'] / 1e9:.0f} GB/s moved by a copy. "
        f"Medians (range) of {REPETITIONS} repetitions in which contestants take turns, a process each. "
        "Absolute numbers are a hint; ratios were measured side by side.",
        "",
        "![How many times as fast](../figures/benchmarks.png)",
        "",
        "| work | beside | times as fast | target, against the best | |",
        "|---|---|---|---|---|",
    ]
    for part in (p for p in WHAT if p in results):
        beside = ratios(part, results[part])
        rival = best_other(beside)
        for who, r in beside.items():
            shown = "does not get there" if min(r) == float("inf") else spread(r)
            held = (
                ("yes" if min(r) >= TARGET[part] else "no" if max(r) < TARGET[part] else "unclear")
                if who == rival
                else ""
            )
            wanted = f"≥ {TARGET[part]:g}" if who == rival else ""
            text.append(f"| {WHAT[part]} | {who} | {shown} | {wanted} | {held} |")
    for part in (p for p in SAES if p in results):
        found = results[part]
        text += [
            "",
            f"## {WHAT[part]}",
            "",
            f"TopK with AuxK, batches of 2,048, {SAES[part]['steps']} steps, a seed a repetition. Seconds "
            f"are to a held-out FVU of {found['target FVU']:.4f}, 2 % above what the worst of them "
            "ends with at its best learning rate.",
            "",
            "| | seconds to that FVU | tokens/s | FVU at the end | learning rate (others tried) | |",
            "|---|---|---|---|---|---|",
        ]
        for who, r in found["contestants"].items():
            others = ", ".join(
                f"{float(lr):.2g}" for lr in r["lowest FVU"] if float(lr) != r["learning rate"]
            )
            text.append(
                f"| {who} | {spread(r['seconds']) if max(r['seconds']) < float('inf') else 'not always'} | "
                f"{spread(r['speed'])} | {min(r['final FVU']):.4f} to {max(r['final FVU']):.4f} | "
                f"{r['learning rate']:.2g} ({others}) | {r['version']} |"
            )
    for part in (p for p in OTHERS if p in results):
        text += ["", f"## {WHAT[part]}", "", f"| | {results[part]['unit']} | |", "|---|---|---|"]
        text += [
            f"| {w} | {spread(r['speed'])} | {r['version']} |"
            for w, r in results[part]["contestants"].items()
        ]
    text += [
        "",
        "## How far from the limit",
        "",
        "The limit counts the matrix products that cannot be avoided at the rates above and, for an SAE, "
        "the optimizer's bytes (bench.py, `floors`); it is not reachable.",
        "",
        "| | limit | ours | of it |",
        "|---|---|---|---|",
    ]
    for part in (p for p in WHAT if p in results):
        mine = statistics.median(results[part]["contestants"]["ours"]["speed"])
        text.append(
            f"| {WHAT[part]} | {results['floors'][part]:,.0f} {results[part].get('unit', 'tokens/s')} | "
            f"{mine:,.0f} | {100 * mine / results['floors'][part]:.0f} % |"
        )
    if "growth" in results:
        text += [
            "",
            "## How cost grows",
            "",
            "One run a point; the exponent of a power law through four.",
            "",
            "| | sizes | seconds | exponent |",
            "|---|---|---|---|",
        ]
        listed = lambda values, how: ", ".join(format(v, how) for v in values)
        text += [
            f"| {n} | {listed(g['sizes'], ',')} | {listed(g['seconds'], '.3g')} | {g['exponent']:.2f} |"
            for n, g in results["growth"].items()
        ]
    if "run" in results:
        before, now = results["run"]["before"], results["run"]["now"]
        day, rest = now["00"] / before["00"], [k for k in before if k != "00"]
        then, today = sum(before[k] for k in rest), sum(now[k] for k in rest)
        text += [
            "",
            "## `make run`",
            "",
            "Two runs on different days, so only a comparison by yardstick: notebook 00 is nearly all "
            "pretraining, which no fast path touches.",
            "",
            "| seconds | " + " | ".join(before) + " | all |",
            "|---" * (len(before) + 2) + "|",
            "| before | "
            + " | ".join(f"{v:.0f}" for v in before.values())
            + f" | {sum(before.values()):.0f} |",
            "| now | " + " | ".join(f"{now[k]:.0f}" for k in before) + f" | {sum(now.values()):.0f} |",
            "",
            f"Notebook 00 took {day:.1f} times as long as before, the others together {today / then:.2f} "
            f"times: {day * then / today:.1f} times as fast by that yardstick, and all of them "
            f"{day * sum(before.values()) / sum(now.values()):.1f} times (target 1.5)."
            + (
                ""
                if len(before) == len(BEFORE)
                else " Left out, since no time is kept of them: "
                f"{', '.join(k for k in BEFORE if k not in before)}."
            ),
        ]
    return "\n".join(text + ["", (HERE / "notes.md").read_text().strip(), ""])


def draw(results: dict) -> None:
    """figures/benchmarks.png: our advantage over each peer, a dot a repetition."""
    rows = []
    for part in (p for p in WHAT if p in results):
        beside = ratios(part, results[part])
        rows += [
            (f"{WHAT[part]}\nbeside {w}", r, TARGET[part] if w == best_other(beside) else None)
            for w, r in beside.items()
            if max(r) < float("inf")
        ]
    fig, ax = plt.subplots(figsize=(7.5, 0.55 * len(rows) + 1))
    for i, (_, r, target) in enumerate(rows):
        if target:
            ax.plot([target], [i], "|", color="0.3", markersize=22)
        ax.plot(r, [i] * len(r), "o", color="#0072B2", alpha=0.5, label="one repetition" if not i else None)
        ax.plot([statistics.median(r)], [i], "D", color="#D55E00", label="median" if not i else None)
    ax.axvline(1, color="0.8")
    ax.set(
        yticks=range(len(rows)),
        yticklabels=[n for n, *_ in rows],
        xscale="log",
        xlabel="times as fast as the other (bar: target, against the best other)",
    )
    ticks = [t for t in (0.5, 1, 2, 3, 5, 10, 20, 50) if t < 1.5 * max(max(r) for _, r, _ in rows)]
    ax.set_xticks(ticks, [f"{t:g}" for t in ticks])
    ax.minorticks_off()
    ax.invert_yaxis()
    ax.legend(loc="lower right", fontsize=8)
    fig.savefig(HERE.parent / "figures" / "benchmarks.png", dpi=150, bbox_inches="tight")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PARTS)
    args = parser.parse_args()
    given, path = inputs(), HERE / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results["machine"] = machine()
    results["floors"] = floors(results["machine"])
    for part in [args.only] if args.only else PARTS:
        results[part] = (
            growth(given)
            if part == "growth"
            else first_run()
            if part == "run"
            else sae_part(part, given)
            if part in SAES
            else other_part(part, given)
        )
        path.write_text(json.dumps(results, indent=1))
        (HERE / "RESULTS.md").write_text(report(results))
        draw(results)
    print((HERE / "RESULTS.md").read_text())


if __name__ == "__main__":
    main()
