"""`connito serve`, asked by the official client over HTTP, and by clients that mean no good."""

from __future__ import annotations

import asyncio
import json
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import httpx2 as httpx
import openai
import pytest
import torch
import uvicorn
from connito.base.loading import load_full, load_tokenizer
from connito.curation.holdings import Holdings
from connito.curation.serving.http import application
from connito.curation.serving.run import ServeOptions, prepare, read_keys
from connito.curation.serving.server import Server
from connito.errors import Invalid, Retry
from connito.experts.compose import Part, Recipe, layers_of, merge, state_of
from connito.library.artifact import MODEL_FORMAT
from connito.library.governance import Standing, Viewer
from connito.library.shelf import Shelf
from connito.moe.rows import write_rows
from connito.runtime import metrics

from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow
PROMPT = "turnip with leek:\n"


class Running:
    """A server that answers in threads of its own."""

    def __init__(self, server: Server, keys: dict[str, Viewer]) -> None:
        self.server = server
        self._clients: list[openai.OpenAI] = []
        listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"http://127.0.0.1:{listener.getsockname()[1]}"
        app = application(server, Viewer(), keys)
        self._uvicorn = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off", ws="none"))
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=lambda: self.loop.run_until_complete(self._uvicorn.serve([listener])))
        server.generator.start()
        self._thread.start()

    def stop(self) -> None:
        for client in self._clients:
            client.close()
        self._uvicorn.should_exit = True
        self._thread.join()
        self.loop.close()
        self.server.generator.stop()

    def client(self, key: str = "none") -> openai.OpenAI:
        self._clients.append(openai.OpenAI(base_url=f"{self.address}/v1", api_key=key, max_retries=0))
        return self._clients[-1]

    def post(self, path: str, body: Any, **more: Any) -> httpx.Response:
        content = body if isinstance(body, (bytes, str)) else json.dumps(body)
        return httpx.post(f"{self.address}/v1/{path}", content=content, timeout=60, **more)


@pytest.fixture
def start(stocked: Any, tiny: Path) -> Iterator[Callable[..., Running]]:
    running: list[Running] = []

    def begin(keys: dict[str, Viewer] | None = None, shelf: Path = stocked[0], **options: Any) -> Running:
        chosen = ServeOptions(tiny, "tiny", **{"cache_tokens": 4096, "batch_tokens": 128, **options})
        running.append(Running(prepare(chosen, Holdings(shelf)), keys or {}))
        return running[-1]

    yield begin
    for each in running:
        each.stop()


def greedy(model: Any, tokenizer: Any, prompt: str, count: int) -> str:
    """What stock transformers generates."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    with torch.inference_mode():
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False)
    text: str = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return text


def test_a_mixed_batch_answers_as_each_merged_model_does_alone(
    start: Any, stocked: Any, tiny: Path, parts: dict[str, Part], base: Any
) -> None:
    ids, words = stocked[1], load_tokenizer(tiny)
    running = start()
    names = {
        "tiny": {},
        **{f"tiny+{ids[domain]}": parts[domain].rows for domain in parts},
        # Written in either order, it is one composition.
        f"tiny+{ids['recipes']}+{ids['logs']}": merge([parts["recipes"], parts["logs"]], base, Recipe()),
        f"tiny+{ids['logs']}+{ids['recipes']}": merge([parts["recipes"], parts["logs"]], base, Recipe()),
    }
    prompts = [PROMPT, "[2031-01-17 08:00] 10", "ὦ σελήνη"]

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{running.address}/v1", api_key="x", max_retries=0) as client:
            asked = [
                client.completions.create(model=name, prompt=prompt, max_tokens=24, temperature=0)
                for name in names
                for prompt in prompts
            ]
            return [answer.choices[0].text for answer in await asyncio.gather(*asked)]

    found = asyncio.run(ask())
    wanted = []
    for rows in names.values():
        model = load_full(tiny)
        if rows:
            write_rows(model, layers_of(rows), state_of(rows))
        wanted += [greedy(model, words, prompt, 24) for prompt in prompts]
    assert found == wanted
    assert len(set(found)) > len(prompts)
    assert len(running.server.roster.loaded) == 4


def test_streams_models_and_usage_are_as_the_official_client_expects(start: Any, stocked: Any) -> None:
    running, expert = start(), f"tiny+{stocked[1]['recipes']}"
    client = running.client()
    assert [model.id for model in client.models.list()] == ["tiny", *(f"tiny+{name}" for name in stocked[1].values())]
    assert client.models.retrieve(expert).id == expert
    asked: dict[str, Any] = {"model": expert, "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    whole = client.completions.create(**asked)
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (len(PROMPT), 20)
    assert whole.choices[0].finish_reason == "length"
    events = list(client.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert "".join(event.choices[0].text for event in events if event.choices) == whole.choices[0].text
    assert sum(1 for event in events if event.choices and event.choices[0].text) > 5
    assert events[-1].usage == whole.usage
    stop = whole.choices[0].text[7:10]
    cut = client.completions.create(**asked, stop=[stop, "never this"])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].text == whole.choices[0].text[: whole.choices[0].text.index(stop)]
    several = client.completions.create(model="tiny", prompt=[PROMPT, [1, 2, 3]], n=2, max_tokens=3, top_p=0.9)
    assert [choice.index for choice in several.choices] == [0, 1, 2, 3]


def test_a_seed_draws_the_same_whoever_asks_beside_it(start: Any, stocked: Any) -> None:
    running = start()
    client, model = running.client(), f"tiny+{stocked[1]['recipes']}"

    def drawn(seed: int | None, **more: Any) -> list[str]:
        asked = {"model": model, "prompt": PROMPT, "max_tokens": 24, "temperature": 1.2, "seed": seed, **more}
        return [choice.text for choice in client.completions.create(**asked).choices]

    alone = drawn(7, n=3)
    assert len(set(alone)) == 3, "answers of one request differ"
    with ThreadPoolExecutor(6) as pool:
        # Others in the same batches, before it and after it, seeded or not.
        others = [pool.submit(drawn, seed, model="tiny", n=4, max_tokens=40) for seed in (None, 1, 2)]
        again = [pool.submit(drawn, 7, n=3) for _ in range(3)]
        assert [each.result() for each in again] == [alone] * 3
        assert len({text for each in others for text in each.result()}) == 12
    assert drawn(8) != alone[:1]
    assert drawn(None) != drawn(None)
    # What restricts a draw restricts this one.
    likeliest = drawn(None, temperature=0)
    assert drawn(-3, top_p=1e-6) == drawn(11, extra_body={"top_k": 1}) == drawn(7, temperature=0) == likeliest
    refused = running.post("completions", {"model": "tiny", "prompt": "x", "seed": "seven"})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "seed")
    assert not running.server.generator._seeds


def test_a_prompt_is_scored_as_the_merged_model_scores_it_while_others_are_answered(
    start: Any, stocked: Any, tiny: Path, parts: dict[str, Part]
) -> None:
    running, words = start(), load_tokenizer(tiny)
    names = {"tiny": {}, **{f"tiny+{stocked[1][domain]}": parts[domain].rows for domain in ("recipes", "logs")}}
    prompts: list[Any] = [PROMPT * 19, [1, 2, 3, 200], "ὦ σελήνη", [7]]
    passes: list[int] = []

    def seen(_: Any, __: Any, keywords: dict[str, Any]) -> None:
        if "cu_seq_lens_q" not in keywords:
            passes.append(keywords["input_ids"].shape[1])

    running.server.generator.table.model.model.register_forward_pre_hook(seen, with_kwargs=True)
    client, beside = running.client(), {"model": f"tiny+{stocked[1]['logs']}", "prompt": PROMPT, "temperature": 0}
    alone = client.completions.create(**beside, max_tokens=60).choices[0].text
    answers: list[str] = []
    for name, rows in names.items():
        other = threading.Thread(
            target=lambda: answers.append(client.completions.create(**beside, max_tokens=60).choices[0].text)
        )
        other.start()
        given = client.completions.create(model=name, prompt=prompts, echo=True, logprobs=2, max_tokens=1)
        other.join()
        model = load_full(tiny)
        if rows:
            write_rows(model, layers_of(rows), state_of(rows))
        assert given.usage is not None
        assert given.usage.completion_tokens == len(prompts)
        for prompt, choice in zip(prompts, given.choices, strict=True):
            ids = prompt if isinstance(prompt, list) else words(prompt)["input_ids"]
            with torch.inference_mode():
                wanted = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            own = wanted[:-1].gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            found = choice.logprobs
            assert found is not None
            assert found.token_logprobs[0] is None
            assert torch.allclose(torch.tensor(found.token_logprobs[1:-1]), own, atol=1e-5)
            assert found.token_logprobs[-1] == pytest.approx(wanted[-1].max().item(), abs=1e-5)
            assert choice.text == words.decode([*ids, int(wanted[-1].argmax())], skip_special_tokens=True)
            assert [max(row.values()) for row in found.top_logprobs[1:]] == pytest.approx(
                wanted.max(-1).values.tolist(), abs=1e-5
            )
            assert len(found.tokens) == len(found.text_offset) == len(ids) + 1
            assert found.text_offset == sorted(found.text_offset)
    assert answers == [alone] * len(names)
    assert (
        passes == [128, 128, len(words(prompts[0])["input_ids"]) - 256, 4, len(words(prompts[2])["input_ids"]), 1] * 3
    )
    alike = client.completions.create(model="tiny", prompt=PROMPT, echo=True, logprobs=0, max_tokens=0)
    assert alike.choices[0].text == PROMPT
    # No server of one letter a token: every token starts where the one before it ends.
    assert alike.choices[0].logprobs is not None
    assert alike.choices[0].logprobs.text_offset == list(range(len(PROMPT)))


def test_a_harness_scores_through_the_server(start: Any, stocked: Any, tiny: Path, parts: dict[str, Part]) -> None:
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    running, name = start(), f"tiny+{stocked[1]['recipes']}"
    harness = LocalCompletionsAPI(
        base_url=f"{running.address}/v1/completions", model=name, tokenizer=str(tiny), tokenizer_backend="huggingface",
        num_concurrent=1, max_length=512,
    )  # fmt: skip
    asked = [(PROMPT.strip(), "\nleek with"), (PROMPT.strip(), "qqqq"), ("[2031-01-17 08:00] 1", "0")]
    found = harness.loglikelihood(
        [Instance("loglikelihood", {}, (context, more), index) for index, (context, more) in enumerate(asked)]
    )
    model, words = load_full(tiny), load_tokenizer(tiny)
    rows = parts["recipes"].rows
    write_rows(model, layers_of(rows), state_of(rows))
    for (context, more), (total, greedily) in zip(asked, found, strict=True):
        ids, begun = words(context + more)["input_ids"], len(words(context)["input_ids"])
        with torch.inference_mode():
            logprobs = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        own = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[begun - 1 :, 0]
        assert total == pytest.approx(own.sum().item(), abs=1e-4)
        assert greedily == (logprobs.argmax(-1)[begun - 1 :].tolist() == ids[begun:])


def test_conversations_follow_the_bases_template(start: Any, stocked: Any) -> None:
    running = start()
    said: list[Any] = [
        {"role": "system", "content": "cook"},
        {"role": "user", "content": [{"type": "text", "text": "leek?"}]},
    ]
    with pytest.raises(openai.BadRequestError, match="no chat template"):
        running.client().chat.completions.create(model="tiny", messages=said)
    template = (
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}> {% endif %}"
    )
    running.server._tokenizer.chat_template = template
    client = running.client()
    asked: dict[str, Any] = {"model": f"tiny+{stocked[1]['recipes']}", "temperature": 0}
    answer = client.chat.completions.create(**asked, messages=said, max_completion_tokens=12)
    plain = client.completions.create(**asked, prompt="system: cook\nuser: leek?\n> ", max_tokens=12)
    assert answer.choices[0].message.content == plain.choices[0].text
    stream = list(client.chat.completions.create(**asked, messages=said, max_tokens=12, stream=True))
    assert stream[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in stream) == plain.choices[0].text


def test_hostile_requests_get_the_interfaces_errors_and_leave_nothing(start: Any) -> None:
    running = start(waiting=40)
    good = {"model": "tiny", "prompt": "leek", "max_tokens": 2}
    bad: list[tuple[Any, int, str]] = [
        (b"{", 400, "not JSON"),
        (b"\xff\xfe", 400, "not JSON"),
        ("[" * 100_000, 400, "nested too deep"),
        ([], 400, "no JSON object"),
        ({"model": "tiny"}, 400, "prompt"),
        (good | {"max_tokens": 10**18}, 400, "context is"),
        (good | {"max_tokens": 0}, 400, "max_tokens"),
        (good | {"max_tokens": "many"}, 400, "max_tokens"),
        (good | {"prompt": "leek " * 2000}, 400, "context is"),
        (good | {"prompt": "leek " * 700_000}, 400, "3,500,000 characters"),
        (b'{"model": "tiny", "prompt": "\\ud800"}', 400, "unicode"),
        (b'{"model": "tiny+\\udfff", "prompt": "a"}', 400, "unicode"),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}", 400, "not JSON"),
        (good | {"prompt": ["a"] * 100_000}, 400, "too many"),
        (good | {"prompt": [[]]}, 400, "prompt"),
        (good | {"prompt": [2**70]}, 400, "token ids go up to"),
        (good | {"prompt": [[1, 2], [10**9]]}, 400, "token ids go up to"),
        (good | {"prompt": [-1]}, 400, "prompt"),
        (good | {"prompt": ""}, 400, "is empty"),
        (good | {"stop": [str(number) for number in range(200_000)]}, 400, "at most 4"),
        (good | {"stop": "x" * 100_000}, 400, "stop"),
        (good | {"stop": ""}, 400, "stop"),
        (good | {"n": 10**6}, 400, "n:"),
        (good | {"n": 32, "prompt": ["a", "b"]}, 400, "too many"),
        (good | {"stop": 0}, 400, "stop: input should be a valid list"),
        (good | {"temperature": -1}, 400, "temperature"),
        (good | {"min_p": 0.1}, 400, "does not do min_p"),
        (good | {"guided_json": {"type": "object"}}, 400, "does not do guided_json"),
        (good | {"repetition_penalty": 1.2}, 400, "does not do repetition_penalty"),
        (good | {"prompt": [1, "a"]}, 400, "prompt.0: "),
        ('{"model": "tiny", "prompt": "a", "temperature": NaN}', 400, "temperature"),
        (good | {"logprobs": 5}, 400, "echo and logprobs together"),
        (good | {"logprobs": 0}, 400, "echo and logprobs together"),
        (good | {"echo": True}, 400, "echo and logprobs together"),
        (good | {"echo": True, "logprobs": 1}, 400, "max_tokens 0 or 1"),
        (good | {"echo": True, "logprobs": 6, "max_tokens": 0}, 400, "logprobs"),
        (good | {"echo": True, "logprobs": 1, "max_tokens": 1, "stream": True}, 400, "no stream"),
        (good | {"echo": True, "logprobs": 1, "max_tokens": 0, "prompt": "leek " * 2000}, 400, "context is"),
        (good | {"model": "gpt-4"}, 404, "does not exist"),
        (good | {"model": "tiny+"}, 404, "does not exist"),
        (good | {"model": "tiny+nobody"}, 404, "does not exist"),
        (good | {"model": "tiny+../../etc"}, 404, "does not exist"),
        (good | {"model": "tiny+/etc"}, 404, "does not exist"),
        (good | {"model": f"tiny+{'x' * 900}"}, 404, "does not exist"),
        (good | {"model": "tiny+" + "é" * 140}, 404, "does not exist"),
        (good | {"model": "tiny+" + "+".join(map(str, range(50)))}, 400, "too many"),
        ("x" * (5 << 20), 413, "more than"),
    ]
    for body, status, why in bad:
        answer = running.post("completions", body)
        assert (answer.status_code, str(body)[:80]) == (status, str(body)[:80]), answer.text
        error = answer.json()["error"]
        assert why in error["message"]
        assert set(error) == {"message", "type", "param", "code"}
    assert "/v1/chat/completions" in httpx.get(f"{running.address}/v1/embeddings").json()["error"]["message"]
    part = {"model": "tiny", "messages": [{"role": "user", "content": [{"type": "image_url"}]}]}
    assert "messages.0.content.0.type" in running.post("chat/completions", part).json()["error"]["message"]
    assert httpx.get(f"{running.address}/v1/completions").headers["allow"] == "POST"
    with pytest.raises(openai.NotFoundError) as found:
        running.client().completions.create(model="gpt-4", prompt="leek")
    assert found.value.code == "model_not_found"
    # Whoever hangs up is not computed for.
    for stream in (True, False):
        body = json.dumps(good | {"max_tokens": 100, "n": 20, "stream": stream, "temperature": 1.5}).encode()
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body)
        with socket.create_connection(("127.0.0.1", int(running.address.rpartition(":")[2]))) as left:
            left.sendall(head + body)
            wait_until(lambda: running.server.generator.busy() > 0)
            full = running.post("completions", good | {"n": 32})
            assert full.status_code in (200, 429)
        wait_until(lambda: running.server.generator.busy() == 0)
    manager = running.server.generator._manager
    wait_until(lambda: not manager.batch_processor.has_pending_requests())
    assert not manager.output_router.result_handlers
    assert running.post("completions", good).status_code == 200


def test_what_fails_here_is_said_counted_and_in_the_log(
    start: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    running, good = start(), {"model": "tiny", "prompt": "leek", "max_tokens": 2}

    def failed(error: Exception) -> tuple[int, str]:
        def fail(*_: object) -> None:
            raise error

        monkeypatch.setattr(running.server.roster, "permit", fail)
        answer = running.post("completions", good)
        return answer.status_code, answer.json()["error"]["message"]

    def counted(status: str) -> float:
        return metrics.SERVE_REQUESTS.labels(status)._value.get()  # type: ignore[no-any-return]

    before = counted("500"), counted("503")
    assert failed(ZeroDivisionError("a fault of ours")) == (500, "the server failed; see its log")
    assert "a fault of ours" in capsys.readouterr().err
    assert failed(Retry("the library does not answer")) == (503, "the library does not answer; try again")
    assert (counted("500"), counted("503")) == (before[0] + 1, before[1] + 1)


def test_experts_of_the_platform_are_listed_before_they_are_asked_for(
    start: Any, exports: Any, stocked: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a server beside a library that is elsewhere, whose shelf is empty, tells it."""
    ids, yanked = stocked[1], ""
    records = {ids[domain]: json.loads((exports[domain] / "record.json").read_text()) for domain in exports}
    hidden, other, gone = records
    records[hidden]["governance"] = {"visibility": "private", "owner": "ada"}
    records[other]["base"] = {"name": "another", "manifest": "0" * 64}
    whole = {**records[gone], "expert_id": "whole-model", "format": MODEL_FORMAT}
    library = SimpleNamespace(
        list=lambda: [SimpleNamespace(expert_id=name) for name in [*records, "whole-model"]],
        show=lambda name: SimpleNamespace(record={**records, "whole-model": whole}[name]),
        standing=lambda name: Standing("yanked", "it was poisoned") if name == yanked else Standing(),
    )
    client = MagicMock(library=library)
    monkeypatch.setattr(Holdings, "platform", lambda _: client)
    ada = "a" * 20
    (tmp_path / "empty").mkdir()
    running = start({ada: Viewer("ada"), "b" * 20: Viewer("bob")}, tmp_path / "empty")
    listed = {who: [model.id for model in running.client(who * 20).models.list()] for who in "ab"}
    assert listed == {"a": ["tiny", f"tiny+{hidden}", f"tiny+{gone}"], "b": ["tiny", f"tiny+{gone}"]}
    yanked = gone
    assert [model.id for model in running.client(ada).models.list()] == ["tiny", f"tiny+{hidden}"]


def test_fifty_clients_at_once_are_answered_as_each_alone_and_leave_nothing(start: Any, stocked: Any) -> None:
    running = start(requests=8)
    names = ["tiny", *(f"tiny+{expert}" for expert in stocked[1].values())]
    asked = [
        {
            "model": names[number % len(names)],
            "prompt": f"{number} leek",
            "max_tokens": 24,
            "temperature": 0,
            "stream": True,
        }
        for number in range(50)
    ]
    alone = [running.post("completions", body | {"stream": False}).json()["choices"][0]["text"] for body in asked]

    async def read(client: httpx.AsyncClient, number: int) -> str:
        text = ""
        async with client.stream("POST", f"{running.address}/v1/completions", json=asked[number]) as answer:
            assert answer.status_code == 200
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                # Every third is cut within its stream.
                if text and number % 3 == 0:
                    return text
        return text

    async def every() -> list[str]:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=50)) as client:
            return await asyncio.gather(*(read(client, number) for number in range(50)))

    for number, text in enumerate(asyncio.run(every())):
        assert alone[number].startswith(text) if number % 3 == 0 else alone[number] == text, number
    wait_until(lambda: running.server.generator.busy() == 0)
    assert all(loaded.busy == 0 for loaded in running.server.roster.loaded.values())


def test_an_expert_that_goes_ends_its_answers_and_no_others(start: Any, stocked: Any, run: Any) -> None:
    shelf, ids = stocked
    running = start()
    gone, stays = f"tiny+{ids['recipes']}", f"tiny+{ids['logs']}"
    body = {"prompt": PROMPT, "max_tokens": 900, "temperature": 0, "stream": True}
    with (
        httpx.stream("POST", f"{running.address}/v1/completions", json=body | {"model": gone}, timeout=60) as ended,
        httpx.stream("POST", f"{running.address}/v1/completions", json=body | {"model": stays}, timeout=60) as whole,
    ):
        lines, others = ended.iter_lines(), whole.iter_lines()
        assert "choices" in next(lines)
        run("mark", ids["recipes"], "yanked", "--reason", "it was poisoned", "--shelf", shelf)
        asyncio.run_coroutine_threadsafe(running.server.look(), running.loop).result(60)
        last = [line for line in lines if line.startswith("data: {")][-1]
        assert "it was poisoned" in json.loads(last.removeprefix("data: "))["error"]["message"]
        documents = [json.loads(line.removeprefix("data: ")) for line in others if line.startswith("data: {")]
    assert not any("error" in document for document in documents)
    assert documents[-1]["choices"][0]["finish_reason"] in ("length", "stop")
    assert gone not in running.server.roster.loaded


def test_experts_come_and_go_while_it_runs(start: Any, stocked: Any, exports: Any, run: Any) -> None:
    shelf, ids = stocked
    running = start(experts=2)
    server, ask = running.server, {"prompt": PROMPT, "max_tokens": 2}
    for domain in ("recipes", "logs", "poems", "recipes"):
        assert running.post("completions", ask | {"model": f"tiny+{ids[domain]}"}).status_code == 200
    # Two places: the third took that of the one used longest ago.
    assert [loaded.experts[0] for loaded in server.roster.loaded.values()] == [ids["poems"], ids["recipes"]]
    before = server.generator.table.row_bytes()
    run("mark", ids["recipes"], "yanked", "--reason", "it was poisoned", "--shelf", shelf)
    asyncio.run(server.look())
    assert 0 < server.generator.table.row_bytes() < before
    refused = running.post("completions", ask | {"model": f"tiny+{ids['recipes']}"})
    assert refused.status_code == 403
    assert "it was poisoned" in refused.json()["error"]["message"]
    # What would allow it is nothing that a request can say.
    assert refused.json()["error"]["message"].endswith(
        "--allow-yanked; that is an option of `connito serve`, for whoever runs it"
    )
    assert f"tiny+{ids['recipes']}" not in [model.id for model in running.client().models.list()]
    routed = running.post("completions", ask | {"model": f"tiny+{ids['logs']}|{ids['poems']}"})
    assert routed.status_code == 200
    asyncio.run(server.look())
    with Shelf(shelf).index() as index:
        assert index.usage(ids["logs"]) == {"serve": 2}
        assert index.usage(ids["recipes"]) == {"serve": 2}


def test_who_asks_is_who_may(start: Any, stocked: Any, exports: Any, run: Any, tmp_path: Path) -> None:
    ids, shelf = stocked[1], tmp_path / "theirs"
    record = json.loads((exports["logs"] / "record.json").read_text())
    private = {**record, "governance": {"visibility": "private", "owner": "ada"}}
    (exports["logs"] / "record.json").write_text(json.dumps(private))
    for domain in ("logs", "recipes"):
        run("deposit", exports[domain], "--shelf", shelf)
    ada, bob = "a" * 20, "b" * 20
    file = tmp_path / "keys.yaml"
    file.write_text(f"- {{key: {ada}, name: ada}}\n- {{key: {bob}, name: bob, organisations: [x]}}\n")
    running = start(read_keys(file), shelf)
    model = f"tiny+{ids['logs']}"
    with pytest.raises(openai.AuthenticationError):
        running.client("wrong").models.list()
    assert running.post("completions", {"model": "tiny", "prompt": "a"}).status_code == 401
    assert model in [found.id for found in running.client(ada).models.list()]
    assert running.client(ada).completions.create(model=model, prompt="a", max_tokens=1).choices
    assert model not in [found.id for found in running.client(bob).models.list()]
    for name in (model, f"tiny+{ids['recipes']}+{ids['logs']}"):
        with pytest.raises(openai.NotFoundError):
            running.client(bob).completions.create(model=name, prompt="a", max_tokens=1)
    for text in ("", "{", "- {name: x}", "- {key: short}", "[]"):
        file.write_text(text)
        with pytest.raises(Invalid):
            read_keys(file)


def test_a_base_is_known_by_its_content_whatever_its_folder_is_called(stocked: Any, tiny: Path, tmp_path: Path) -> None:
    shelf, ids = stocked
    folder = tmp_path / "the base, copied"
    folder.symlink_to(tiny)
    roster = prepare(ServeOptions(folder, "mine"), Holdings(shelf)).roster
    assert set(roster.names(Viewer())) >= {"mine", f"mine+{ids['logs']}"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_was_used_is_written_down_when_it_is_told_to_stop(
    stocked: Any, tiny: Path, number: signal.Signals
) -> None:
    shelf, ids = stocked
    options = ("--base", tiny, "--name", "tiny", "--shelf", shelf, "--port", 0, "--cache-tokens", 4096, "--json")
    command = [sys.executable, "-P", "-m", "connito.cli", "serve", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = json.loads("".join(iter(process.stdout.readline, "}\n")) + "}")["address"]
            asked = {"model": f"tiny+{ids['logs']}", "prompt": PROMPT, "max_tokens": 2}
            assert httpx.post(f"{address}/completions", json=asked, timeout=60).status_code == 200
            process.send_signal(number)
            _, said = process.communicate(timeout=60)
        finally:
            process.kill()
    assert (process.returncode, "Traceback" in said) == (0, False), said
    uses = [event for event in Shelf(shelf).events() if event.kind == "used"]
    assert [event.subject for event in uses] == [ids["logs"]]
