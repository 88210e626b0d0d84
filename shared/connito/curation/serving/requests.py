"""Requests to the server, as OpenAI's interface writes them, and what is refused of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from connito.curation.serving.errors import RefusedError

MAX_SEQUENCES, MAX_LIKELIEST = 32, 5
_STEPS = ("content", "role", "type", "text")
Text = Annotated[str, Field(max_length=1 << 22)]
Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


def _stops(given: object) -> object:
    return [given] if isinstance(given, str) else [] if given is None else given


def _prompts(given: object) -> object:
    """Return one prompt, a text or a list of ids, as the list of prompts that it may be too."""
    one = isinstance(given, str) or (isinstance(given, list) and all(type(entry) is int for entry in given))
    return [given] if one and given != [] else given


class _Request(BaseModel):
    """Fields that both endpoints take. Others are looked at by `_unsupported`, or mean nothing to a model."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)

    model: Annotated[str, Field(max_length=1024)]
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_SEQUENCES)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=256)]], Field(max_length=4), BeforeValidator(_stops)
    ] = []
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None

    def with_usage(self) -> bool:
        """Return whether a stream ends with the number of its tokens."""
        return bool((self.stream_options or {}).get("include_usage"))


class _Part(BaseModel):
    model_config = ConfigDict(extra="allow")

    type: Literal["text"]
    text: Text


class _Message(BaseModel):
    model_config = ConfigDict(extra="ignore")

    role: Annotated[str, Field(max_length=32)]
    content: Text | list[_Part]

    def plain(self) -> dict[str, str]:
        """Return the message as chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[_Message], Field(min_length=1, max_length=4096)]
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None

    def limit(self) -> int | None:
        """Return the most tokens of an answer, if said."""
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(_Request):
    """POST /v1/completions: a text, token ids, or several of one kind.

    With `echo` and `logprobs` the prompt's own tokens are scored, beside `logprobs` of the likeliest in their places; at most
    one token, the likeliest, comes after them.
    """

    prompt: Annotated[list[Text | Ids], Field(min_length=1), BeforeValidator(_prompts)]
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LIKELIEST)] | None = None

    def limit(self) -> int | None:
        """Return the most tokens of an answer: 16 where the request does not say, as in the interface."""
        return 16 if self.max_tokens is None else self.max_tokens

    def scores(self) -> bool:
        """Return whether the prompt is to be scored. Raises `RefusedError` for what is neither that nor an answer."""
        if not self.echo and self.logprobs is None:
            if self.max_tokens == 0:
                raise RefusedError(400, "max_tokens: an answer has at least one token", param="max_tokens")
            return False
        if not self.echo or self.logprobs is None or self.limit() > 1 or (self.n or 1) > 1 or self.stream:  # type: ignore[operator]
            raise RefusedError(
                400, "this server does echo and logprobs together, with max_tokens 0 or 1, one n and no stream: they score the "
                "prompt; leave them out for an answer", code="unsupported_parameter", param="echo" if self.echo else "logprobs",
            )  # fmt: skip
        return True


R = TypeVar("R", ChatRequest, CompletionRequest)


@dataclass(frozen=True)
class Sampling:
    """The way next tokens are drawn. A temperature of 0 is the likeliest token; `top_k` 0 is all of them; the same `seed` and
    the same chances draw the same, none draws anew."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    seed: str = ""


def read_request(kind: type[R], document: object) -> R:
    """Check a request. Raises `RefusedError` naming the first thing that is wrong or that this server does not do."""
    try:
        asked = kind.model_validate(document)
    except ValidationError as error:
        # Of what a value may be, the one that it came closest to says most.
        first = max(error.errors(include_input=False, include_url=False), key=lambda found: len(found["loc"]))
        if not first["loc"]:
            raise RefusedError(400, "the request is no JSON object") from error
        # Names and numbers lead to the value; what a value may be, they do not.
        where = [
            str(step) for step in first["loc"] if isinstance(step, int) or step in _STEPS or step == first["loc"][0]
        ]
        raise RefusedError(400, f"{'.'.join(where)}: {first['msg'].lower()}", param=where[0]) from error
    for name, value in (asked.model_extra or {}).items():
        if _unsupported(name, value):
            raise RefusedError(
                400, f"this server does not do {name}; leave it out", code="unsupported_parameter", param=name
            )
    return asked


# Of OpenAI's interface, and what other servers add to it, that would change the answer.
_NOT_DONE = {
    "logprobs", "top_logprobs", "tools", "functions", "logit_bias", "suffix", "echo", "frequency_penalty",
    "presence_penalty", "audio", "prediction", "min_p", "typical_p", "min_tokens", "ignore_eos", "stop_token_ids",
    "bad_words", "use_beam_search", "prompt_logprobs", "structured_outputs", "allowed_token_ids", "grammar",
}  # fmt: skip


def _unsupported(name: str, value: Any) -> bool:
    if name in _NOT_DONE or name.startswith("guided_"):
        return bool(value)
    if name == "response_format":
        return value not in (None, {"type": "text"})
    return name in ("best_of", "repetition_penalty", "length_penalty") and value not in (None, 1)


def sequences(asked: _Request, prompts: Sequence[object]) -> int:
    """Return how many answers a request wants. Raises `RefusedError` for more than one request may."""
    wanted = len(prompts) * (asked.n or 1)
    if wanted > MAX_SEQUENCES:
        raise RefusedError(
            400, f"{wanted} answers in one request are too many: ask for at most {MAX_SEQUENCES}", param="n"
        )
    return wanted
