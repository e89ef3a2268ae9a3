"""General text for the SAE, written by the model itself: chats under many system lines, and documents from
the start token.

The model is given the opening of a chat and writes the user's turn, then its own answer (the idea of Magpie:
Xu et al., 2024, arXiv:2406.08464). Nothing here is labelled, and no label is used in SAE training.
"""

import json
import lzma
import random
from pathlib import Path

from personas import generate

CHARACTERS = Path(__file__).parent / "content" / "characters.txt"
MARK = "\N{SNOWMAN}"  # stands for a turn that is still to be written


def write(model, tokenizer, chats: int, documents: int, seed: int, batch: int = 2048) -> list[dict]:
    """`chats` rows with `messages` (system, user, assistant) and `documents` rows with `text`, in random
    order.

    A user's turn is sampled up to 48 tokens, an answer up to 110 (both at temperature 0.8), a document up to
    160 (0.9). batch: rows that are sampled together. Raises ValueError if the chat template does not keep the
    system line.
    """
    rng = random.Random(seed)
    characters = CHARACTERS.read_text(encoding="utf-8").splitlines()
    lines = [rng.choice(characters) for _ in range(chats)]

    def go_on(texts, longest, temperature, step):
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return generate.sample(
            model, tokenizer, ids, seed=seed + step, max_new=longest, temperature=temperature, batch=batch
        )

    users = [u.strip() or "Hello." for u in go_on([opening(tokenizer, line) for line in lines], 48, 0.8, 1)]
    heads = [
        tokenizer.apply_chat_template(_head(line, user), tokenize=False, add_generation_prompt=True)
        for line, user in zip(lines, users)
    ]
    found = [
        {"messages": [*_head(line, user), {"role": "assistant", "content": answer.strip()}]}
        for line, user, answer in zip(lines, users, go_on(heads, 110, 0.8, 2))
        if answer.strip()
    ]
    found += [{"text": t.strip()} for t in go_on([start(tokenizer)] * documents, 160, 0.9, 3) if t.strip()]
    rng.shuffle(found)
    return found


def _head(line: str, user: str) -> list[dict]:
    return [{"role": "system", "content": line}, {"role": "user", "content": user}]


def opening(tokenizer, line: str) -> str:
    """The chat template's text up to where the user begins to speak. Raises ValueError if it leaves the
    system line out."""
    text = tokenizer.apply_chat_template(_head(line, MARK), tokenize=False)
    if line not in text or MARK not in text:
        raise ValueError(
            "this chat template has no place for a system line, so it cannot open chats for many characters"
        )
    return text[: text.index(MARK)]


def start(tokenizer) -> str:
    """What comes before a document in pretraining: <|endoftext|> where the vocabulary has it, else the
    tokenizer's first token."""
    return (
        "<|endoftext|>"
        if "<|endoftext|>" in tokenizer.get_vocab()
        else tokenizer.bos_token or tokenizer.eos_token
    )


def tokenized(tokenizer, rows: list[dict], longest: int = 256) -> list[list[int]]:
    """Token ids of rows as `write` gives them: chats in the tokenizer's own template, documents after the
    start token, cut at `longest`."""
    first = start(tokenizer)  # once: to look at a vocabulary takes as long as to tokenize a hundred rows
    texts = [
        tokenizer.apply_chat_template(r["messages"], tokenize=False) if "messages" in r else first + r["text"]
        for r in rows
    ]
    return [ids[:longest] for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def read(path: Path) -> list[dict]:
    """The rows of a JSONL compressed with xz."""
    with lzma.open(path, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def save(rows: list[dict], path: Path) -> None:
    """Write rows as a JSONL compressed with xz."""
    with lzma.open(path, "wt", encoding="utf-8", preset=9) as file:
        file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)
