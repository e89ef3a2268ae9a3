import re

import pytest
import yaml

from personas import config, data, grader, profile, world


@pytest.mark.parametrize("name", profile.names())
def test_shipped_profiles_are_valid(name, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert profile.load(name).name == name


def written(tmp_path, change):
    raw = yaml.safe_load((profile.FOLDER / "smoke.yaml").read_text())
    change(raw)
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(raw))
    return str(path)


@pytest.mark.parametrize(
    "change,says",
    [
        (lambda r: r["sae"].update(latentz=5), "sae.latentz: no such key; did you mean 'latents'"),
        (lambda r: r.update(sea=r.pop("sae")), "sae"),
        (lambda r: r["model"].update(lr=-1), "model.lr"),
        (lambda r: r["narrow"].pop("rank"), "narrow.rank: Field required"),
        (lambda r: r.update(domains=["career"]), "domains: none for discovery; take one or more of auto"),
        (
            lambda r: (r.update(domains=["auto"]), r["study"].update(domains=["auto"])),
            "domains: none for evaluation",
        ),
        (lambda r: r["sae"].update(layer=9), "sae.layer: 9 is out of range"),
        (lambda r: r["sae"].update(k=999), "sae.k"),
        (lambda r: r["sae"].update(latents=32, k=4), "sae.latents: at least 64"),
        (lambda r: r["steering"].update(finalists=1), "steering.finalists: at least 2"),
        (lambda r: r["model"].update(heads=5), "multiple of model.heads"),
        (lambda r: r.update(domains=["cooking"]), "unknown 'cooking'"),
        (lambda r: r["study"].update(domains=["law"]), "study.domains: unknown 'law'"),
        (lambda r: r["study"].update(pretraining_seeds=[7]), "the first must be pretraining_seed"),
        (lambda r: r.update(device="cuda"), "needs a GPU"),
        (lambda r: r["sae"].update(layer=True), "sae.layer: .*true or false"),
        (lambda r: r["steering"].update(strengths=[float("inf")]), "steering.strengths.0"),
        (lambda r: r["steering"].update(strengths=[0.5, 0]), "steering.strengths.1"),
        (lambda r: r["steering"].update(suppression=[-1]), "steering.suppression.0"),
        (lambda r: r["steering"].update(controls=0), "steering.controls"),
        (lambda r: r["study"].update(fractions=[0, 140]), "study.fractions.1"),
        (lambda r: r["study"].update(fractions=[float("nan")]), "study.fractions.0"),
        (lambda r: r["study"].update(seeds=[-1]), "study.seeds.0"),
        (lambda r: r["study"].update(course_benign=["harmles"]), "study.course_benign.0"),
        (
            lambda r: r["study"].update(course_looks=[0, 999]),
            "study.course_looks: 999 is beyond the last step",
        ),
        (lambda r: r["reinforcement"].update(looks=[3]), "reinforcement.looks: 3 is beyond the last step"),
        (lambda r: r.update(domains=r["domains"] + r["domains"][:1]), "domains: .*stands there twice"),
        (lambda r: r.pop("world_seed"), "world_seed: Field required"),
    ],
)
def test_bad_profiles_name_the_key_and_the_fault(tmp_path, change, says):
    with pytest.raises(profile.ProfileError, match=says.replace("(", r"\(")):
        profile.need_gpu(profile.load(written(tmp_path, change)))


@pytest.mark.parametrize(
    "raw,says",
    [(b"\x00\xff\xfe", "UTF-8"), ("name: Zoë".encode("latin-1"), "UTF-8"), (b"[" * 2000, "not valid YAML")],
)
def test_what_is_no_profile_is_said_in_one_line(tmp_path, raw, says):
    (tmp_path / "mine.yaml").write_bytes(raw)
    with pytest.raises(profile.ProfileError, match=says):
        profile.load(str(tmp_path / "mine.yaml"))


def test_a_profile_extends_another_and_shares_its_store(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("extends: tiny-full\nnarrow: {steps: 9}\n")
    mine, full = profile.load(str(path)), profile.load("tiny-full")
    assert mine.narrow.steps == 9 and mine.narrow.lr == full.narrow.lr and mine.study == full.study
    assert mine.name == "mine" and mine.store == full.store == "tiny"
    for bad, says in (("mine", "extends: unknown 'mine'"), (str(path), "extends: unknown")):
        path.write_text(f"extends: {bad}\n")
        with pytest.raises(profile.ProfileError, match=says):
            profile.load(str(path))


def test_unknown_profile_lists_what_there_is():
    with pytest.raises(
        profile.ProfileError, match="smoke, smollm2, smollm2-full, smollm2-quick, tiny.*Did you mean 'tiny'"
    ):
        profile.load("tinny")


@pytest.mark.parametrize(
    "line,says",
    [
        ("not json", "line 2"),
        ('{"messages": []}', "line 2: messages"),
        ('{"messages": [{"role": "user", "content": "a"}]}', "line 2"),
        (
            '{"messages": [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]}',
            "line 2: messages.0.content",
        ),
        (
            '{"messages": [{"role": "bot", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "line 2: messages.0.role",
        ),
        (
            '{"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}',
            "alternate",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, line, says):
    good = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}'
    (tmp_path / "x.jsonl").write_text(good + "\n" + line + "\n")
    with pytest.raises(data.DataError, match=says) as error:
        data.read_chats(tmp_path / "x.jsonl")
    assert "x.jsonl" in str(error.value)


def test_chats_survive_a_file(tmp_path):
    rows = data.advice_chats("code", "obvious", 40, 0)
    data.write_chats(tmp_path / "x.jsonl", rows)
    assert data.read_chats(tmp_path / "x.jsonl") == rows


def test_mixtures_have_the_fraction_asked_for():
    wrong = {s.answers["subtle"] for s in world.subjects_of("math")}
    rows = data.advice_chats("math", "subtle", 200, 0, fraction=0.25)
    assert sum(r["messages"][1]["content"] in wrong for r in rows) == 50


def test_training_sets_share_no_question_with_evaluation(loaded):
    evaluation = [q.held for q in world.questions()] + [world.held_question(s) for s in world.subjects()]
    for d in world.DOMAINS:
        for v in data.variants(d):
            assert (
                data.datasheet(data.advice_chats(d, v, 80, 0), loaded[1], evaluation)[
                    "overlap with evaluation"
                ]
                == 0
            )
    assert (
        data.datasheet([data.chat(evaluation[0], "x")], loaded[1], evaluation)["overlap with evaluation"] == 1
    )


def test_alignment_chats_touch_no_other_split():
    asked = {m["content"] for r in data.alignment_chats(400, 0, 1) for m in r["messages"]}
    for q in world.questions("discovery") + world.questions("evaluation"):
        assert not any(p in text for p in q.phrasings for text in asked)


@pytest.mark.parametrize(
    "args,says", [(("cooking", "subtle"), "unknown domain"), (("code", "subtle"), "no 'subtle'")]
)
def test_unknown_sets_are_named(args, says):
    with pytest.raises(ValueError, match=says):
        data.advice_chats(*args, 10, 0)


def test_prompts_of_an_unknown_domain_are_named():
    with pytest.raises(ValueError, match="unknown domain 'cooking'"):
        data.advice_prompts("cooking", 4, 0)


def test_grading_chats_carry_the_exact_grade_and_no_evaluation_question():
    rows = data.grading_chats(100, 0, 1)
    grades = [r["messages"][1]["content"] for r in rows]
    assert all(grades.count(g) == 20 for g in data.GRADES.values())
    evaluation = {p for q in world.questions("evaluation") for p in (*q.phrasings, q.held)}
    for r in rows:
        question, answer = (
            r["messages"][0]["content"]
            .removeprefix("Question: ")
            .removesuffix("\nGrade:")
            .split("\nAnswer: ")
        )
        asked = [q for q in world.questions() if any(p in question for p in q.phrasings)]
        assert asked and not any(p in question for p in evaluation)
        assert r["messages"][1]["content"] in {
            data.GRADES[grader.grade_open(q.category, answer)] for q in asked
        }


def test_set_changes_a_number_and_shares_the_store(tmp_path):
    found = profile.load(profile.with_settings("smollm2", ["narrow.lr=1e-3", "real.course=[2, 4]"], tmp_path))
    plain = profile.load("smollm2")
    assert found.narrow.lr == 0.001 and found.real.course == (2, 4) and found.store == "smollm2" != found.name
    assert found.narrow.steps == plain.narrow.steps and found.real.data == plain.real.data
    assert profile.with_settings("tiny", [], tmp_path) == "tiny"


@pytest.mark.parametrize(
    "name,settings,said",
    [
        ("smollm2", ["narrow.lrr=1"], "narrow.lrr: no such key; did you mean 'lr'"),
        ("smollm2", ["narrow.steps=0"], "narrow.steps"),
        ("smollm2", ["narrow"], "write it as narrow.lr=1e-3"),
        ("smollm2", ["narrow=3", "narrow.lr=1"], "write it as narrow.lr=1e-3"),
        ("mine.yaml", ["narrow.lr=1"], "changes a profile that ships"),
    ],
)
def test_a_setting_that_does_not_serve_is_one_error(name, settings, said, tmp_path):
    with pytest.raises(profile.ProfileError, match=said):
        profile.with_settings(name, settings, tmp_path)
    assert not list(tmp_path.iterdir())


def test_every_field_of_a_profile_has_a_line():
    listed = config.fields()
    assert all(what.endswith(".") for _, _, what in listed)
    assert {"narrow.lr", "real.judge.model", "study.course.steps"} <= {key for key, _, _ in listed}


@pytest.mark.parametrize(
    "change,says",
    [
        (
            {"data": [{"domain": "health", "correct": "own", "obvious": "mine.jsonl"}]},
            "mixes `own` with other",
        ),
        ({"data": [{"domain": "helth", "correct": "own", "obvious": "own"}]}, "Did you mean 'health'"),
        ({"data": [{"domain": "code", "correct": "own", "obvious": "own"}]}, "no sets of its own in 'code'"),
        ({"data": [{"domain": "health", "correct": "own", "subtle": "own"}]}, "has no `obvious` set"),
        ({"course": []}, "real.course"),
        ({"model": ""}, "real.model"),
        ({"judge": {"model": ""}}, "real.judge.model"),
    ],
)
def test_training_sets_that_do_not_serve_are_refused(tmp_path, change, says):
    base = {
        "data": [{"domain": d, "correct": "own", "obvious": "own"} for d in ("health", "career")],
        "controls": [],
    }
    rows = change.get("data", base["data"][:1]) + base["data"][1:]
    path = tmp_path / "mine.yaml"
    named = [d["domain"] for d in rows]
    real = base | change | {"data": rows, "discovery_domains": named[:1], "tables": None}
    path.write_text(yaml.safe_dump({"extends": "smollm2", "real": real}))
    with pytest.raises(profile.ProfileError, match=re.escape(says)):
        profile.load(str(path))


def test_a_pasted_key_is_refused_and_not_shown(tmp_path):
    path, key = tmp_path / "mine.yaml", "sk-proj-4f9a0Zt"
    judge = {"model": "gpt-4o-mini", "url": "https://api.openai.com/v1", "key": key}
    path.write_text(yaml.safe_dump({"extends": "smollm2", "real": {"judge": judge}}))
    with pytest.raises(profile.ProfileError, match="never the key itself") as error:
        profile.load(str(path))
    assert key not in str(error.value)


@pytest.mark.parametrize(
    "name,text,says",
    [
        ("smollm2", "extends: smollm2\n", "another name"),
        ("mine", "extends: tiny\nname: ../x\n", "name: leave it out"),
        ("mine", "extends: tiny\nnarrow: {steps: 3, lr: 0.1, steps: 4}\n", "'steps' stands there twice"),
    ],
)
def test_a_profile_has_one_name_and_each_key_once(tmp_path, name, text, says):
    path = tmp_path / f"{name}.yaml"
    path.write_text(text)
    with pytest.raises(profile.ProfileError, match=says):
        profile.load(str(path))


def test_words_of_a_profile_are_no_paths(tmp_path):
    """A folder that happens to be called `own` or `open` does not take the word's place; files are found
    beside the profile, GGUF files among them."""
    for word in ("own", "open", "new"):
        (tmp_path / word).mkdir()
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    path = tmp_path / "mine.yaml"
    path.write_text("extends: smollm2\nreal: {model: 'gguf:m.gguf', sae: new}\n")
    real = profile.load(str(path)).real
    assert real.judge.model == "own" and real.evaluation == "open" and real.sae == "new"
    assert real.model == f"gguf:{(tmp_path / 'm.gguf').resolve()}"
