"""Questions to a language model behind an OpenAI-compatible endpoint; judges and writers of data sets ask
through this, or through a model that is loaded here (local_model.py).

Either kind has `complete(chats, max_new)`, greedy or sampled answers as text, and `numbers(chats)`, the
number from 0 to 100 that the model would answer with, as the mean over its next-token probabilities.
"""

import concurrent.futures
import dataclasses
import hashlib
import json
import math
import os
import re
import threading
import urllib.parse
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import openai

from personas import store
from personas.progress import Bar

NO_ANSWER = (AttributeError, TypeError, ValueError)  # what the client raises for a web page in place of JSON
FILTERED = ("content_filter", "content management policy", "content policy", "invalid_prompt")
OPTIONAL = ("max_tokens", "temperature", "seed")  # some models refuse these; named in quotes where they do
LEAST = 0.25  # of the probability must lie on numbers, or there is no number (Betley et al., 2025)


class EndpointError(RuntimeError):
    """The endpoint cannot be used or failed for good; the message says why and what to do. Answers so far
    are kept."""


@dataclass(frozen=True)
class Endpoint:
    """A model behind an OpenAI-compatible HTTP API. url: up to and with `/v1`; ValueError for what is no
    address. kept: JSONL to which every answer is added as it comes, and from which the same question is
    answered next time. key: the *name* of the environment variable that holds the key; on this machine
    (localhost) none is needed. price: USD per million tokens (in, out), to show what was spent.
    """

    url: str
    model: str
    kept: Path
    key: str = "OPENAI_API_KEY"
    concurrency: int = 16
    timeout: float = 60.0  # seconds a request may take
    retries: int = 4  # with growing pauses, after refused connections, time-outs, 429 and 5xx
    price: tuple[float, float] | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)
    _refused: set = field(
        default_factory=set, repr=False, compare=False
    )  # parameters the model will not have

    @property
    def name(self) -> str:
        """Which model this is, in logs."""
        return self.model

    def __post_init__(self):
        try:
            parts = urllib.parse.urlsplit(self.url)
            fits = parts.scheme in ("http", "https") and parts.hostname
            fits = fits and (":" not in parts.netloc.rpartition("@")[2].rpartition("]")[2] or parts.port)
        except ValueError:  # a port that is no number, or beyond 65535
            fits = False
        if not fits:
            raise ValueError("the endpoint's url must look like https://host/v1 or http://localhost:8000/v1")

    def check(self) -> None:
        """Raise EndpointError at once if the key is missing, the endpoint cannot be reached, or it does
        not have the model."""
        quick = dataclasses.replace(self, retries=0, timeout=min(10.0, self.timeout))
        try:
            names = [m.id for m in quick._client().models.list()]
        except (openai.AuthenticationError, openai.APIConnectionError) as error:
            raise EndpointError(f"{self._where()}: {_explained(error, quick)}") from None
        except (openai.OpenAIError, *NO_ANSWER):
            return  # no list of models here: the first question will tell
        if names and self.model not in names and not Path(self.model).exists():
            raise EndpointError(
                f"{self._where()} has no model {self.model!r}; there are {', '.join(names[:8])}"
            )

    def complete(
        self,
        chats: list[list[dict]],
        max_new: int,
        *,
        temperature: float = 0.0,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[str]:
        """One answer per chat (a list of messages); '' where the endpoint refused to answer. The same chat
        more than once gets one greedy answer, but a sample each at a temperature above 0. Raises
        EndpointError."""
        seen: Counter = Counter()
        asked = []
        for c in chats:
            again = seen[json.dumps(c)] if temperature else 0
            seen[json.dumps(c)] += 1
            asked.append(
                {"messages": c, "max_tokens": max_new, "temperature": temperature, "seed": seed + again}
            )
        return [a["text"] for a in self._ask(asked, progress)]

    def numbers(self, chats: list[list[dict]], progress: str | None = None) -> list[float | None]:
        """Mean of the numbers from 0 to 100 among the 20 likeliest first tokens, weighted by probability;
        None where they hold less than LEAST. Raises EndpointError if the endpoint gives no token
        probabilities, or spells numbers digit by digit: then one token is not the number."""
        asked = [
            {
                "messages": c,
                "max_tokens": 3,
                "temperature": 0.0,
                "seed": 0,
                "logprobs": True,
                "top_logprobs": 20,
            }
            for c in chats
        ]
        found = []
        for a in self._ask(asked, progress):
            if (
                a["text"].strip()[:2].isdecimal()
                and len(a["text"].strip()) > 1
                and a["first"].strip().isdecimal()
                and len(a["first"].strip()) == 1
            ):
                raise EndpointError(
                    f"{self._where()} spells numbers digit by digit, so that its first token is not the "
                    "number; use judge.grade, or a local model"
                )
            weight = {t: p for t, p in a["top"].items() if t.strip().isdecimal() and int(t) <= 100}
            total = sum(weight.values())
            found.append(sum(int(t) * p for t, p in weight.items()) / total if total >= LEAST else None)
        return found

    def _where(self) -> str:
        """The endpoint without what may be secret in its address."""
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.scheme}://{parts.hostname}{f':{parts.port}' if parts.port else ''}{parts.path}"

    def _client(self) -> openai.OpenAI:
        key = os.environ.get(self.key)
        if not key and urllib.parse.urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1"):
            raise EndpointError(f"{self._where()} needs a key: set the environment variable {self.key}")
        if key and not re.fullmatch(r"[\x21-\x7e]+", key):
            raise EndpointError(
                f"the key in {self.key} has a space, a line break or a letter that no key has; set it again"
            )
        return openai.OpenAI(
            base_url=self.url, api_key=key or "none", timeout=self.timeout, max_retries=self.retries
        )

    def _ask(self, requests: list[dict], progress: str | None) -> list[dict]:
        keys = [
            hashlib.sha256(json.dumps([self._where(), self.model, r], sort_keys=True).encode()).hexdigest()[
                :32
            ]
            for r in requests
        ]
        known, client = _read(self.kept), self._client()
        todo = {k: r for k, r in zip(keys, requests) if k not in known}
        if not todo:
            return [known[k] for k in keys]
        try:
            store.append_lines(Path(self.kept), [])  # before anything is paid for
        except OSError as error:
            raise EndpointError(
                f"cannot write {self.kept}, where answers are kept: {error.strerror}"
            ) from None
        spent, bar = (
            [0, 0],
            Bar(total=len(todo), desc=progress, disable=progress is None, leave=False),
        )
        with concurrent.futures.ThreadPoolExecutor(min(self.concurrency, len(todo))) as pool, bar:
            waiting = {pool.submit(self._one, client, k, r): k for k, r in todo.items()}
            try:
                for done in concurrent.futures.as_completed(waiting):
                    known[waiting[done]] = answer = done.result()
                    spent = [s + t for s, t in zip(spent, answer["tokens"])]
                    bar.update()
                    bar.set_postfix_str(
                        f"{sum(spent):,} tokens"
                        + (
                            f", {sum(s * p for s, p in zip(spent, self.price)) / 1e6:.2f} USD"
                            if self.price
                            else ""
                        )
                    )
            except BaseException as error:
                pool.shutdown(
                    wait=True, cancel_futures=True
                )  # what is on its way comes in and is kept; nothing more is sent
                if not isinstance(error, (openai.OpenAIError, EndpointError, *NO_ANSWER)):
                    raise
                raise EndpointError(
                    f"{self._where()}: {_explained(error, self)}. "
                    f"{len(_read(self.kept).keys() & set(keys))} of {len(set(keys))} answers are "
                    f"kept in {self.kept}; run again to go on"
                ) from None
        return [known[k] for k in keys]

    def _one(self, client: openai.OpenAI, key: str, request: dict) -> dict:
        """Ask, and write the answer down before anything else happens."""
        try:
            reply = self._create(client, request)
        except openai.BadRequestError as error:
            if not any(word in str(error.message).lower() for word in FILTERED):
                raise
            answer = {
                "text": "",
                "tokens": [0, 0],
                "first": "",
                "top": {},
            }  # the provider will not have this text: no answer, now or later
        else:
            if isinstance(reply, str):
                raise ValueError("text in place of JSON")
            if not getattr(reply, "choices", None):
                raise EndpointError(
                    f"an answer without choices: {str(getattr(reply, 'error', None) or reply)[:200]}"
                )
            choice, usage = reply.choices[0], reply.usage
            first = choice.logprobs.content[0] if choice.logprobs and choice.logprobs.content else None
            if request.get("logprobs") and not (first and first.top_logprobs):
                raise EndpointError(
                    "no token probabilities come with its answers; use judge.grade, or a local model"
                )
            answer = {
                "text": choice.message.content or "",
                "tokens": [usage.prompt_tokens, usage.completion_tokens] if usage else [0, 0],
                "first": first.token if first else "",
                "top": {t.token: math.exp(t.logprob) for t in first.top_logprobs} if first else {},
            }
        with self._lock:
            store.append_lines(Path(self.kept), [{"key": key, **answer}])
        return answer

    def _create(self, client: openai.OpenAI, request: dict):
        """The server's reply. A parameter that it says this model does not take is left out from then on, and
        max_tokens goes by its newer name."""
        while True:
            sent = {k: v for k, v in request.items() if k not in self._refused}
            if "max_tokens" in self._refused:
                sent["max_completion_tokens"] = request["max_tokens"]
            try:
                return client.chat.completions.create(model=self.model, **sent)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                quoted = re.findall(r"['\"`](\w+)['\"`]", str(error.message))
                named = [p for p in OPTIONAL if p in sent and p in quoted]
                if not named:
                    raise
                with self._lock:
                    if named[0] not in self._refused and named[0] != "max_tokens":
                        print(f"{self.model} does not take {named[0]}: it answers with its own")
                    self._refused.add(named[0])


def _read(path: Path) -> dict[str, dict]:
    """Kept answers by key."""
    rows = store.read_lines(Path(path))
    if any(not isinstance(r, dict) or not {"key", "text", "tokens", "first", "top"} <= set(r) for r in rows):
        raise EndpointError(f"{path} is no file of kept answers; give another place to keep them")
    return {r.pop("key"): r for r in rows}


def _explained(error: Exception, endpoint: Endpoint) -> str:
    """What went wrong, without the key."""
    return _said(error, endpoint).replace(os.environ.get(endpoint.key) or "\0", "***")


def _said(error: Exception, endpoint: Endpoint) -> str:
    if isinstance(error, openai.AuthenticationError):
        return f"the key in {endpoint.key} was not accepted"
    if isinstance(error, openai.APITimeoutError):
        return f"no answer within {endpoint.timeout:g} seconds" + (
            f", {endpoint.retries + 1} times" if endpoint.retries else ""
        )
    if isinstance(error, openai.APIConnectionError):
        return "cannot be reached; is the address right, and does the server run?"
    if isinstance(error, openai.APIStatusError):
        return f"status {error.status_code}: {str(error.message)[:300]}"
    if isinstance(error, NO_ANSWER):
        return (
            f"what came back is no answer of an OpenAI-compatible API ({type(error).__name__}); does "
            "the address end in /v1?"
        )
    return str(error)[:300]
