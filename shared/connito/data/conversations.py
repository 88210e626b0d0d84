"""Conversations in the shapes in which people publish them, as the messages that a chat template takes."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons

ASSISTANT = "assistant"
_ROLES = {
    "user": "user", "human": "user", "prompter": "user",
    ASSISTANT: ASSISTANT, "gpt": ASSISTANT, "chatgpt": ASSISTANT, "bing": ASSISTANT, "bard": ASSISTANT, "model": ASSISTANT,
    "bot": ASSISTANT, "function_call": ASSISTANT,
    "system": "system", "developer": "developer",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool", "ipython": "tool",
}  # fmt: skip
_LISTS = ("messages", "conversations", "conversation", "dialogue", "dialog", "chat_messages")
# What is asked, and the answer. Of two rows that fit, the first is taken.
_PAIRS = (
    ("prompt", "completion"), ("instruction", "output"), ("instruction", "response"), ("query", "response"),
    ("question", "answer"), ("prompt", "response"), ("question", "response"), ("instruction", "answer"), ("input", "output"),
)  # fmt: skip
# What a question is about.
_ABOUT = ("input", "context")
_SYSTEM = ("system", "system_prompt")
_ROLE, _CONTENT = ("role", "from", "sender", "speaker"), ("content", "value", "text")
# Longest list in Python's notation, in characters: its parser takes a hundred times the memory.
_LONGEST = 1 << 20


@dataclass(frozen=True)
class Conversation:
    """Messages as chat templates take them, `role` and `content` at least, and the tools that the assistant may call.

    `silent`: places of messages of the assistant that are not to be learned.
    """

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    silent: list[int] = field(default_factory=list)

    @property
    def text(self) -> str:
        """Return what was said, without the instructions of the system, which many conversations share."""
        said = (message["content"] or _calls(message) for message in self.messages)
        shown = zip(self.messages, said, strict=True)
        return "\n\n".join(part for message, part in shown if message["role"] not in ("system", "developer"))

    def to_json(self) -> str:
        """Return the conversation as one JSON object."""
        return json.dumps(vars(self), ensure_ascii=False, default=str)

    @classmethod
    def from_json(cls, text: str) -> Conversation:
        """Return the inverse of `to_json`."""
        return cls(**json.loads(text))


def conversation_of(row: Mapping[str, Any]) -> Conversation | None:
    """Return the conversation in a row's fields; None for a row that holds none, or a `text` to take instead.

    Known are lists of messages (`messages`, `conversations`), prompt and completion, each a text or messages, and question
    and answer under their usual names. Raises `Invalid`, as words to put behind "rows with", for one that cannot be used.
    """
    row = {str(name).lower(): value for name, value in row.items()}
    for name in _LISTS:
        listed = _list(row.get(name))
        if listed is not None:
            return _checked(_system(row) + _messages(listed), row)
        if _like_objects(row.get(name)):
            raise _unusable(f"{name} that are neither JSON nor a list of Python")
    if isinstance(row.get("mapping"), Mapping) and isinstance(row.get("current_node"), str):
        return _checked(_exported(row), row)
    if isinstance(row.get("text"), str):
        return None
    if any(name in row and not row[name] for name in _LISTS):
        raise _unusable("no messages")
    for asked, answer in _PAIRS:
        if asked in row and answer in row:
            return _checked(_system(row) + _history(row) + _pair(row, asked, answer), row)
    return None


def _list(value: Any) -> list[Any] | None:
    """Return a list of objects, such as messages or tools, also one that a table holds as JSON or as Python writes it, or as
    an object of lists."""
    value = _written(value)
    if isinstance(value, Mapping) and value and all(isinstance(inner, (list, tuple)) for inner in value.values()):
        lengths = set(map(len, value.values()))
        value = (
            [dict(zip(value, cells, strict=True)) for cells in zip(*value.values(), strict=True)]
            if len(lengths) == 1
            else None
        )
    fits = isinstance(value, (list, tuple)) and all(isinstance(entry, Mapping) for entry in value)
    return list(value) if fits else None


def _written(value: Any) -> Any:
    """Return what a text that begins as a list says, where it is one; any other value as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    with suppress(ValueError, RecursionError):
        return json.loads(value)
    if len(value) <= _LONGEST:
        # pandas writes a column of lists so.
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return ast.literal_eval(value.strip())
    return value


def _like_objects(value: Any) -> bool:
    return isinstance(value, str) and value.lstrip()[:1] == "[" and value.lstrip()[1:].lstrip()[:1] == "{"


def _messages(listed: list[Any]) -> list[dict[str, Any]]:
    return [_message(entry) for entry in listed]


def _message(entry: Mapping[str, Any]) -> dict[str, Any]:
    role = _first(entry, _ROLE)
    known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
    if known is None:
        raise _unusable(f"a message of the unknown role {role!r}"[:100])
    content = _first(entry, _CONTENT)
    # Whatever else a message has, its thoughts for example, is the template's to read.
    kept = {name: value for name, value in entry.items() if value and name not in (*_ROLE, *_CONTENT, "weight")}
    if call := kept.pop("function_call", None):
        kept.setdefault("tool_calls", [{"type": "function", "function": call}])
    if calls := kept.get("tool_calls"):
        kept["tool_calls"] = [calls] if isinstance(calls, Mapping) else _list(calls)
        if not kept["tool_calls"]:
            raise _unusable("calls of tools that are no list of objects")
    if content is None and not kept.get("tool_calls"):
        raise _unusable("a message without content")
    message = {**kept, "role": known, "content": "" if content is None else _text(content, known)}
    if entry.get("weight") == 0:
        message["weight"] = 0
    return message


def _exported(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was said on the way to the current node of a tree of turns, as ChatGPT exports a conversation."""
    nodes, place = row["mapping"], row["current_node"]
    found: list[dict[str, Any]] = []
    for _ in nodes:
        node = _object(nodes.get(place))
        said = _object(node.get("message"))
        if said:
            content = _object(said.get("content")).get("parts") or ""
            found.append({"role": _object(said.get("author")).get("role"), "content": content})
        if not isinstance(place := node.get("parent"), str):
            break
    turns = [_message(turn) for turn in reversed(found)]
    # Of the tools of its own that an export has, nobody else has the descriptions.
    return [turn for turn in turns if turn["content"].strip() and turn["role"] != "tool"]


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _first(entry: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    return next((entry[name] for name in names if entry.get(name) is not None), None)


def _calls(message: Mapping[str, Any]) -> str:
    return json.dumps(message["tool_calls"], default=str) if message.get("tool_calls") else ""


def _text(content: Any, role: str) -> str:
    """Return a message's content as text: a text, a list of parts that are texts, or what a tool answered, as JSON."""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)):
        return "".join(map(_part, content))
    if isinstance(content, Mapping) and role != "tool":
        return _part(content)
    return json.dumps(content, ensure_ascii=False, default=str)


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
    if (
        not isinstance(part, Mapping)
        or not isinstance(part.get("text"), str)
        or kind not in ("text", "input_text", "output_text")
    ):
        raise _unusable(f"content of the type {kind!r}")
    return str(part["text"])


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    said = next(
        (_text(row[name], "system") for name in _SYSTEM if row.get(name) and not isinstance(row[name], (int, float))),
        "",
    ).strip()
    return [{"role": "system", "content": said}] if said else []


def _history(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    turns = _written(row.get("history"))
    if not turns:
        return []
    if (listed := _list(turns)) is not None:
        return _messages(listed)
    found: list[dict[str, Any]] = []
    for turn in turns if isinstance(turns, (list, tuple)) else (turns,):
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(said, str) for said in turn):
            raise _unusable("a history that is neither pairs of texts nor messages")
        found += [{"role": "user", "content": turn[0]}, {"role": ASSISTANT, "content": turn[1]}]
    return found


def _pair(row: Mapping[str, Any], asked: str, answer: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for name, role in ((asked, "user"), (answer, ASSISTANT)):
        listed = _list(row[name])
        found += _messages(listed) if listed is not None else [{"role": role, "content": _plain(row[name], name)}]
    for about in _ABOUT:
        more = _about(row.get(about), about) if about != asked else ""
        if more.strip() and found[0]["role"] == "user":
            found[0]["content"] = "\n\n".join(filter(None, (found[0]["content"], more)))
    return found


def _about(value: Any, name: str) -> str:
    texts = value if isinstance(value, (list, tuple)) else [value]
    return "\n".join(_plain(text, name) for text in texts)


def _plain(value: Any, name: str) -> str:
    if value is None:
        return ""
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if not isinstance(value, (str, int, float)):
        raise _unusable(f"a field {name!r} that is no text")
    return str(value)


def _checked(messages: list[dict[str, Any]], row: Mapping[str, Any]) -> Conversation:
    if len(messages) > 1 and messages[0]["role"] == messages[1]["role"] == "system":
        messages = messages[1:]
    silent = [
        place
        for place, message in enumerate(messages)
        if message["role"] == ASSISTANT
        and (message.get("weight") == 0 or not (message["content"].strip() or message.get("tool_calls")))
    ]
    answers = [place for place, message in enumerate(messages) if message["role"] == ASSISTANT and place not in silent]
    for message in messages:
        message.pop("weight", None)
    if not answers:
        raise _unusable("no answer of an assistant")
    # What comes behind the last answer cannot be learned from.
    messages = messages[: answers[-1] + 1]
    silent = [place for place in silent if place < len(messages)]
    return Conversation(messages, _list(row.get("tools")) or None, silent)


def _unusable(what: str) -> Invalid:
    return Invalid(what, reason=reasons.REASON_BAD_SPEC)
