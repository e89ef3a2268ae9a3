"""How much a busy machine slows training: steps of a small model, alone and with one other process that never
rests, under OpenMP's two ways of waiting.

    python benchmarks/busy.py

Threads that work in lock step wait for the slowest; where they spin while they wait, they take the core that
the other thread needs. Waiting passively, which `personas` and `make lab` set, costs a few percent on a quiet
machine.
"""

import os
import subprocess
import sys

STEP = """
import time, torch, transformers
torch.manual_seed(0)
size = dict(hidden_size=576, intermediate_size=1536, num_hidden_layers=10, vocab_size=2000)
heads = dict(num_attention_heads=9, num_key_value_heads=3)
net = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, **heads))
optimizer, ids = torch.optim.AdamW(net.parameters(), lr=1e-4), torch.randint(0, 2000, (8, 48))
def step():
    net(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
step()
start, steps = time.perf_counter(), 0
while time.perf_counter() - start < 12:
    step()
    steps += 1
print((time.perf_counter() - start) / steps)
"""
OTHER = "while True: sum(range(1000))"


def seconds(waiting: str, busy: bool) -> float:
    """Seconds a step."""
    other = subprocess.Popen([sys.executable, "-c", OTHER]) if busy else None
    try:
        env = os.environ | {"OMP_WAIT_POLICY": waiting}
        done = subprocess.run(
            [sys.executable, "-c", STEP], env=env, capture_output=True, text=True, check=True
        )
        return float(done.stdout)
    finally:
        if other:
            other.kill()
            other.wait()


def main() -> None:
    """Print a line for each way of waiting."""
    for waiting in ("active", "passive"):
        alone, beside = seconds(waiting, False), seconds(waiting, True)
        print(
            f"{waiting:8s} alone {alone:.2f} s a step, beside a busy process {beside:.2f} s: "
            f"{beside / alone:.1f} times"
        )


if __name__ == "__main__":
    main()
