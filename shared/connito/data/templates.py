"""Conversations as documents: laid out by the tokenizer's own chat template, with the assistant's part marked."""

from __future__ import annotations

import codecs
import json
import select
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from connito.data.conversations import Conversation
from connito.data.encoding import encoder_of
from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

PLAIN_WORDS = "plain words"
# Where a tokenizer has no template: who speaks in words, a token at the end of each answer.
PLAIN = (
    "{% for message in messages %}"
    "{% if message.role == 'assistant' %}Assistant: {% generation %}{{ message.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message.role.capitalize() }}: {{ message.content }}{% endif %}"
    "{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endfor %}"
)
# Seconds that one conversation may take, and conversations that may take longer before the template is given up: three, and
# one more for every hundred that did not.
_SECONDS, _SLOW, _SLOW_AMONG = 20.0, 3, 100
_STARTING_SECONDS = 120.0
# Reasons that are told apart; a template may make one of each conversation.
_REASONS = 50
_LINE, _MAX_TEMPLATE = 1 << 28, 1 << 20


@dataclass
class Laid:
    """Numbers of what was laid out. `skipped` counts conversations by reason; `read` and `learned` are tokens."""

    template: str = ""
    conversations: int = 0
    read: int = 0
    learned: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


class Templates:
    """A tokenizer's chat template, ready to lay out conversations. Closing it ends its process."""

    def __init__(self, tokenizer: Any, chosen: str = "", seconds: float = _SECONDS) -> None:
        """Take the template of that name, or that source where `chosen` is one; without a template, `PLAIN`."""
        self._tokenizer, self._encoder, self._seconds = tokenizer, encoder_of(tokenizer), seconds
        self._chosen, self._running = chosen, dict[str, _Process]()
        self._slow = 0
        self.laid = Laid()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self._running.values():
            process.close()
        self._running.clear()

    def document(self, conversation: Conversation) -> tuple[list[int], list[bool]] | None:
        """Return a conversation's token ids, and which of them the assistant says; None, counted, where it does not go.

        Raises `Invalid` for a template that is none, or of a name that the tokenizer does not have.
        """
        source, plain = self._source(conversation)
        try:
            text, spans = self._render(source, conversation)
        except _RefusedError as error:
            self._skip(str(error))
            return None
        ids, marks = self._encoder.marked(text, spans)
        if not any(marks):
            self._skip("the template leaves the assistant's part out")
            return None
        front, behind = self._encoder.around
        if plain:
            ids, marks = [*front, *ids], [*[False] * len(front), *marks]
        if not text.rstrip().endswith(tuple(self._encoder.reserved)):
            # Nothing of the template says that the answer is over.
            ids, marks = [*ids, *behind], [*marks, *[True] * len(behind)]
        self.laid.conversations += 1
        self.laid.read += len(ids)
        self.laid.learned += sum(marks)
        return ids, marks

    def _skip(self, why: str) -> None:
        known = why in self.laid.skipped or len(self.laid.skipped) < _REASONS
        self.laid.skipped[why if known else "the template refuses them for other reasons"] += 1

    def _source(self, conversation: Conversation) -> tuple[str, bool]:
        """Return the source of the template for a conversation, and whether it is the plain one."""
        known = self._tokenizer.chat_template
        if "{" in self._chosen:
            self.laid.template = "the job's template"
            return self._chosen, False
        if self._chosen and (not isinstance(known, dict) or self._chosen not in known):
            names = ", ".join(sorted(known)) if isinstance(known, dict) else "one without a name" if known else "none"
            raise _bad(
                f"the base has no chat template {self._chosen!r} (it has {names}); leave chat_template out, or name a file"
            )
        if not known:
            self.laid.template = PLAIN_WORDS
            return PLAIN, True
        if not isinstance(known, dict):
            self.laid.template = "the base's chat template"
            return str(known), False
        name = self._chosen or ("tool_use" if conversation.tools and "tool_use" in known else "default")
        if name not in known:
            raise _bad(f"the base has the chat templates {', '.join(sorted(known))}: say which, `chat_template: NAME`")
        self.laid.template = f"the base's chat template {name!r}"
        return str(known[name]), False

    def _render(self, source: str, conversation: Conversation) -> tuple[str, list[tuple[int, int]]]:
        if self._slow >= _SLOW + self.laid.conversations // _SLOW_AMONG:
            raise _RefusedError("the template is too slow")
        process = self._running.get(source)
        if process is None:
            process = self._running[source] = _Process(source, self._special(), self._ends())
        messages = self._protected(conversation.messages)
        asked = {"messages": messages, "tools": self._protected(conversation.tools), "silent": conversation.silent}
        try:
            answer = process.ask(asked, self._seconds)
            if (texts := _arguments(messages)) and not all(_written(text, answer.get("text", "")) for text in texts):
                read = process.ask(
                    {**asked, "messages": [_with_arguments(message) for message in messages]}, self._seconds
                )
                answer = read if "error" not in read else answer
        except TimeoutError as error:
            self._running.pop(source).close()
            self._slow += 1
            raise _RefusedError(f"the template takes longer than {self._seconds:g} seconds") from error
        except EOFError as error:
            self._running.pop(source).close()
            self._slow += 1
            raise _RefusedError("the template ends its process") from error
        if "error" in answer:
            raise _RefusedError(f"the template refuses them: {answer['error']}")
        text, spans = str(answer["text"]), [(int(start), int(end)) for start, end in answer["spans"]]
        return text, [(start, end) for start, end in spans if 0 <= start < end <= len(text)]

    def _special(self) -> dict[str, str]:
        named = self._tokenizer.special_tokens_map.items()
        return {name: str(token) for name, token in named if not isinstance(token, (list, tuple))}

    def _ends(self) -> list[str]:
        begins = self._tokenizer.bos_token if self._tokenizer.bos_token != self._tokenizer.eos_token else None
        return sorted((token for token in self._encoder.reserved if token != begins), key=len, reverse=True)

    def _protected(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._encoder.protected(value)
        if isinstance(value, Mapping):
            return {str(key): self._protected(inner) for key, inner in value.items()}
        if isinstance(value, (list, tuple)):
            return [self._protected(inner) for inner in value]
        return value


# Arguments of a call are JSON to those who publish conversations, and objects to most templates, which write them as JSON.
def _arguments(messages: list[dict[str, Any]]) -> list[str]:
    """Return the arguments that are JSON of an object."""
    calls = [call for message in messages for call in message.get("tool_calls") or () if isinstance(call, Mapping)]
    found = [call.get("function", call) for call in calls]
    texts = [function.get("arguments") for function in found if isinstance(function, Mapping)]
    return [text for text in texts if isinstance(text, str) and _object(text) is not None]


def _written(arguments: str, text: str) -> bool:
    """Return whether a template wrote arguments as they are, not as a text in quotes."""
    return arguments in text and f'"{arguments}"' not in text


def _with_arguments(value: Any) -> Any:
    """Return a message with the arguments of its calls as objects."""
    if isinstance(value, list):
        return [_with_arguments(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    nested = {name: _with_arguments(value[name]) for name in ("tool_calls", "function") if value.get(name)}
    read = _object(value.get("arguments"))
    return {**value, **nested, **({} if read is None else {"arguments": read})}


def _object(text: Any) -> dict[str, Any] | None:
    try:
        value = json.loads(text)
    except (TypeError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


class _RefusedError(Exception):
    """A conversation that a template does not lay out, with why."""


class _Process:
    """The process in which one template runs."""

    def __init__(self, template: str, special: Mapping[str, str], ends: list[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "connito.data.rendering"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            answer = self.ask({"template": template, "special": special, "ends": ends}, _STARTING_SECONDS)
        except (TimeoutError, EOFError) as error:
            self.close()
            raise _bad(
                "the chat template of the base cannot be read: its process ends; name another in chat_template"
            ) from error
        if "error" in answer:
            self.close()
            raise _bad(f"the chat template is not one: {answer['error']}; name another in chat_template")

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Return the answer. Raises `TimeoutError` after so many seconds, `EOFError` where the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as error:
            raise EOFError from error
        if not select.select([self._process.stdout], [], [], seconds)[0]:
            raise TimeoutError
        line = self._process.stdout.readline(_LINE)
        if not line.endswith(b"\n"):
            raise EOFError
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


def read_template(file: Path) -> str:
    """Return the template in a file. Raises `Invalid` for one that cannot be a template."""
    with file.open("rb") as opened:
        raw = opened.read(_MAX_TEMPLATE + 1)
    if len(raw) > _MAX_TEMPLATE or b"{" not in raw:
        raise _bad(f"{file} is no chat template: it has no field in braces, or more than {_MAX_TEMPLATE} bytes")
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return raw.decode("utf-16" if wide else "utf-8-sig", "replace")


def _bad(message: str) -> Invalid:
    return Invalid(message, reason=reasons.REASON_BAD_SPEC)
