"""Make token corpora of a job's texts, and measure how well the base's tokenizer fits them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from connito.data.conversations import Conversation
from connito.data.corpus import ENDS, WHOLE, Corpus
from connito.data.encoding import encoder_of
from connito.data.templates import PLAIN_WORDS, Laid, Templates, read_template
from connito.errors import Invalid, NotFound
from connito.jobs import replay
from connito.jobs.context import JobContext
from connito.jobs.findings import Finding
from connito.jobs.lengths import fit_lengths
from connito.jobs.sources import Document
from connito.jobs.spec import Job
from connito.jobs.texts import Texts
from connito.protocol.holdout import subsets
from connito.protocol.sequences import sequences
from connito.render import formats
from connito.v1.run_pb2 import RunSpec

_WORD = re.compile(r"\w+")
_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_BATCH_DOCUMENTS = 64
# Enough text for a ratio to two digits.
_SAMPLE_CHARACTERS = 400_000
# From here on the base reads the text much worse than its own general text.
POOR_FIT, POOR_FALLBACK = 1.5, 0.05


@dataclass(frozen=True)
class Fit:
    """The fit of a tokenizer to a text. `fallback` is the share of tokens that are a piece of a character, or unknown."""

    tokens_per_word: float
    bytes_per_token: float
    fallback: float
    tokens: int


@dataclass
class Corpora:
    """The corpora of a job; `general` and `benchmarks` by name."""

    probe: Corpus
    train: Corpus
    holdout: Corpus
    general: dict[str, Corpus] = field(default_factory=dict)
    replay: Corpus | None = None
    benchmarks: dict[str, Corpus] = field(default_factory=dict)
    fit: dict[str, Fit] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    def sizes(self) -> dict[str, dict[str, int]]:
        """Return the number of documents and tokens of every part."""
        parts = {"probe": self.probe, "train": self.train, "holdout": self.holdout}
        parts |= {f"general {name}": corpus for name, corpus in self.general.items()}
        parts |= {f"benchmark {name}": corpus for name, corpus in self.benchmarks.items()}
        if self.replay is not None:
            parts["replay"] = self.replay
        return {name: {"documents": corpus.documents, "tokens": len(corpus.tokens)} for name, corpus in parts.items()}


def build(job: Job, texts: Texts, spec: RunSpec, context: JobContext, chat_template: str = "") -> Corpora:
    """Tokenise every part, let the lengths in `spec` follow from it, and check the result: sizes, and the tokenizer's fit.

    chat_template: the name or the source of the template for conversations; empty: the base's own.
    """
    with Templates(context.tokenizer, chat_template) as templates:
        found = _tokenised(texts, spec, context, templates)
        found.findings += _chats(templates.laid)
    held = found.general if texts.general else dict(context.general_corpora())
    if found.replay is None and job.asked_replay != 0:
        found.replay = context.replay_corpus()
    found.findings += fit_lengths(job, spec, context, found.train, {spec.domain: found.holdout, **held})
    found.findings += replay.settle(job, spec, context, found.train, found.replay)
    found.findings += _sizes(found, held, spec)
    found.findings += _lengths(found.train, spec.training.sequence_length)
    found.findings += _fit(found, texts, held, context)
    return found


def _tokenised(texts: Texts, spec: RunSpec, context: JobContext, templates: Templates) -> Corpora:
    def corpus(domain: str, split: str, documents: Iterable[Document]) -> Corpus:
        metadata = {
            "domain": domain, "split": split, "tokenizer": context.tokenizer_digest,
            "separator": str(context.tokenizer.eos_token_id), ENDS: WHOLE,
        }  # fmt: skip
        return Corpus.from_masked(_encoded(documents, context, templates), metadata)

    found = Corpora(
        corpus(spec.domain, "probe", texts.probe),
        corpus(spec.domain, "train", texts.train),
        corpus(spec.domain, "holdout", texts.holdout),
        {domain: corpus(domain, "holdout", documents) for domain, documents in texts.general.items()},
        benchmarks={name: corpus(name, "benchmark", documents) for name, documents in texts.benchmarks.items()},
    )
    if texts.replay:
        found.replay = corpus("general", "replay", chain.from_iterable(texts.replay.values()))
    return found


def _encoded(
    documents: Iterable[Document], context: JobContext, templates: Templates
) -> Iterator[tuple[list[int], list[bool] | None]]:
    """Tokenise documents, a batch of them in memory at a time; conversations with marks of what the assistant says."""
    remaining = iter(documents)
    while batch := list(islice(remaining, _BATCH_DOCUMENTS)):
        texts = iter(encoder_of(context.tokenizer).documents([entry.text for entry in batch if not entry.chat]))
        for entry in batch:
            if not entry.chat:
                yield next(texts), None
            elif (laid := templates.document(Conversation.from_json(entry.chat))) is not None:
                yield laid


def template_of(chosen: str, root: Path) -> str:
    """Return the source of the template in a file below `root`, or the name or source that `chosen` is. Raises `NotFound`."""
    if "{" in chosen:
        return chosen
    file = root / chosen
    if not chosen or not file.is_file():
        if "/" in chosen or chosen.endswith((".jinja", ".jinja2", ".j2", ".txt")):
            raise NotFound(f"there is no chat template {file}; paths are relative to the job's file")
        return chosen
    return read_template(file)


def _chats(laid: Laid) -> list[Finding]:
    """Say how many conversations were laid out, how much of them is learned, and which were left out, and why."""
    lost = sum(laid.skipped.values())
    if not laid.conversations and not lost:
        return []
    numbers = {**vars(laid), "skipped": dict(laid.skipped)}
    detail = f"{formats.count(laid.conversations, 'conversation')} by {laid.template}"
    if laid.read:
        share = formats.percent(laid.learned / laid.read, 0)
        detail += f", {share} of their tokens are the assistant's and are learned"
    if lost:
        detail += f"; {lost} left out: {'; '.join(f'{why} ({count})' for why, count in laid.skipped.most_common(5))}"
    if not laid.conversations:
        remedy = "bring conversations that the template takes, or name another template in `chat_template`"
        return [Finding("chat", "error", detail, remedy, numbers)]
    if laid.template == PLAIN_WORDS:
        remedy = "the base has no chat template: if it is made for one, name its file in `chat_template`"
        return [Finding("chat", "warning", detail, remedy, numbers)]
    return [Finding("chat", "warning" if lost else "ok", detail, "look at what was left out" if lost else "", numbers)]


def _sizes(found: Corpora, held: dict[str, Corpus], spec: RunSpec) -> list[Finding]:
    length = spec.training.sequence_length
    sizes = [_enough("probe", found.probe, length, 1), _enough("train", found.train, length, _wanted(spec))]
    sizes.append(_holdout(found.holdout, spec, spec.domain))
    if not held:
        remedy = "give `general` text, or bring another domain on this base first, whose hold-out is then used"
        sizes.append(Finding("size", "error", "there is no general text, so forgetting could not be measured", remedy))
    sizes += [_holdout(corpus, spec, domain) for domain, corpus in held.items()]
    sizes += [_enough(f"benchmark {name}", corpus, length, 2) for name, corpus in found.benchmarks.items()]
    if spec.training.replay_share and (found.replay is None or len(found.replay.tokens) <= length):
        remedy = "give more general text, or set replay to 0"
        sizes.append(Finding("size", "error", "there is too little general text to replay", remedy))
    return sizes


def _wanted(spec: RunSpec) -> int:
    """Return the number of sequences that one miner trains on in a cycle."""
    return max(1, spec.training.local_steps * spec.training.batch_sequences)


def _enough(part: str, corpus: Corpus, length: int, wanted: int) -> Finding:
    """Return an error where there is not one sequence (two for a benchmark, or it had no interval), a warning where a miner
    would see text again within a cycle."""
    tokens = len(corpus.tokens)
    rows = tokens // (length + 1)
    numbers = {"tokens": len(corpus.tokens), "documents": corpus.documents, "sequences": rows}
    needed = 2 if part.startswith("benchmark") else 1
    detail = (
        f"{part}: {formats.count(corpus.documents, 'document')}, "
        f"{formats.count(len(corpus.tokens), 'token')}, {formats.count(rows, 'sequence')} of {length}"
    )
    if rows < needed:
        missing = needed * (length + 1) - tokens
        remedy = f"add about {formats.count(missing, 'token')} of text, or lower policies.training.sequence_length"
        return Finding("size", "error", f"{detail}; {needed} needed", remedy, numbers)
    if rows < wanted:
        remedy = (
            f"a miner reads {formats.count(wanted, 'sequence')} a cycle "
            f"and sees this text again; more text helps more than more cycles"
        )
        return Finding("size", "warning", detail, remedy, numbers)
    return Finding("size", "ok", detail, "", numbers)


def _holdout(corpus: Corpus, spec: RunSpec, domain: str) -> Finding:
    numbers = {"tokens": len(corpus.tokens), "documents": corpus.documents}
    aim = RunSpec()
    aim.CopyFrom(spec)
    aim.holdout.domain = spec.domain
    try:
        parts = subsets(sequences(corpus, spec), aim, domain)
    except Invalid as error:
        remedy = (
            "hold out more text (`split.holdout`, `holdout` or `general`), or lower the numbers it names in `policies`"
        )
        return Finding("size", "error", f"hold-out of {domain}: {error}", remedy, numbers)
    uses = {"score": len(parts.score), "gate": len(parts.gate), "report": len(parts.report)}
    what = ", ".join(f"{count} to {use}" for use, count in uses.items())
    detail = (
        f"hold-out of {domain}: {formats.count(corpus.documents, 'document')}, "
        f"{formats.count(len(corpus.tokens), 'token')}; sequences: {what}"
    )
    return Finding("size", "ok", detail, "", {**numbers, **uses})


def _lengths(corpus: Corpus, length: int) -> list[Finding]:
    sizes = np.sort(np.diff(corpus.offsets))
    if len(sizes) < 2:
        return []
    cut = float(np.mean(sizes > length))
    numbers = {
        "shortest": int(sizes[0]), "median": float(np.median(sizes)), "p95": int(sizes[int(0.95 * (len(sizes) - 1))]),
        "longest": int(sizes[-1]), "longer_than_a_sequence": cut,
    }  # fmt: skip
    detail = (
        f"documents have {numbers['shortest']} to {numbers['longest']} tokens, "
        f"half of them at most {numbers['median']:g}; "
        f"{formats.percent(cut, 0)} are longer than a sequence of {length} and are read in pieces"
    )
    return [Finding("length", "ok", detail, "", numbers)]


def _fit(found: Corpora, texts: Texts, held: dict[str, Corpus], context: JobContext) -> list[Finding]:
    """Compare the tokenizer's fit to the target's text with its fit to general text."""
    mine = fit_of((document.text for document in texts.train), context.encode, context.tokenizer)
    if mine is None:
        return []
    found.fit["target"] = mine
    general = fit_of(_decoded(held, context.tokenizer), context.encode, context.tokenizer)
    numbers: dict[str, Any] = {"target": vars(mine)}
    detail = f"{mine.tokens_per_word:.2f} tokens a word, {mine.bytes_per_token:.2f} bytes a token"
    detail += f", {formats.percent(mine.fallback)} of tokens are pieces of characters or unknown"
    if general is None:
        return [Finding("tokenizer", "ok", detail, "", numbers)]
    found.fit["general"], numbers["general"] = general, vars(general)
    pieces = formats.percent(general.fallback)
    detail += f" (general text: {general.tokens_per_word:.2f}, {general.bytes_per_token:.2f}, {pieces})"
    poor = mine.bytes_per_token * POOR_FIT < general.bytes_per_token
    if poor or mine.fallback > general.fallback + POOR_FALLBACK:
        remedy = (
            "the base's tokenizer cuts this text into many small pieces: sequences hold less of it and training costs "
            "more; check language and encoding of the text, or choose a base made for it"
        )
        return [Finding("tokenizer", "warning", detail, remedy, numbers)]
    return [Finding("tokenizer", "ok", detail, "", numbers)]


def _decoded(held: dict[str, Corpus], tokenizer: Any) -> list[str]:
    found: list[str] = []
    characters = 0
    for corpus in held.values():
        for index in range(corpus.documents):
            if characters > _SAMPLE_CHARACTERS:
                return found
            found.append(str(tokenizer.decode(corpus.document(index).tolist())))
            characters += len(found[-1])
    return found


def fit_of(texts: Iterable[str], encode: Callable[[list[str]], list[list[int]]], tokenizer: Any) -> Fit | None:
    """Return tokens per word, bytes per token and fallback rate over a beginning of `texts`; None without words."""
    sample: list[str] = []
    characters = 0
    for text in texts:
        if characters > _SAMPLE_CHARACTERS:
            break
        sample.append(text[:_SAMPLE_CHARACTERS])
        characters += len(text)
    ids = [token for document in encode(sample) for token in document]
    words = sum(len(_WORD.findall(text)) for text in sample)
    if not ids or not words:
        return None
    pieces = {token: _is_piece(token, tokenizer) for token in set(ids)}
    size = sum(len(text.encode()) for text in sample)
    return Fit(len(ids) / words, size / len(ids), sum(pieces[token] for token in ids) / len(ids), len(ids))


def _is_piece(token: int, tokenizer: Any) -> bool:
    """Return whether a token is no whole character: a fallback byte, part of a character's bytes, or the unknown token."""
    if token == tokenizer.unk_token_id and token != tokenizer.eos_token_id:
        return True
    name = tokenizer.convert_ids_to_tokens(token)
    return bool(_BYTE_TOKEN.fullmatch(str(name))) or "\ufffd" in tokenizer.decode([token])
