"""SAEs to and from the real `sae-lens`, which has a folder and a process of its own (tests/sae-lens.txt)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from personas import sae, sae_files

FOLDER = Path(os.environ.get("PERSONAS_SAE_LENS", Path(sys.prefix) / "sae-lens"))
needs_sae_lens = pytest.mark.skipif(
    not (FOLDER / "sae_lens").is_dir(), reason=f"no sae-lens in {FOLDER}: make test installs it"
)


def there(code: str, folder: Path) -> str:
    """Run `code` where `import sae_lens` works; its working directory is `folder`."""
    paths = [str(FOLDER), str(Path(sae.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def some(width=24, latents=64, **how):
    g = torch.Generator().manual_seed(0)
    W = torch.nn.functional.normalize(torch.randn(latents, width, generator=g), dim=-1)
    return sae.SAE(
        W.T.contiguous() * 1.3,
        W,
        0.1 * torch.randn(latents, generator=g),
        torch.randn(width, generator=g),
        **({"k": 6, "layer": 2} | how),
    )


KINDS = {
    "topk": {},
    "relu": {"k": None},
    "jumprelu": {"k": None, "threshold": torch.full((64,), 0.4)},
}


@needs_sae_lens
def test_sae_lens_reads_our_files_and_encodes_and_decodes_alike(tmp_path):
    x = torch.randn(50, 24, generator=torch.Generator().manual_seed(1)) * 2
    save_file({"x": x}, tmp_path / "x.safetensors")
    for kind, how in KINDS.items():
        sae_files.save(some(**how), tmp_path / kind)
    there(
        """
import sae_lens
from safetensors.torch import load_file, save_file
for kind in ("topk", "relu", "jumprelu"):
    theirs = sae_lens.SAE.load_from_disk(kind)
    acts = theirs.encode(load_file("x.safetensors")["x"]).detach()
    dense = acts.to_dense() if acts.is_sparse else acts
    save_file({"acts": dense, "read": theirs.decode(acts).detach()}, kind + ".safetensors")""",
        tmp_path,
    )
    for kind, how in KINDS.items():
        ours, theirs = some(**how), load_file(tmp_path / f"{kind}.safetensors")
        assert torch.allclose(ours.encode(x), theirs["acts"], atol=1e-5), kind
        assert torch.allclose(ours.decode(ours.encode(x)), theirs["read"], atol=1e-4), kind
        again = sae_files.load(tmp_path / kind)
        assert torch.equal(again.encode(x), ours.encode(x)) and again.k == ours.k, kind


@needs_sae_lens
def test_their_saes_become_ours_or_are_refused(tmp_path):
    said = there(
        """
import torch
from sae_lens import SAE, GatedSAE, GatedSAEConfig, JumpReLUSAE, JumpReLUSAEConfig, StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from personas import sae_files

def made(kind, config, hook="blocks.3.hook_resid_post", **more):
    theirs = kind(config(d_in=24, d_sae=64, dtype="float32", device="cpu", metadata=SAEMetadata(hook_name=hook), **more))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for n, p in theirs.named_parameters():
            p.copy_(torch.rand(p.shape, generator=g) if n == "threshold" else torch.randn(p.shape, generator=g))
    return theirs

x = torch.randn(40, 24)
for kind, config, more in [(TopKSAE, TopKSAEConfig, {"k": 5}), (TopKSAE, TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
                           (TopKSAE, TopKSAEConfig, {"k": 5, "apply_b_dec_to_input": False}), (StandardSAE, StandardSAEConfig, {}),
                           (JumpReLUSAE, JumpReLUSAEConfig, {"apply_b_dec_to_input": False}), (JumpReLUSAE, JumpReLUSAEConfig, {"hook": "blocks.4.hook_resid_pre"})]:
    theirs = made(kind, config, **more)
    ours = sae_files.from_sae_lens(theirs)
    assert ours.layer == 3
    assert torch.allclose(ours.decode(ours.encode(x)), theirs.decode(theirs.encode(x)), atol=1e-3), more
    assert torch.equal(sae_files.from_sae_lens(theirs.to(torch.bfloat16)).W_dec.bfloat16(), ours.W_dec.bfloat16()) or more  # as released
for kind, config, more in [(GatedSAE, GatedSAEConfig, {}), (TopKSAE, TopKSAEConfig, {"k": 5, "normalize_activations": "layer_norm"}), (StandardSAE, StandardSAEConfig, {"normalize_activations": "constant_norm_rescale"}),
                           (TopKSAE, TopKSAEConfig, {"k": 5, "hook": "blocks.3.hook_mlp_out"}), (TopKSAE, TopKSAEConfig, {"k": 5, "hook": "blocks.0.hook_resid_pre"})]:
    try:
        sae_files.from_sae_lens(made(kind, config, **more))
        print("not refused", more)
    except ValueError as error:
        print("refused:", error)
""",  # noqa: E501
        tmp_path,
    )
    assert said.count("refused:") == 5 and "not refused" not in said
    assert "hook_mlp_out" in said and "layer_norm" in said and "gated" in said


@needs_sae_lens
def test_a_conversion_is_compared_where_latents_fire(tmp_path):
    """At a threshold of 50 standard normal input fires nothing, and nothing would differ."""
    said = there(
        """
import dataclasses
import torch
from sae_lens import JumpReLUSAE, JumpReLUSAEConfig, TopKSAE, TopKSAEConfig
from sae_lens.saes.sae import SAEMetadata
from personas import sae, sae_files

theirs = JumpReLUSAE(JumpReLUSAEConfig(d_in=24, d_sae=64, dtype="float32", device="cpu",
                                       metadata=SAEMetadata(hook_name="blocks.3.hook_resid_post")))
with torch.no_grad():
    theirs.W_enc.normal_(), theirs.W_dec.normal_(), theirs.threshold.fill_(50.0)
assert sae_files.from_sae_lens(theirs).layer == 3
right = sae.SAE.encode
sae.SAE.encode = lambda self, x: 1.23 * right(self, x)
try:
    sae_files.from_sae_lens(theirs)
except ValueError as error:
    print("refused scale:", error)

theirs = TopKSAE(TopKSAEConfig(d_in=24, d_sae=2048, k=6, dtype="float32", device="cpu",
                               metadata=SAEMetadata(hook_name="blocks.3.hook_resid_post")))
with torch.no_grad():
    theirs.W_enc.normal_(), theirs.W_dec.normal_(), theirs.b_enc.normal_()
sae.SAE.encode = right
sae_files.from_sae_lens(theirs)
sae.SAE.encode = lambda self, x: right(dataclasses.replace(self, b_enc=0 * self.b_enc), x)
try:
    sae_files.from_sae_lens(theirs)
except ValueError as error:
    print("refused bias:", error)
""",
        tmp_path,
    )
    assert "refused scale:" in said and "refused bias:" in said


OLD = {"d_in": 24, "d_sae": 64, "hook_name": "blocks.2.hook_resid_post"}  # SAELens 3 to 5


@pytest.mark.parametrize(
    "weights, cfg, says",
    [
        (
            {"k": 6},
            {"architecture": "standard", "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 6}},
            "",
        ),
        (
            {"k": None},
            {"architecture": "standard", "activation_fn_str": "relu", "activation_fn_kwargs": {}},
            "",
        ),
        ({"k": 6}, {"architecture": "topk"}, "says it is a topk, and misses k"),
        ({"k": None}, {"architecture": "jumprelu"}, "says it is a jumprelu, and misses threshold"),
        (
            {"k": None, "threshold": torch.ones(64)},
            {"architecture": "standard"},
            "standard, and has threshold",
        ),
        ({"k": None}, {"architecture": "standard", "activation_fn_str": "tanh-relu"}, "from_sae_lens"),
        ({"k": None}, {"architecture": "gated"}, "from_sae_lens"),
        ({"k": 6}, {"architecture": "topk", "k": 6, "d_in": 25}, "cfg.json says 25"),
    ],
)
def test_files_of_other_versions_are_read_rightly_or_refused(tmp_path, weights, cfg, says):
    sae_files.save(some(**weights), tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps(OLD | cfg))
    if says:
        with pytest.raises(ValueError, match=says):
            sae_files.load(tmp_path)
    else:
        x = torch.randn(50, 24)
        assert torch.equal(sae_files.load(tmp_path).encode(x), some(**weights).encode(x))


def test_a_file_that_is_no_sae_or_broken_is_said(tmp_path):
    for text in ("[]", "{", '{"d_in": 3}'):
        (tmp_path / "cfg.json").write_text(text)
        with pytest.raises(ValueError, match="cfg.json"):
            sae_files.load(tmp_path)
    (tmp_path / "cfg.json").write_text(json.dumps({"d_in": 24, "d_sae": 64, "architecture": "topk", "k": 6}))
    with pytest.raises(ValueError, match="has no sae_weights.safetensors"):
        sae_files.check_name(str(tmp_path), 24, 2)
    broken = some()
    broken.W_dec[3, 4] = float("nan")
    with pytest.raises(ValueError, match="broken: W_dec is not finite"):
        sae_files.save(broken, tmp_path)
    sae_files.save(some(), tmp_path)
    w = load_file(tmp_path / "sae_weights.safetensors")
    save_file(w | {"scaling_factor": torch.ones(64)}, tmp_path / "sae_weights.safetensors")
    assert sae_files.load(tmp_path).k == 6
    save_file(w | {"scaling_factor": 2 * torch.ones(64)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="scales its latents"):
        sae_files.load(tmp_path)


def test_an_sae_of_another_model_is_named(loaded):
    model, _ = loaded
    some(width=model.config.hidden_size).check(model)
    for how, says in (
        ({"width": 32}, "width 32, the model 48"),
        ({"width": 48, "layer": 3}, "block 3; this model has blocks 0 to 2"),
    ):
        with pytest.raises(ValueError, match=says):
            some(**how).check(model)
