"""Chat templates at work, in a process of their own: a template is a stranger's program, if a small one.

It runs in the sandbox of transformers; this process bounds its memory, and whoever started it its time. Requests and answers
are lines of JSON. Where the template marks the assistant's part itself (`{% generation %}`), its marks are taken; else the
part is found by rendering the conversation with one answer replaced, and by rendering it up to each answer.
"""

from __future__ import annotations

import datetime
import json
import re
import resource
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

# What a template may take beside what this process has at its start, and make of a conversation.
_MEMORY, _TIMES, _AT_LEAST = 1 << 30, 16, 1 << 20
# A template that writes the date writes this one: the same job gives the same corpora on every day.
_DATE = datetime.datetime(2025, 1, 1, tzinfo=datetime.UTC)
# A token of a template that this tokenizer does not have: characters that mean the end all the same.
_CONTROL = re.compile(r"<[|｜][^<>\n]{1,60}[|｜]>")
_UNCLEAR = "it does not show where the assistant speaks"
_STAND_IN = "\U000f00f0connito{}\U000f00f1"
# Answers for which a prompt is rendered; what stands between prompt and answer stands there in the others too.
_PROMPTS = 16

# Messages, and whether to end as a prompt for the assistant ends -> text.
Render = Callable[[Sequence[Mapping[str, Any]], bool], str]
Span = tuple[int, int]


def serve(requests: BinaryIO, answers: BinaryIO) -> None:
    """Answer requests until they end. The first is `{template, special, ends}`: the source, the named special tokens, and the
    spellings that may end a turn. The others are conversations.
    """
    about = json.loads(requests.readline())
    try:
        compiled = _compiled(about["template"])
    except Exception as error:
        _answer(answers, {"error": _said(error)})
        return
    _answer(answers, {})
    for line in requests:
        try:
            text, spans = _rendered(about, compiled, json.loads(line))
            _answer(answers, {"text": text, "spans": spans})
        except MemoryError:
            _answer(answers, {"error": "it needs too much memory"})
        except Exception as error:
            _answer(answers, {"error": _said(error)})


def _compiled(template: str) -> bool:
    """Compile a template, give it a date that stands still, and return whether it marks the assistant's part."""
    from transformers.utils import chat_template_utils as utils

    # Before anything of the template is looked at: Jinja computes constants when it compiles.
    _bound_memory()
    utils._compile_jinja_template(template).environment.globals["strftime_now"] = _DATE.strftime
    return "endgeneration" in template


def _rendered(about: Mapping[str, Any], marks: bool, asked: Mapping[str, Any]) -> tuple[str, list[Span]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    messages, silent = asked["messages"], set(asked["silent"])
    most = _TIMES * len(json.dumps(asked)) + _AT_LEAST

    def render(part: Sequence[Mapping[str, Any]], prompt: bool, tracked: bool = False) -> tuple[str, list[Span]]:
        texts, spans = render_jinja_template(
            [list(part)], asked["tools"], chat_template=about["template"], return_assistant_tokens_mask=tracked,
            add_generation_prompt=prompt, **about["special"],
        )  # fmt: skip
        if len(texts[0]) > most:
            raise ValueError("it makes far more of a conversation than was said")
        return texts[0], [tuple(span) for span in spans[0]] if tracked else []

    if marks:
        text, spans = render(messages, False, True)
        answers = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
        if silent and len(spans) != len(answers):
            raise ValueError("it does not show which answer is which")
        if spans:
            return text, [
                span for place, span in zip(answers, spans, strict=False) if place not in silent
            ] if silent else spans
    return located(lambda part, prompt: render(part, prompt)[0], messages, silent, about["ends"])


def located(
    render: Render, messages: Sequence[Mapping[str, Any]], silent: set[int], ends: Sequence[str]
) -> tuple[str, list[Span]]:
    """Return a conversation as the template lays it out, and where in it the assistant speaks, turns' ends included.

    A turn begins where a prompt for the assistant would end. Raises `ValueError` where a turn cannot be told for sure.
    """
    text = render(messages, False)
    places = [place for place, message in enumerate(messages) if message["role"] == "assistant" and place not in silent]
    replaced = _all_replaced(render, messages, places, text)
    found: list[tuple[int | None, int, int]] = []
    for count, place in enumerate(places):
        span = replaced.get(place) or _replaced(render, messages, place, text)
        known = span is not None and count >= _PROMPTS
        prompt = None if known else _prompt(render, messages[:place], text)
        if span is not None:
            start, end = span[0], _with_end(text, span[1], ends)
            prompt = prompt if prompt is not None and prompt <= start else None
        else:
            start, end = _grown(render, messages, place, text, prompt, ends)
        if found and (start < found[-1][2] or (prompt is not None and prompt < found[-1][2])):
            raise ValueError(_UNCLEAR)
        found.append((prompt, start, end))
    # Between prompt and answer stands the same everywhere: where it is not known, as where it is.
    lead = next((text[prompt:start] for prompt, start, _ in found if prompt is not None), "")
    spans = []
    for prompt, start, end in found:
        before = len(lead) if prompt is None and text.endswith(lead, 0, start) else 0
        spans.append((start - before if prompt is None else prompt, end))
    return text, spans


def _all_replaced(
    render: Render, messages: Sequence[Mapping[str, Any]], places: Sequence[int], text: str
) -> dict[int, Span]:
    """Return where the answers stand, found with all of them replaced at once; nothing where it is not as clear as that."""
    said = [place for place in places if _replaceable(messages[place])]
    others = {place: {**messages[place], "content": _STAND_IN.format(place)} for place in said}
    try:
        rest = render([others.get(place, message) for place, message in enumerate(messages)], False)
    except Exception:
        return {}
    found: dict[int, Span] = {}
    at = 0
    for place in said:
        before, stands, rest = rest.partition(_STAND_IN.format(place))
        content = str(messages[place]["content"])
        if not stands or not text.startswith(before, at):
            return {}
        at += len(before)
        content = content if text.startswith(content, at) else content.strip()
        if not text.startswith(content, at):
            return {}
        found[place] = at, at + len(content)
        at += len(content)
    return found if text[at:] == rest else {}


def _replaceable(message: Mapping[str, Any]) -> bool:
    # What calls a tool says more than its content.
    return bool(str(message.get("content") or "").strip()) and not message.get("tool_calls")


def _replaced(render: Render, messages: Sequence[Mapping[str, Any]], place: int, text: str) -> Span | None:
    """Return where an answer stands: what is before and behind stays as it is when the answer is another."""
    if not _replaceable(messages[place]):
        return None
    stand_in = _STAND_IN.format(place)
    other = [*messages[:place], {**messages[place], "content": stand_in}, *messages[place + 1 :]]
    try:
        before, found, behind = render(other, False).partition(stand_in)
    except Exception:
        return None
    fits = found and stand_in not in behind and len(before) + len(behind) <= len(text)
    if not fits or not text.startswith(before) or not text.endswith(behind):
        return None
    return len(before), len(text) - len(behind)


def _grown(
    render: Render,
    messages: Sequence[Mapping[str, Any]],
    place: int,
    text: str,
    prompt: int | None,
    ends: Sequence[str],
) -> Span:
    """Return what an answer adds to the conversation before it, its end included. Raises `ValueError` where it is unclear."""
    try:
        upto = render(messages[: place + 1], False)
    except Exception as error:
        raise ValueError(_UNCLEAR) from error
    end = len(upto.rstrip())
    if prompt is None or not text.startswith(upto) or end <= prompt:
        raise ValueError(_UNCLEAR)
    closed = upto.rstrip().endswith(tuple(ends)) or any(
        found.end() == end for found in _CONTROL.finditer(upto, prompt, end)
    )
    return prompt, end if closed else _with_end(text, end, ends)


def _prompt(render: Render, before: Sequence[Mapping[str, Any]], text: str) -> int | None:
    """Return where a prompt for the assistant ends, if the conversation begins with it.

    A template that does not care to make one may have a header for the assistant: then nobody can say.
    """
    try:
        prompt, bare = render(before, True), render(before, False)
    except Exception:
        return None
    if not text.startswith(prompt):
        return None
    header = _CONTROL.match(text[len(prompt) :].lstrip())
    return None if prompt == bare and header else len(prompt)


def _with_end(text: str, end: int, ends: Sequence[str]) -> int:
    """Return the end of a turn together with the token that stands right behind it."""
    behind = text[end:].lstrip()
    token = next((token for token in ends if behind.startswith(token)), "")
    if not token and (like := _CONTROL.match(behind)):
        token = like[0]
    return len(text) - len(behind) + len(token) if token else end


def _said(error: BaseException) -> str:
    """Return the first line of what a template or Jinja said, bounded."""
    line = str(error).strip().splitlines()
    return (line[0] if line else type(error).__name__)[:200]


def _answer(answers: BinaryIO, content: Mapping[str, Any]) -> None:
    answers.write(json.dumps(content).encode() + b"\n")
    answers.flush()


def _bound_memory() -> None:
    """Keep this process from taking much more memory than it has, where the system can say how much that is."""
    with suppress(OSError, ValueError):
        most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + _MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


if __name__ == "__main__":
    serve(sys.stdin.buffer, sys.stdout.buffer)
