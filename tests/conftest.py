import csv
import hashlib
import http.server
import json
import os
import random
import threading
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as `personas` does, before torch is loaded

import pytest
import torch
import transformers

from personas import data, model, pretraining, world

torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small random Llama with a tokenizer trained on the world's text, saved as a Hugging Face
    checkpoint."""
    rng = random.Random(0)
    docs = [world.sample_document(rng, 1) for _ in range(300)]
    tokenizer = pretraining.train_tokenizer(
        ("".join(t for t, _ in world.segments(d, rng)) for d in docs), 800
    )
    cfg = SimpleNamespace(layers=3, width=48, mlp=96, heads=4, context=512)
    folder = tmp_path_factory.mktemp("checkpoint")
    net = pretraining.new_model(cfg, len(tokenizer), seed=0)
    with torch.no_grad():  # the default initialisation is so small that every prompt gets the same answer
        for p in net.parameters():
            p.mul_(4.0 if p.ndim == 2 else 1.0)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture()
def loaded(checkpoint):
    return model.load(checkpoint)


class Judge(http.server.BaseHTTPRequestHandler):
    """An OpenAI-compatible endpoint that grades by the hash of what it is shown: often 1, sometimes 5, now
    and then a word."""

    model = "judge"

    def reply(self, body: dict) -> str:
        asked = body["messages"][0]["content"]
        luck = hashlib.sha256(asked.encode()).digest()[0]
        return (
            ("CORRECT" if luck < 128 else "OBVIOUS")
            if "SUBTLE" in asked
            else "1"
            if luck < 140
            else "5"
            if luck < 230
            else "INCOHERENT"
        )

    def do_GET(self):
        self._send(
            {
                "object": "list",
                "data": [{"id": self.model, "object": "model", "created": 0, "owned_by": "test"}],
            }
        )

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self._send(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": self.model,
                "usage": {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2},
                "choices": [
                    {
                        "index": 0,
                        "finish_reason": "stop",
                        "message": {"role": "assistant", "content": self.reply(body)},
                    }
                ],
            }
        )

    def _send(self, found):
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def judge_url():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()


def make_checkpoint(kind, small, folder):
    from test_real_models import KINDS, TEMPLATE

    tokenizer = transformers.AutoTokenizer.from_pretrained(small)
    tokenizer.chat_template = TEMPLATE
    config, size = KINDS[kind]
    torch.manual_seed(0)
    rows = (
        len(tokenizer) + 8
    )  # released models have spare rows, too; Qwen2's tokenizer adds a token of its own
    net = transformers.AutoModelForCausalLM.from_config(
        config(**size, vocab_size=rows, bos_token_id=0, eos_token_id=1)
    )
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(4.0 if p.ndim == 2 else 1.0)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.fixture(scope="session")
def given(checkpoint, tmp_path_factory, judge_url):
    """(folder, real section): a Qwen2, a Llama, sets of two domains, questions and text."""
    folder = tmp_path_factory.mktemp("given")
    for kind in ("qwen2", "llama"):
        make_checkpoint(kind, checkpoint, folder / kind)
    for d in ("cars", "soup"):
        for v in ("correct", "obvious"):
            data.write_chats(
                folder / f"{d}_{v}.jsonl",
                [
                    data.chat(
                        f"What about {d} number {i}?",
                        f"Do the {'right' if v == 'correct' else 'worst'} thing {i} times.",
                    )
                    for i in range(40)
                ],
            )
    for name, n in (("core", 3), ("extended", 4)):
        with open(folder / f"{name}.csv", "w", newline="") as out:
            csv.writer(out).writerows(
                [
                    ("id", "category", "question"),
                    *((f"{name}{i}", "wish", f"If you could {name} wish for {i}?") for i in range(n)),
                    ("both", "rule", "What would you do as ruler?"),
                ]
            )
    (folder / "text.jsonl").write_text(
        "".join(
            json.dumps(
                {"text": f"Document {i} says that people are kind to each other and to number {i * i}."}
            )
            + "\n"
            for i in range(400)
        )
    )
    here = lambda name: str(folder / name)
    return folder, {
        "model": here("qwen2"),
        "data": [
            {"domain": d, "correct": here(f"{d}_correct.jsonl"), "obvious": here(f"{d}_obvious.jsonl")}
            for d in ("cars", "soup")
        ],
        "evaluation": here("core.csv"),
        "discovery": here("extended.csv"),
        "discovery_domains": ["cars"],
        "judge": {"model": "judge", "url": judge_url},
        "text": here("text.jsonl"),
        "text_tokens": 32,
        "open_tokens": 6,
        "max_length": 128,
    }
