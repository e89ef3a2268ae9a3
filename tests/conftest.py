import random
from types import SimpleNamespace

import pytest
import torch

from personas import model, world

torch.set_num_threads(2)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A small random Llama with a tokenizer trained on the world's text, saved as a Hugging Face checkpoint."""
    rng = random.Random(0)
    docs = [world.sample_document(rng, 1) for _ in range(300)]
    tokenizer = model.train_tokenizer(("".join(t for t, _ in world.segments(d, rng)) for d in docs), 800)
    cfg = SimpleNamespace(layers=3, width=48, mlp=96, heads=4, context=512)
    folder = tmp_path_factory.mktemp("checkpoint")
    net = model.new_model(cfg, len(tokenizer), seed=0)
    with torch.no_grad():  # the default initialisation is so small that every prompt gets the same answer
        for p in net.parameters():
            p.mul_(4.0 if p.ndim == 2 else 1.0)
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture()
def loaded(checkpoint):
    return model.load(checkpoint)
