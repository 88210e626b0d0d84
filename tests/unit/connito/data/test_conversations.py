"""Conversations in the shapes in which people publish them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from connito.data.conversations import Conversation, conversation_of
from connito.errors import Invalid

ASKED, ANSWERED = {"role": "user", "content": "why?"}, {"role": "assistant", "content": "because"}
TURNS = [ASKED, ANSWERED]
SHAPES: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ({"messages": TURNS}, TURNS),
    "messages beside a text": ({"messages": TURNS, "text": "User: why? …", "prompt": "why?"}, TURNS),
    "messages as JSON in a table": ({"messages": json.dumps(TURNS)}, TURNS),
    "another case of letters": ({"Messages": TURNS}, TURNS),
    "sharegpt": ({"conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}]}, TURNS),
    "sharegpt with a system field": (
        {
            "system": "Be kind.",
            "conversations": [{"from": "human", "value": "why?"}, {"from": "gpt", "value": "because"}],
        },
        [{"role": "system", "content": "Be kind."}, *TURNS],
    ),
    "prompt and completion": ({"prompt": "why?", "completion": "because"}, TURNS),
    "prompt and completion as messages": ({"prompt": [ASKED], "completion": [ANSWERED]}, TURNS),
    "a prompt of messages, a completion of text": ({"prompt": [ASKED], "completion": "because"}, TURNS),
    "alpaca": ({"instruction": "why?", "input": "", "output": "because"}, TURNS),
    "alpaca with input": (
        {"instruction": "Translate.", "input": "warum?", "output": "why?"},
        [{"role": "user", "content": "Translate.\n\nwarum?"}, {"role": "assistant", "content": "why?"}],
    ),
    "alpaca with history": (
        {"instruction": "and?", "input": "", "output": "so", "history": [["why?", "because"]]},
        [*TURNS, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "so"}],
    ),
    "dolly": (
        {"instruction": "why?", "context": "it rains", "response": "because"},
        [{"role": "user", "content": "why?\n\nit rains"}, ANSWERED],
    ),
    "instruction and output without input": ({"instruction": "why?", "output": "because"}, TURNS),
    "instruction, input and response": (
        {"instruction": "why?", "input": "it rains", "response": "because"},
        [{"role": "user", "content": "why?\n\nit rains"}, ANSWERED],
    ),
    "a question about something": (
        {"question": "why?", "context": ["it rains", "it pours"], "answer": "because"},
        [{"role": "user", "content": "why?\n\nit rains\nit pours"}, ANSWERED],
    ),
    "only what it is about": ({"instruction": "", "input": "why?", "output": "because"}, TURNS),
    "messages as pandas writes them": ({"messages": str(TURNS)}, TURNS),
    "messages as an object of lists": (
        {"messages": {"role": ["user", "assistant"], "content": ["why?", "because"]}},
        TURNS,
    ),
    "history as messages": (
        {"instruction": "and?", "output": "so", "history": json.dumps(TURNS)},
        [*TURNS, {"role": "user", "content": "and?"}, {"role": "assistant", "content": "so"}],
    ),
    "a system's word in parts": (
        {"system": [{"type": "text", "text": "Be kind."}], "messages": TURNS},
        [{"role": "system", "content": "Be kind."}, *TURNS],
    ),
    "senders and texts": (
        {"chat_messages": [{"sender": "human", "text": "why?"}, {"sender": "assistant", "text": "because"}]},
        TURNS,
    ),
    "thoughts": (
        {"messages": [{**ASKED, "thinking": None}, {**ANSWERED, "thinking": "rain"}]},
        [ASKED, {**ANSWERED, "thinking": "rain"}],
    ),
    "a call as it was written at first": (
        {
            "messages": [
                ASKED,
                {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}},
            ]
        },
        [
            ASKED,
            {
                "role": "assistant",
                "content": "",
                "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
            },
        ],
    ),
    "calls as JSON": (
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": '[{"function": {"name": "f"}}]'}]},
        [ASKED, {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}],
    ),
    "a tree of turns": (
        {
            "title": "Rain",
            "current_node": "c",
            "mapping": {
                "a": {"parent": None, "message": None},
                "b": {"parent": "a", "message": {"author": {"role": "user"}, "content": {"parts": ["why?"]}}},
                "x": {"parent": "b", "message": {"author": {"role": "assistant"}, "content": {"parts": ["no"]}}},
                "c": {"parent": "b", "message": {"author": {"role": "assistant"}, "content": {"parts": ["because"]}}},
            },
        },
        TURNS,
    ),
    "query and response": ({"query": "why?", "response": "because"}, TURNS),
    "question and answer": ({"question": "why?", "answer": "because"}, TURNS),
    "parts of text": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "wh"}, {"type": "text", "text": "y?"}]},
                ANSWERED,
            ]
        },
        TURNS,
    ),
    "what comes after the last answer": ({"messages": [*TURNS, {"role": "user", "content": "thanks"}]}, TURNS),
    "a system message twice": (
        {"system": "A.", "messages": [{"role": "system", "content": "B."}, *TURNS]},
        [{"role": "system", "content": "B."}, *TURNS],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_a_conversation_is_known_by_its_fields(name: str) -> None:
    row, want = SHAPES[name]
    found = conversation_of(row)
    assert found is not None
    assert found.messages == want
    assert Conversation.from_json(found.to_json()) == found


@pytest.mark.parametrize(
    "row",
    [
        {"text": "why? because"}, {"text": "a", "question": "why?", "answer": "b"}, {"title": "x", "body": "y"},
        {"messages": "none"}, {}, {"mapping": {}, "text": "why?"}, {"mapping": {"a": 1}, "current_node": ["a"]},
    ],
)  # fmt: skip
def test_other_rows_are_none(row: dict[str, Any]) -> None:
    assert conversation_of(row) is None


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"messages": [ASKED]}, "no answer of an assistant"),
        ({"messages": []}, "no answer of an assistant"),
        ({"messages": None}, "no messages"),
        ({"messages": [{"role": "wizard", "content": "x"}, ANSWERED]}, "unknown role 'wizard'"),
        ({"messages": [{"content": "x"}]}, "unknown role None"),
        ({"messages": [{"role": "user"}, ANSWERED]}, "message without content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, ANSWERED]}, "type 'image_url'"),
        ({"messages": "[{'role': 'user'} {'role': 'assistant'}]"}, "messages that are neither JSON"),
        ({"messages": [{"role": "user", "content": {"parts": ["why?"]}}, ANSWERED]}, "content of the type"),
        ({"instruction": "a", "output": "b", "history": "c"}, "a history that is neither"),
        ({"mapping": {"a": {"parent": "a", "message": None}}, "current_node": "a"}, "no answer of an assistant"),
        ({"mapping": {"a": {"message": {"author": "x", "content": "y"}}}, "current_node": "a"}, "unknown role None"),
        ({"mapping": {"a": {"message": "x", "parent": ["a"]}}, "current_node": "a"}, "no answer of an assistant"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": "find(x)"}]}, "calls of tools that are no list"),
        ({"prompt": "why?", "completion": None}, "no answer of an assistant"),
        ({"question": {"a": 1}, "answer": "b"}, "'question' that is no text"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_says_why(row: dict[str, Any], why: str) -> None:
    with pytest.raises(Invalid, match=why):
        conversation_of(row)


def test_tools_calls_and_silent_answers_come_along() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "x"}}}
    messages = [
        ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "found"},
        {"role": "assistant", "content": "there", "weight": 0},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "so", "weight": 1},
    ]
    found = conversation_of({"messages": messages, "tools": json.dumps([{"type": "function"}])})
    assert found is not None
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}
    assert found.silent == [3]
    assert found.tools == [{"type": "function"}]
    assert all("weight" not in message for message in found.messages)


def test_an_empty_turn_is_no_text() -> None:
    found = conversation_of({"instruction": "", "output": "because"})
    assert found is not None
    assert found.text.strip() == "because"


def test_an_empty_answer_is_not_learned() -> None:
    found = conversation_of({"messages": [ASKED, {"role": "assistant", "content": " "}, *TURNS]})
    assert found is not None
    assert found.silent == [1]


def test_what_many_conversations_share_is_not_their_text() -> None:
    """Else all of them would be near-duplicates of one another."""
    system = {"role": "system", "content": "You are an assistant. " * 50}
    found = conversation_of({"messages": [system, *TURNS]})
    assert found is not None
    assert found.text == "why?\n\nbecause"
