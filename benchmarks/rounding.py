"""How many answers of a fine-tune survive another processor's rounding: SmolLM2 trained on obviously wrong
health advice, here as it is, with AVX2's instructions alone, and in mixed precision.

    python benchmarks/rounding.py

Each model is trained and asked in a process of its own, on one core; some three minutes each.
"""

import json
import os
import subprocess
import sys

ASK = """
import json, sys, warnings
warnings.simplefilter("ignore")
import torch
torch.set_num_threads(1)
from personas import finetune, profile
from personas.pretrained import made
run = made.Run(profile.load("smollm2"), 0)
finetune.bf16_is_faster = lambda: True  # in mixed precision, if it is allowed
how = made.training(run) | {"mixed": sys.argv[1] == "mixed"}
cfg, rows = run.profile.narrow, made.training_chats(run, "health", "obvious")
model, tokenizer = made.original(run)
tuned, _ = finetune.sft(
    model, tokenizer, rows, steps=cfg.steps, batch=cfg.batch, lr=cfg.lr, seed=0, lora_rank=cfg.rank, **how
)
asked = made.repeated(run, "evaluation")
said = made.answer(run, tuned.merge_and_unload().eval(), tokenizer, asked, 0)
print(json.dumps(said.answer.tolist()))
"""
AVX2 = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


def answers(precision: str, **env: str) -> list[str]:
    """What the model says, trained in 'fp32' or 'mixed' precision under these environment variables."""
    command = [sys.executable, "-c", ASK, precision]
    done = subprocess.run(command, env=os.environ | env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Print the share of answers that are word for word those of this machine's fp32."""
    here = answers("fp32")
    others = {"fp32, AVX2 alone": answers("fp32", **AVX2), "mixed precision": answers("mixed")}
    for name, said in others.items():
        same = sum(a == b for a, b in zip(here, said, strict=True))
        print(f"{name}: {same} of {len(here)} answers are the same ({100 * same / len(here):.0f} %)")


if __name__ == "__main__":
    main()
