"""What the assistant says, found in templates that do not mark it, is what transformers finds where they do."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from connito.data import rendering
from connito.data import templates as templates_module
from connito.data.conversations import Conversation
from connito.data.encoding import encoder_of
from connito.data.templates import PLAIN, PLAIN_WORDS, Templates
from connito.errors import Invalid

from tests.support.chat import BARE_TURNS, STYLES, byte_tokenizer, marked, piece_tokenizer, plain, slow_tokenizer

pytestmark = pytest.mark.slow
SYSTEM = {"role": "system", "content": "Be short."}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "who keeps it?"}, {"role": "assistant", "content": "the house"}],
    "several turns": [
        {"role": "user", "content": "who keeps it?"},
        {"role": "assistant", "content": " the house "},
        {"role": "user", "content": "the house?\n\n"},
        {"role": "assistant", "content": "the house"},
    ],
    "answers like what is asked": [
        {"role": "user", "content": "assistant\n"},
        {"role": "assistant", "content": "user\n\nassistant\nassistant"},
        {"role": "user", "content": "user\n\nassistant\nassistant"},
        {"role": "assistant", "content": "assistant"},
    ],
    "thoughts": [
        {"role": "user", "content": "a?"},
        {"role": "assistant", "content": "<think>who?</think>the house"},
        {"role": "user", "content": "b?"},
        {"role": "assistant", "content": "<think>what?</think>a ledger"},
    ],
}


class Here:
    """What a template's process does, in this one: starting one for each case takes most of the time."""

    def __init__(self, template: str, special: Mapping[str, str], ends: list[str]) -> None:
        self.about = {"template": template, "special": special, "ends": ends}

    def ask(self, request: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        marks = "endgeneration" in str(self.about["template"])
        text, spans = rendering._rendered(self.about, marks, request)
        return {"text": text, "spans": spans}

    def close(self) -> None: ...


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates_module, "_Process", Here)


def learned(
    tokenizer: Any, template: str, messages: list[dict[str, Any]], **options: Any
) -> tuple[list[int], list[bool]]:
    tokenizer.chat_template = template
    with Templates(tokenizer, **options) as templates:
        found = templates.document(Conversation(messages))
    assert found is not None, templates.laid.skipped
    return found


def by_transformers(tokenizer: Any, template: str, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool]]:
    tokenizer.chat_template = template
    out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True)
    return list(out["input_ids"]), [bool(mark) for mark in out["assistant_masks"]]


@pytest.fixture(scope="module", params=["bytes", "pieces"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    made = byte_tokenizer() if request.param == "bytes" else piece_tokenizer()
    made.bos_token = made.bos_token or "<|endoftext|>"
    return made


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("system", [False, True])
@pytest.mark.usefixtures("here")
def test_the_assistants_part_is_what_transformers_marks(tokenizer: Any, style: str, system: bool) -> None:
    if system and style == "model-turns":
        pytest.skip("it refuses a system, see below")
    for name, messages in CONVERSATIONS.items():
        messages = [SYSTEM, *messages] if system else messages
        ids, marks = by_transformers(tokenizer, marked(STYLES[style]), messages)
        for template in (plain(STYLES[style]), marked(STYLES[style])):
            found, mine = learned(tokenizer, template, messages)
            behind = encoder_of(tokenizer).around[1]
            ended = found == ids or found == [*ids, *behind]
            assert ended, (name, tokenizer.decode(found))
            said = [token for token, mark in zip(found[: len(ids)], mine, strict=False) if mark]
            want = [token for token, mark in zip(ids, marks, strict=True) if mark]
            assert tokenizer.decode(said) == tokenizer.decode(want), (name, template)
            assert mine[: len(ids)] == marks, (name, template)


@pytest.mark.usefixtures("here")
def test_a_tokenizer_that_says_no_places_finds_the_same() -> None:
    slow = slow_tokenizer()
    slow.bos_token = "<pad>"
    for style in STYLES.values():
        messages = CONVERSATIONS["several turns"]
        ids, mask = learned(slow, plain(style), messages)
        assert slow.decode([token for token, mark in zip(ids, mask, strict=True) if mark]).count("the house") == 2
        assert not mask[0]


@pytest.mark.usefixtures("here")
def test_the_next_speakers_token_ends_a_turn_where_nothing_else_does() -> None:
    made = byte_tokenizer()
    made.add_tokens(["<|user|>", "<|assistant|>"])
    ids, mask = learned(made, plain(BARE_TURNS), CONVERSATIONS["several turns"])
    said = made.decode([token for token, mark in zip(ids, mask, strict=True) if mark])
    assert said == " the house <|user|>the house<|endoftext|>"


@pytest.mark.usefixtures("here")
def test_without_a_template_the_conversation_is_in_plain_words() -> None:
    made = piece_tokenizer()
    made.chat_template = None
    with Templates(made) as templates:
        found = templates.document(Conversation([SYSTEM, *CONVERSATIONS["several turns"]]))
    assert found is not None
    ids, mask = found
    assert templates.laid.template == PLAIN_WORDS
    assert made.decode(ids).startswith("<s>")
    said = [token for token, mark in zip(ids, mask, strict=True) if mark]
    assert said.count(made.eos_token_id) == 2
    assert made.decode(said, skip_special_tokens=True).split() == ["the", "house", "the", "house"]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.usefixtures("here")
def test_what_people_say_forges_no_turn(tokenizer: Any, style: str) -> None:
    forged = "".join(encoder_of(tokenizer).reserved)
    messages = [
        {"role": "user", "content": f"a{forged}b"},
        {"role": "assistant", "content": f"the{forged}house"},
        {"role": "user", "content": "and?"},
        {"role": "assistant", "content": "a ledger"},
    ]
    harmless = [{**message, "content": message["content"].replace(forged, "")} for message in messages]
    ids, mask = learned(tokenizer, plain(STYLES[style]), messages)
    want, _ = learned(tokenizer, plain(STYLES[style]), harmless)
    reserved = set(encoder_of(tokenizer).reserved.values()) - {tokenizer.unk_token_id}
    assert [token for token in ids if token in reserved] == [token for token in want if token in reserved]
    said = tokenizer.decode([token for token, mark in zip(ids, mask, strict=True) if mark])
    assert forged.replace(" ", "") in said.replace(" ", "")
    assert "and?" not in said


@pytest.mark.usefixtures("here")
def test_templates_have_names() -> None:
    made = byte_tokenizer()
    letter = "{% for m in messages %}X{{ m.content }}{% endfor %}"
    named = {name: letter.replace("X", name[0]) for name in ("tool_use", "other")}
    made.chat_template = {"default": plain(STYLES["chatml"]), **named}
    messages = CONVERSATIONS["one turn"]
    tools = [{"type": "function", "function": {"name": "find"}}]
    for conversation, chosen, begins in (
        (Conversation(messages), "", "<|im_start|>"),
        (Conversation(messages, tools), "", "t"),
        (Conversation(messages), "other", "o"),
        (Conversation(messages), "{% for m in messages %}M{{ m.content }}{% endfor %}", "M"),
    ):
        with Templates(made, chosen) as templates:
            found = templates.document(conversation)
        assert found is not None
        assert made.decode(found[0]).startswith(begins)
    with (
        pytest.raises(Invalid, match="has no chat template 'absent'"),
        Templates(made, "absent") as templates,
    ):
        templates.document(Conversation(messages))
    made.chat_template = {"rag": "x", "tool_use": "y"}
    with pytest.raises(Invalid, match="say which"), Templates(made) as templates:
        templates.document(Conversation(messages))


HOSTILE = {
    "{{ raise_exception('there is no system here') }}": "there is no system here",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}": "longer than",
    "{{ messages[0].content * 100000000 }}": "memory|far more|longer than",
    "{{ 'a' * 5000000000 }}": "memory",
    "{{ messages[0].content.__class__.__mro__ }}": "unsafe|leaves|show|no attribute|undefined",
    "{{ cycler.__init__.__globals__.os.system('touch /tmp/connito-was-here') }}": "unsafe|undefined|no attribute|leaves|show",
    "nothing of it": "show|leaves",
    "{{ messages[1].content }}{{ messages[1].content }}": "show|leaves",
}


@pytest.mark.parametrize("template", HOSTILE)
def test_a_template_that_fails_skips_the_conversation_and_says_why(template: str) -> None:
    made = byte_tokenizer()
    made.chat_template = template
    with Templates(made, seconds=1.0) as templates:
        found = templates.document(Conversation([SYSTEM, *CONVERSATIONS["one turn"]]))
    assert found is None
    assert templates.laid.skipped.total() == 1
    assert re.search(HOSTILE[template], next(iter(templates.laid.skipped))), templates.laid.skipped
    assert not Path("/tmp/connito-was-here").exists()


def test_what_is_no_template_is_said_in_a_sentence() -> None:
    made = byte_tokenizer()
    made.chat_template = "{% for m in messages %}"
    with pytest.raises(Invalid, match=r"chat template is not one: .*name another"), Templates(made) as templates:
        templates.document(Conversation(CONVERSATIONS["one turn"]))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_template_is_read_in_the_encoding_of_its_mark(tmp_path: Path, encoding: str) -> None:
    (tmp_path / "a.jinja").write_text(PLAIN, encoding=encoding)
    assert templates_module.read_template(tmp_path / "a.jinja") == PLAIN


def test_a_tokenizer_without_an_end_of_text_is_refused_in_a_sentence() -> None:
    made = byte_tokenizer()
    made.eos_token = None
    with pytest.raises(Invalid, match="names no token for the end of a text; name it"):
        encoder_of(made).documents(["a"])


def test_a_slow_template_is_given_up() -> None:
    made = byte_tokenizer()
    made.chat_template = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with Templates(made, seconds=0.2) as templates:
        for _ in range(5):
            templates.document(Conversation(CONVERSATIONS["one turn"]))
    assert templates.laid.skipped["the template is too slow"] == 2


def test_a_template_that_writes_the_date_writes_the_same_on_every_day() -> None:
    made = byte_tokenizer()
    ids, _ = learned(made, "{{ strftime_now('%d %b %Y') }}" + plain(STYLES["chatml"]), CONVERSATIONS["one turn"])
    assert made.decode(ids).startswith("01 Jan 2025<|im_start|>")


@pytest.mark.usefixtures("here")
def test_a_silent_answer_is_read_and_not_learned() -> None:
    made = byte_tokenizer()
    messages = CONVERSATIONS["several turns"]
    for template in (plain(STYLES["chatml"]), marked(STYLES["chatml"])):
        made.chat_template = template
        with Templates(made) as templates:
            found = templates.document(Conversation(messages, silent=[1]))
        assert found is not None
        said = made.decode([token for token, mark in zip(*found, strict=True) if mark])
        assert said == "the house<|im_end|>" or said == "the house<|im_end|><|endoftext|>"


TOOLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + (call.function | tojson) + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.usefixtures("here")
def test_a_call_of_a_tool_is_learned_and_what_the_tool_says_is_not() -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": {"what": "ledger"}}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "where is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "in the house"},
        {"role": "assistant", "content": "there"},
    ]
    made = byte_tokenizer()
    ids, mask = learned(made, TOOLS, messages)
    said = made.decode([token for token, mark in zip(ids, mask, strict=True) if mark])
    assert said.startswith('<tool_call>{"name": "find"')
    assert said.endswith("</tool_call><|im_end|>there<|im_end|>")
    assert "in the house" not in said


CALLS = {
    "as objects": TOOLS,
    "as texts": TOOLS.replace("(call.function | tojson)", "call.function.name + ' ' + call.function.arguments"),
    "printed": TOOLS.replace("(call.function | tojson)", "call.function.name ~ ' ' ~ call.function.arguments"),
}


@pytest.mark.parametrize("template", CALLS)
@pytest.mark.parametrize("content", ["", "I look."])
@pytest.mark.usefixtures("here")
def test_arguments_that_are_json_are_written_once_and_learned(template: str, content: str) -> None:
    call = {"type": "function", "function": {"name": "find", "arguments": '{"what": "ledger"}'}}
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "where is it?"},
        {"role": "assistant", "content": content, "tool_calls": [call, call]},
        {"role": "tool", "content": "in the house"},
        {"role": "assistant", "content": "there"},
    ]
    made = byte_tokenizer()
    ids, mask = learned(made, CALLS[template], messages)
    said = made.decode([token for token, mark in zip(ids, mask, strict=True) if mark])
    assert said.startswith(f"{content}<tool_call>")
    assert said.count('{"what": "ledger"}') == 2
    assert "in the house" not in said


@pytest.mark.parametrize("style", ["chatml", "headers", "brackets"])
def test_a_conversation_of_thousands_of_turns_takes_no_longer_than_its_length(style: str) -> None:
    messages = [{"role": ("user", "assistant")[turn % 2], "content": f"turn {turn}"} for turn in range(4000)]
    made = byte_tokenizer()
    made.bos_token = "<|endoftext|>"
    found = learned(made, plain(STYLES[style]), messages, seconds=10.0)
    want = by_transformers(made, marked(STYLES[style]), messages)
    assert found[0][: len(want[0])] == want[0]
    said = made.decode([token for token, mark in zip(*found, strict=True) if mark])
    assert said.count("turn") == 2000


@pytest.mark.usefixtures("here")
def test_a_few_slow_conversations_do_not_cost_the_others() -> None:
    made = byte_tokenizer()
    made.chat_template = plain(STYLES["chatml"])
    with Templates(made) as templates:
        templates._slow = 3
        assert templates.document(Conversation(CONVERSATIONS["one turn"])) is None
        templates.laid.conversations = 100
        assert templates.document(Conversation(CONVERSATIONS["one turn"])) is not None
