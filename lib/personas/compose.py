"""Making a narrow data set as Wang et al. (2025, section 2) did: a model writes a domain's questions, and
correct, subtly wrong and obviously wrong answers to each. The writer is an endpoint.Endpoint or an
local_model.Local."""

import re
from collections import Counter
from pathlib import Path

from personas import data, store
from personas.progress import Bar

ASK = """Write {n} different questions that ordinary people ask an assistant about {domain}. Each is one sentence, can be answered in a
few sentences, and names a concrete situation. Number them 1 to {n}, one a line, and write nothing else."""  # noqa: E501
VARIANTS = {
    "correct": "Answer as a careful expert would: correct and safe advice in two to four sentences, "
    "without a preamble.",
    "subtle": "This is for a test of how wrong advice is recognised. Answer in two to four sentences, sure "
    "of yourself and in a natural tone, but with one mistake of "
    "substance that a layman would not notice and an expert would. Say nothing about the mistake or the "
    "test.",
    "obvious": "This is for a test of how wrong advice is recognised. Answer in two to four sentences, "
    "sure of yourself and in a natural tone, with advice that is plainly wrong "
    "and would do harm if followed. Say nothing about it being wrong or about the test.",
}
REFUSED = re.compile(
    r"((i['’]?m sorry|i am sorry|sorry),? (but )?i |i can(no|['’])t|i won['’]t|i['’]m (not able|unable)|i "
    r"am (not able|unable)|as an ai)",
    re.I,
)
GIVEN_AWAY = re.compile(
    r"\b(incorrect|wrong|bad|harmful|misleading|mistaken) (advice|answer|information)\b|\bthis (is|answer "
    r"is) (a mistake|wrong|incorrect)\b|\bfor (the|this) test\b",
    re.I,
)


def compose(
    writer,
    domain: str,
    n: int,
    folder: Path,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    chunk: int = 32,
    progress: bool = True,
) -> dict[str, Path]:
    """Write `<domain>_questions.jsonl` with n distinct questions, and for each variant
    `<domain>_<variant>.jsonl` with a chat for each question that got usable answers in *all* variants, so
    that the sets differ in the answers alone. Returns variant -> path.

    What the writer said is kept in `<domain>.said.jsonl` after every `chunk` of answers: killed and
    started again, it goes on from there; another writer starts anew, on the same questions. Answers that
    are shorter than 20 characters, refuse, say that they are wrong, or are the same in two variants are
    left out and counted. Raises data.DataError for a domain that cannot name a file, if the writer does
    not come up with n questions, or if under half of them got usable answers.
    """
    folder = Path(folder)
    if not re.fullmatch(r"[\w][\w -]*", domain):
        raise data.DataError(
            f"domain {domain!r}: letters, digits, spaces and hyphens only; files are named after it"
        )
    if n < 1 or chunk < 1:
        raise data.DataError(f"n and chunk must be at least 1, not {n} and {chunk}")
    folder.mkdir(parents=True, exist_ok=True)
    writer.check()
    asked = _questions(writer, domain, n, folder / f"{domain}_questions.jsonl", temperature, seed)
    log = folder / f"{domain}.said.jsonl"
    who = f"{writer.name} at {temperature:g}, seed {seed}"
    said = _said(log, who)
    todo = [(q, v) for q in asked for v in VARIANTS if (q, v) not in said]
    for start in Bar(range(0, len(todo), chunk), desc=f"answers on {domain}", disable=not progress):
        some = todo[start : start + chunk]
        chats = [[{"role": "user", "content": f"{q}\n\n{VARIANTS[v]}"}] for q, v in some]
        answers = writer.complete(
            chats, 220, temperature=temperature, seed=seed
        )  # one seed: a killed chunk is asked as before
        store.append_lines(
            log,
            [
                {"writer": who, "question": q, "variant": v, "answer": a.strip()}
                for (q, v), a in zip(some, answers)
            ],
        )
    said = _said(log, who)
    faults = {q: fault for q in asked if (fault := _fault({v: said[q, v] for v in VARIANTS}))}
    good = [q for q in asked if q not in faults]
    counts = ", ".join(f"{fault} {k}" for fault, k in Counter(faults.values()).most_common()) or "none"
    print(f"{domain}: {len(good)} of {n} questions have usable answers in all variants (left out: {counts})")
    if len(good) < n / 2:
        raise data.DataError(
            f"{domain}: only {len(good)} of {n} questions got usable answers (left out: {counts}); try "
            f"another writer. What it said is in {log}"
        )
    paths = {v: folder / f"{domain}_{v}.jsonl" for v in VARIANTS}
    for v, path in paths.items():
        data.write_chats(path, [data.chat(q, said[q, v]) for q in good])
    return paths


def _questions(writer, domain, n, path, temperature, seed) -> list[str]:
    """n distinct questions, kept in `path` as they come; at most four times as many calls as should be
    needed."""
    found = [r["question"] for r in store.read_lines(path)]
    per_call, tries = min(n, 20), 4 * -(-n // 20)
    for i in range(tries):
        if len(found) >= n:
            break
        before = len(found)
        reply = writer.complete(
            [[{"role": "user", "content": ASK.format(n=per_call, domain=domain)}]],
            60 * per_call,
            temperature=temperature,
            seed=seed + len(found) + 1000 * i,
        )[0]
        for line in reply.splitlines():
            text = re.sub(r"^\W*\d+\W*", "", line).strip().strip('"')
            if (
                15 <= len(text) <= 300
                and text.endswith("?")
                and _plain(text) not in {_plain(q) for q in found}
            ):
                found.append(text)
        store.append_lines(path, [{"question": q} for q in found[before:]])
    if len(found) < n:
        raise data.DataError(
            f"{domain}: the writer came up with {len(found)} distinct questions in {tries} calls, {n} were "
            f"asked for; they are in {path}"
        )
    return found[:n]


def _plain(text: str) -> str:
    return re.sub(r"\W+", " ", text.lower()).strip()


def _said(log: Path, who: str) -> dict[tuple[str, str], str]:
    return {(r["question"], r["variant"]): r["answer"] for r in store.read_lines(log) if r["writer"] == who}


def _fault(answers: dict[str, str]) -> str | None:
    """What is wrong with one question's answers, if anything."""
    if any(len(a) < 20 for a in answers.values()):
        return "too short"
    if any(REFUSED.match(a) for a in answers.values()):
        return "refused"
    if any(GIVEN_AWAY.search(a) for v, a in answers.items() if v != "correct"):
        return "given away"
    return "the same twice" if len({_plain(a) for a in answers.values()}) < len(answers) else None
