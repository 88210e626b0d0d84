"""Score base and result of a run on the benchmarks and tasks that it names, once it has ended. Blocking; needs torch.

What a task asks for is a customer's word on somebody else's machine: it is asked as far as that is bounded, and runs none of
its own expressions. The delivery report, on the customer's machine, asks all of it.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from connito.data.corpus import Corpus, check_vocabulary
from connito.data.documents import is_shown
from connito.errors import Invalid
from connito.experts.tasks import ANSWER, CHOICE, MOST_ITEMS, Task, compare
from connito.files import plain_name
from connito.library.interval import change_interval
from connito.moe.state import load_state
from connito.protocol.sequences import sequences
from connito.v1.run_pb2 import BenchmarkScore, BenchmarksMeasured, RunSpec, Unscored
from connito.wire.bounds import cut
from connito.wire.identity import Identity
from connito.wire.sealing import unsealed
from connito.workloads.fetching import Source

if TYPE_CHECKING:
    from connito.moe.evaluate import Evaluator

# Sequences of a benchmark that are measured; the first ones, so that the figure is the same again.
SEQUENCES = 512
LOSS = "loss"
# What a task may ask of a machine that is not its author's: bytes of it, and tokens that its answers have in all.
MOST_BYTES, MOST_ANSWERED = 4 << 20, 32_768
# Texts that its choices make, and characters of them in all; metrics, filters and ends of answers; letters in a name or an end.
MOST_TEXTS, MOST_ASKED, MOST_NAMED, MOST_LETTERS = 5_000, 16 << 20, 8, 40
# Scores that a record has, and bytes that it says of each that is left out.
MOST_SCORES, MOST_WHY = 120, 200
_METRICS = {CHOICE: {"acc", "acc_norm"}, ANSWER: {"exact_match"}}
_OPTIONS = {"metric", "aggregation", "higher_is_better", "ignore_case", "ignore_punctuation", "ignore_numbers"}
_FILTERS = {"take_first", "lowercase", "uppercase", "remove_whitespace"}
_DRAWING = {"max_gen_toks", "until", "do_sample", "temperature"}


async def fetch_named(source: Source, spec: RunSpec, me: Identity) -> dict[str, Path]:
    """Fetch a run's benchmarks and tasks by digest, and open them. Raises what `Source.fetch` raises, and `Invalid`."""
    found = {}
    for corpus in (*spec.benchmarks, *spec.tasks):
        path = await source.fetch(corpus.artifact)
        found[corpus.artifact.digest] = await asyncio.to_thread(unsealed, path, corpus.artifact, me, spec.customer)
    return found


def measure(
    evaluator: Evaluator,
    tokenizer: Any,
    spec: RunSpec,
    files: Mapping[str, Path],
    digest: str,
    state: Path,
    between: Callable[[], None] = lambda: None,
) -> BenchmarksMeasured:
    """Return the scores of the base and of `state`, whose digest is `digest`; `files` are those of `fetch_named`.

    `between` is called before each batch, and may wait, or raise `Invalid` with why nothing more is scored.
    """
    result = BenchmarksMeasured(run=spec.run, state=digest)
    tensors, model = load_state(state), cast(Any, evaluator.model)

    def leave(name: str, error: object) -> None:
        result.unscored.append(Unscored(name=name, why=cut(_shown(str(error)), MOST_WHY)))

    def add(scores: Sequence[BenchmarkScore]) -> None:
        if len(result.scores) + len(scores) > MOST_SCORES:
            raise Invalid(f"a record has at most {MOST_SCORES} scores: the delivery report has the others")
        result.scores.extend(scores)

    for corpus in spec.benchmarks:
        try:
            between()
            text = Corpus.load(files[corpus.artifact.digest])
            # On a GPU a token without an embedding ends the process, and with it the work on other runs.
            check_vocabulary(text.largest, model.get_input_embeddings().num_embeddings, text.name)
            rows = sequences(text, spec)[:SEQUENCES]
            before, tokens = evaluator.losses(evaluator.base, rows, lambda *_: between())
            after, _ = evaluator.losses(tensors, rows, lambda *_: between())
            add([_loss(corpus.domain, before.tolist(), after.tolist(), tokens.tolist())])
        except Invalid as error:
            leave(corpus.domain, error)
    for ref in spec.tasks:
        evaluator.restore()
        try:
            between()
            if find_spec("lm_eval") is None:
                raise Invalid("the platform's aggregator lacks connito[evaluate]: the delivery report has its scores")
            asked = _task(files[ref.artifact.digest])
            # An answer of many tokens is many passes.
            passes = evaluator.model.register_forward_pre_hook(lambda *_: between())
            try:
                add(list(_scores(asked, evaluator.model, tokenizer, partial(evaluator.put, tensors))))
            finally:
                passes.remove()
        except Invalid as error:
            leave(ref.domain, error)
    evaluator.restore()
    return result


def _shown(text: str) -> str:
    """Return a text as one line that every record can hold: it may quote what nobody has checked."""
    return "".join(sign if is_shown(sign) else "?" for sign in " ".join(text.split()))


def _loss(name: str, before: Sequence[float], after: Sequence[float], tokens: Sequence[int]) -> BenchmarkScore:
    total = sum(tokens)
    if not total or not all(map(math.isfinite, (*before, *after))):
        raise Invalid("it has no loss that is a number")
    found = BenchmarkScore(
        name=name, metric=LOSS, items=len(tokens), tokens=total,
        before=sum(before) / total, after=sum(after) / total,
    )  # fmt: skip
    if (between := change_interval(before, after, tokens)) is not None:
        found.low, found.high = between
    return found


def _scores(task: Task, model: Any, tokenizer: Any, put: Any) -> Iterator[BenchmarkScore]:
    for row in compare([task], model, tokenizer, put):
        assert row.base is not None, "the base is asked as well"
        found = BenchmarkScore(name=row.task, metric=row.metric, items=row.items, before=row.base, after=row.score)
        if row.interval is not None:
            found.low, found.high = row.interval
        yield found


def _task(file: Path) -> Task:
    """Read a task that may be asked here. Raises `Invalid` with what it asks too much of."""
    if file.stat().st_size > MOST_BYTES:
        raise Invalid(f"it has more than {MOST_BYTES:,} bytes: the delivery report has its scores")
    task = Task.decode(file.read_bytes())
    try:
        beyond = next(_beyond(task), "")
    except (AttributeError, KeyError, TypeError) as error:
        raise Invalid(f"it is no task ({type(error).__name__})") from error
    if beyond:
        raise Invalid(f"{beyond}: the delivery report has its scores")
    return task


def _beyond(task: Task) -> Iterator[str]:
    if len(task.items) > MOST_ITEMS:
        yield f"it has more than {MOST_ITEMS} items"
    texts = [(item["given"], choice) for item in task.items for choice in item.get("choices", [""])]
    if not all(isinstance(text, str) for pair in texts for text in pair):
        raise TypeError
    if len(texts) > MOST_TEXTS or sum(len(given) + len(choice) for given, choice in texts) > MOST_ASKED:
        yield f"its choices make more than {MOST_TEXTS:,} texts, or more than {MOST_ASKED:,} letters in all"
    if any(metric.get("metric") not in _METRICS[task.kind] or not set(metric) <= _OPTIONS for metric in task.metrics):
        yield f"the platform scores {task.kind} by {', '.join(sorted(_METRICS[task.kind]))} alone"
    drawing = task.how.get("generation_kwargs") or {}
    known = {"target_delimiter"} if task.kind == CHOICE else {"generation_kwargs", "filter_list"}
    if not set(task.how) <= known or not set(drawing) <= _DRAWING or drawing.get("do_sample"):
        yield "it asks in a way of its own"
    ends = drawing.get("until") or []
    ends = [task.how.get("target_delimiter", ""), *([ends] if isinstance(ends, str) else ends)]
    filters = task.how.get("filter_list") or []
    named = (task.metrics, ends[1:], filters, *(entry.get("filter", []) for entry in filters))
    if any(len(names) > MOST_NAMED for names in named) or any(len(end) > MOST_LETTERS for end in ends):
        yield f"it names more than {MOST_NAMED} metrics, filters or ends of answers, or too long ones"
    if task.kind == ANSWER:
        length = drawing.get("max_gen_toks", 256)
        if type(length) is not int or not 0 < length * len(task.items) <= MOST_ANSWERED:
            yield f"its answers may have more than {MOST_ANSWERED:,} tokens in all"
        names = [str(entry.get("name", "one")) for entry in filters]
        if not all(plain_name(name) and len(name.encode()) <= MOST_LETTERS for name in names):
            yield "its filters have names that nobody can read"
        steps = [step for entry in filters for step in entry.get("filter", [])]
        if any(step.get("function") not in _FILTERS for step in steps):
            yield "its filters run expressions of its own"
