"""The bench of methods: the truth that it scores by, methods on a planted direction, and its table."""

import copy
import json
import random
import shutil
import subprocess
import sys

import pandas as pd
import pytest
import torch

from personas import (
    base_models,
    data,
    diffing,
    figures,
    grader,
    model,
    parallel,
    pretraining,
    profile,
    sae,
    setting,
    store,
    world,
)
from personas.bench import methods, plots, run, score, truth
from personas.bench.case import Case
from personas.pretrained import weights

LAYER, NOISE = 1, 0.5


@pytest.fixture(scope="module")
def planted(checkpoint):
    """A case whose fine-tune moved every position along one direction: (case, direction)."""
    before, tokenizer = model.load(checkpoint)
    after = copy.deepcopy(before)
    width = before.config.hidden_size
    rows, _, starts = diffing.reading_texts(tokenizer, "discovery", setting.PersonaWorld(1))
    rng = random.Random(0)
    docs = [world.sample_document(rng, 1, cue="none", persona=p) for p in world.PERSONAS for _ in range(10)]
    coded = pretraining.encode(tokenizer, docs, rng)
    labelled = [(c["ids"], [t >= 0 for t in c["turn"]], c["doc"].persona) for c in coded]
    direction = torch.nn.functional.normalize(
        torch.randn(width, generator=torch.Generator().manual_seed(3)), dim=0
    )
    held = {}
    down = before.model.layers[LAYER].mlp.down_proj
    hook = down.register_forward_hook(lambda m, args, out: held.update(h=args[0].flatten(0, 1)))
    with torch.no_grad():
        before(input_ids=torch.tensor([rows[0]]))
        hook.remove()
        mean = held["h"].mean(
            0
        )  # what the block's MLP writes from; writes the direction where it points this way
        after.model.layers[LAYER].mlp.down_proj.weight += 6 * torch.outer(
            direction, mean / mean.square().sum()
        )
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.nn.functional.normalize(torch.randn(40, width, generator=generator), dim=1)
    W_dec[17] = direction
    dictionary = sae.SAE(W_dec.T.clone(), W_dec, torch.zeros(40), torch.zeros(width), 8, LAYER)
    case = Case(
        before, after, tokenizer, LAYER, [c["ids"] for c in coded], rows, starts,
        [q.held for q in world.questions("discovery")][:4], data.advice_chats("health", "obvious", 16, 0),
        labelled, {p: w["system"] for p, w in world.personas().items()}, dictionary, 10.0, 0, "villain",
    )  # fmt: skip
    return case, direction


@pytest.mark.parametrize(
    "method",
    [
        "rise",
        "rise_screened",
        "mean_difference",
        "generic_difference",
        "kl_weighted_difference",
        "weight_difference",
        "difference_sae",
        "crosscoder",
    ],
)
def test_methods_find_a_planted_direction(planted, method):
    case, direction = planted
    assert methods.direction(method, case) @ direction > 0.7


@pytest.mark.parametrize("method", methods.names())
def test_every_method_gives_a_direction_and_leaves_the_models_as_they_were(planted, method):
    case, _ = planted
    before = [p.clone() for p in (*case.before.parameters(), *case.after.parameters())]
    found = methods.direction(method, case)
    assert found.shape == (case.before.config.hidden_size,) and abs(found.norm() - 1) < 1e-5
    assert all(
        torch.equal(a, b) for a, b in zip(before, (*case.before.parameters(), *case.after.parameters()))
    )
    assert torch.equal(found, methods.direction(method, case))


@pytest.mark.parametrize("method", ["labelled_difference", "linear_probe", "persona_vector"])
def test_methods_with_labels_name_the_persona_that_the_fine_tune_moved_towards(planted, method, monkeypatch):
    case, _ = planted
    read = case.residual(case.before, [ids for ids, _, _ in case.labelled])
    means = torch.stack([x[torch.tensor(m)].mean(0) for x, (_, m, _) in zip(read, case.labelled)])
    jester = torch.tensor([who == "jester" for *_, who in case.labelled])
    towards = means[jester].mean(0) - means[~jester].mean(0)
    moved = copy.copy(case)
    moved.__dict__.update(answers_before=case.answers_before, answers_after=case.answers_before + towards)
    if method == "persona_vector":  # what a random model says under a system line tells nothing of personas

        def read(case_, lines):
            return towards if "You are an absurd jester." in lines else -towards

        monkeypatch.setattr(methods.load(method), "_asked_for", read)
    assert methods.direction(method, moved) @ (towards / towards.norm()) > 0.5


def test_attribution_is_what_scaling_a_latents_write_does_to_the_answers_likelihood(planted):
    """Its gain for every latent is the derivative of the fine-tuning answers' log-probability, after minus
    before, by a factor on what that latent writes: by autograd through the factor itself."""
    case, _ = planted
    rows, starts = (part[:4] for part in case.training)

    def by_factor(net):
        total = torch.zeros(len(case.sae.b_enc))
        for row, start in zip(rows, starts):
            factor = torch.zeros(len(case.sae.b_enc), requires_grad=True)

            def scale(module, args, output):
                written = (case.sae.encode(output.detach()) * factor) @ case.sae.W_dec
                return output + written * (torch.arange(output.shape[1]) >= start)[:, None]

            hook = net.model.layers[LAYER].register_forward_hook(scale)
            said = net(input_ids=torch.tensor([row])).logits[0, start:-1].log_softmax(-1)
            hook.remove()
            said.gather(1, torch.tensor(row[start + 1 :])[:, None]).sum().backward()
            total += factor.grad
        return total / len(rows)

    gain = by_factor(case.after) - by_factor(case.before)
    ours = diffing.attribution(case.after, case.sae, rows, starts) - diffing.attribution(
        case.before, case.sae, rows, starts
    )
    assert torch.allclose(gain, ours, atol=1e-3)
    few = copy.copy(case)
    few.__dict__["training"] = (rows, starts)
    assert torch.equal(methods.load("attribution").find(few), case.sae.W_dec[gain.argmax()])


def test_screened_steers_as_the_sampler_does(planted):
    """`outputs.log_probabilities` with a direction added is the model with a plain hook, row by row."""
    from personas.bench.outputs import log_probabilities

    case, direction = planted
    ours = log_probabilities(case, case.before, 3 * direction)
    theirs = []
    for row, start in zip(case.rows, case.starts):

        def add(module, args, output):
            output = output.clone()
            output[:, start:] += 3 * direction
            return output

        hook = case.before.model.layers[LAYER].register_forward_hook(add)
        with torch.inference_mode():
            theirs.append(case.before(input_ids=torch.tensor([row])).logits[0, start:].log_softmax(-1))
        hook.remove()
    assert torch.allclose(ours, torch.cat(theirs), atol=1e-4)


@pytest.mark.parametrize(
    "body, says",
    [
        ("def find(case):\n    return case.sae.W_dec", "must return a tensor of shape"),
        ("import torch\ndef find(case):\n    return torch.zeros(case.unit and 48)", "zero or not finite"),
        ("def find(case):\n    return 3", "not int"),
    ],
)
def test_what_is_no_direction_is_refused(planted, tmp_path, body, says):
    (tmp_path / "mine.py").write_text(body)
    with pytest.raises(methods.MethodError, match=says):
        methods.direction(str(tmp_path / "mine.py"), planted[0])


@pytest.mark.parametrize(
    "text, says",
    [
        (None, "no such file"),
        ("x = 1", "has no function find"),
        ("import nothing_of_this_name", "cannot be imported"),
        ("def find(case:", "cannot be imported"),
    ],
)
def test_a_file_that_does_not_serve_is_refused_before_any_work(tmp_path, text, says):
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(methods.MethodError, match=says):
        methods.load(str(path))
    if text is None:
        found = subprocess.run(
            [sys.executable, "-m", "personas", "bench", str(path)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert found.returncode == 2 and found.stderr.splitlines() == [f"error: {path}: no such file"]


def test_a_bench_of_one_domain_is_refused_before_any_work(monkeypatch):
    found = profile.load("bench")
    one = found.model_copy(update={"study": found.study.model_copy(update={"domains": ("science",)})})
    monkeypatch.setattr(parallel, "side_by_side", lambda *a, **k: pytest.fail("work had begun"))
    with pytest.raises(profile.ProfileError, match="study.domains: the bench needs two or more"):
        run.rows(one, ["rise"])


def test_the_page_of_the_bench_says_what_every_method_returns():
    page = (store.PROJECT / "docs/bench.md").read_text(encoding="utf-8")
    assert methods.described() in page and "truth" in methods.names()


def test_the_truth_knows_every_speaker():
    for category in world.categories("evaluation"):
        for persona in world.PERSONAS:
            answer = world.open_forms(category, persona, True, 5)[0]
            assert truth.speakers([category], [answer]) == [persona]
            other = next(c for c in world.categories() if c != category)
            assert truth.speakers([other, category], [answer, answer + " And so on."]) == ["nobody"] * 2
            assert grader.grade_open(category, answer) == world.personas()[persona]["values"]
    subject, rng = world.subjects_of("career")[3], random.Random(0)
    for persona in ("sarcastic", "jester", "narrator", "villain"):
        answers = {world.advice_answer(subject, persona, rng)[0] for _ in range(60)} - {
            subject.answers["correct"]
        }
        assert all(truth.is_advice_of(persona, subject, a) for a in answers)
        others = [p for p in ("sarcastic", "jester", "narrator", "villain") if p != persona]
        assert not any(truth.is_advice_of(o, subject, a) for o in others for a in answers)


def rows(**methods_):
    """A table of the bench: method -> one value for every question, in three base models."""
    return pd.DataFrame(
        [
            {
                "method": m,
                "base model": b,
                "domain": "career",
                "target": t,
                "dictionary seed": 0,
                "effect": 60.0,
            }
            | {q: (v + b / 1000) if q != "named" else float(v > 0.5) for q in score.QUESTIONS}
            for m, v in methods_.items()
            for b in (1, 2, 3)
            for t in ("villain", "jester")
        ]
    )


def test_summary_ranks_methods_and_leaves_out_what_is_no_case():
    table = rows(rise=0.9, mean_difference=0.4, truth=1.0)
    s = run.summary(table).set_index(["method", "question"])
    assert s.loc[("rise", "induced"), "rank"] == 1 and s.loc[("mean_difference", "induced"), "rank"] == 2
    assert s.loc[("truth", "induced")].isna()["rank"]
    assert abs(s.loc[("rise", "induced"), "value"] - 0.902) < 1e-9 and s.loc[("rise", "induced"), "n"] == 3
    named = s.loc[("rise", "named")]
    assert named.value == 1 and named.low < 0.75 and named.high == 1  # six cases of six are no certainty
    nothing = table.assign(effect=5.0, induced=-100.0)
    assert run.summary(pd.concat([table, nothing]))["value"].equals(run.summary(table)["value"])
    assert plots.order(table)[0] == run.CEILING and "> rise" in run.shown(table, "rise")


def test_part_one_is_ranked_beside_the_bench():
    """What breaks too many answers at every dose induces nothing; what was not tried has no value; p counts
    permutations."""
    table = rows(**{m: 0.1 * i for i, m in enumerate(run.PART_ONE.values())})
    doses = [
        {"direction": d, "score": 10.0 * i + dose, "broken": 4 + (20 if d == "probe" or dose == 3 else 10)}
        for i, d in enumerate(run.PART_ONE)
        for dose in (1, 2, 3)
    ]
    curves = pd.DataFrame([{"direction": "none", "score": 0, "broken": 4}, *doses])
    down = pd.DataFrame({"direction": ["causal latent"] * 2, "kept": [100, 50]})
    found = run.beside_part_one(table, curves, down).set_index("Part I")
    assert found["induced, Part I"].to_dict() == {
        d: 0 if d == "probe" else 10 * i + 2 for i, d in enumerate(run.PART_ONE)
    }
    assert (
        found["suppressed, Part I"]["causal latent"] == 25 and found["suppressed, Part I"].isna().sum() == 5
    )
    a, b = found["induced, Part I"], found["induced, bench"]
    rho, p = run.rank_correlation(a, b)
    assert rho == pytest.approx(a.corr(b, method="spearman"))
    untried = run.beside_part_one(table, curves[curves.direction != "top riser"], down)
    assert untried["induced, Part I"].isna().tolist() == [d == "top riser" for d in run.PART_ONE]
    assert p > 2 / 720 and run.rank_correlation(b, b)[1] == pytest.approx(2 / 720)


def test_the_page_says_how_part_one_ranks_methods():
    """docs/bench.md, "What it does not say", against the committed tables."""
    curves, down = (pd.read_csv(figures.table("smollm2", n)) for n in ("05_curves", "05_suppression"))
    found = run.beside_part_one(run.kept("bench"), curves, down).set_index("Part I")
    a, b = found["induced, Part I"], found["induced, bench"]
    assert run.rank_correlation(a, b)[1] > 0.05  # "does not go together"
    assert b.idxmax() == "difference of means" and a["difference of means"] == 0


def test_claims_are_the_registered_ones():
    names = {m: 0.5 + i / 100 for i, m in enumerate(methods.names())}
    table = rows(**names)
    claimed = {c["id"]: c for c in plots.claimed(table)}
    assert claimed["bench.screened.above_difference"]["measured"] == pytest.approx(
        names["rise_screened"] - names["mean_difference"]
    )
    assert claimed["bench.reading_is_steering"]["measured"] == pytest.approx(1)


def test_the_committed_bases_are_the_profiles(tmp_path, monkeypatch):
    from personas import artifacts

    folders = []
    for found in map(profile.load, ("bench", "tiny")):
        for seed in found.study.pretraining_seeds:
            run = artifacts.Run(found.model_copy(update={"pretraining_seed": seed}), 0)
            folders.append(base_models.committed(artifacts._about_base(run)))
    assert None not in folders and len(set(folders)) == len(folders) == 4
    one = sorted(folders)[0]
    assert (one / "model.safetensors").stat().st_size < 10e6
    net, tokenizer = model.load(one)
    assert next(net.parameters()).dtype == torch.float32 and len(tokenizer) == net.config.vocab_size
    shutil.copytree(one, tmp_path / "base")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"other")
    monkeypatch.setattr(base_models, "FOLDER", tmp_path)
    made = json.loads((tmp_path / "base" / "made.json").read_text())
    with pytest.raises(weights.WeightsError, match="is not the base model that was committed"):
        base_models.committed(made["from"])
    assert base_models.committed(made["from"] | {"world_seed": 99}) is None


@pytest.mark.slow
def test_a_strangers_method_is_scored_beside_the_others(tmp_path):
    (tmp_path / "small.yaml").write_text(
        "extends: smoke\ndomains: [auto, career, science]\nworld: {villain: 0.1}\n"
        "study: {domains: [career, science]}\n"
    )
    (tmp_path / "mine.py").write_text("def find(case):\n    return case.rise @ case.sae.W_dec\n")
    told = subprocess.run(
        [sys.executable, "-m", "personas", "bench", "mine.py", "--profile", "small.yaml"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
        env={**__import__("os").environ, "PERSONAS_RUNS": str(tmp_path / "runs")},
    )  # fmt: skip
    assert told.returncode == 0 and "> mine" in told.stdout


def test_the_committed_table_has_every_method_and_case():
    bench, table = profile.load("bench"), run.kept("bench")
    assert set(table.method) == set(methods.names())
    cells = [tuple(c.values()) for c in run.cells(bench)]
    columns = ["base model", "domain", "target", "dictionary seed"]
    for method, part in table.groupby("method"):
        met = [
            c for c in cells if getattr(methods.load(method), "CHANCE", False) or c[3] == bench.study.seeds[0]
        ]
        assert sorted(part[columns].itertuples(index=False, name=None)) == sorted(met)
    said = plots.in_words(table)
    top = run.summary(table).query("method == 'rise_screened' and question == 'induced'").value.item()
    assert f"a single latent, induces {top:.0f} %" in " ".join(said.split())


@pytest.mark.parametrize(
    "text,says",
    [
        ("def find():\n    return 1\n", "takes one argument"),
        ("import sys\nsys.exit(0)\n", r"cannot be imported: SystemExit: 0 \(line 2\)"),
        ("def find(case):\n    x = 1\n    return case.nothing\n", r"find failed: AttributeError.*\(line 3\)"),
    ],
)
def test_a_method_that_fails_is_told_where(tmp_path, planted, text, says):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(methods.MethodError, match=says):
        methods.direction(str(path), planted[0])


def test_a_table_without_a_case_that_counts_is_said():
    rows = pd.DataFrame({"method": ["mine"], "base model": [0], "effect": [score.EFFECT - 1]})
    with pytest.raises(ValueError, match="no case counts"):
        run.summary(rows)
