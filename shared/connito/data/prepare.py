"""From documents to the three corpora of a domain: probe (what selects experts), train, and hold-out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from connito.data.corpus import Corpus
from connito.data.dedup import contaminated, deduplicate
from connito.errors import Invalid
from connito.v1 import reasons_pb2 as reasons
from connito.wire.hashing import hash_fields

SPLIT_TAG = b"connito.v1.text.split"

# A batch of texts in, token ids of each out; no special tokens.
Encode = Callable[[list[str]], Sequence[Sequence[int]]]

_BATCH_DOCUMENTS = 512


@dataclass(frozen=True)
class Split:
    """Shares of documents; what is left of 1 trains."""

    probe: float = 0.05
    holdout: float = 0.15

    def __post_init__(self) -> None:
        if not (self.probe > 0 and self.holdout > 0 and self.probe + self.holdout < 1):
            raise Invalid(
                f"a split of {self.probe} probe and {self.holdout} hold-out leaves nothing for one of the three parts; "
                "all must be above 0",
                reason=reasons.REASON_BAD_SPEC,
            )


@dataclass(frozen=True)
class Statistics:
    """Counts of documents and tokens per part of a preparation, for the report and the data statement."""

    domain: str
    documents: int
    empty: int
    exact_duplicates: int
    near_duplicates: int
    contaminated: int
    unused: int
    probe_documents: int
    train_documents: int
    holdout_documents: int
    probe_tokens: int
    train_tokens: int
    holdout_tokens: int

    def to_json(self) -> str:
        """Return the report as one JSON object."""
        return json.dumps(asdict(self), indent=2, sort_keys=True)


@dataclass(frozen=True)
class Prepared:
    """The corpora of one domain. `train_texts` is what may be shown to anything that learns, such as routers."""

    probe: Corpus
    train: Corpus
    holdout: Corpus
    statistics: Statistics
    train_texts: list[str]


def part_of(document: str, split: Split) -> str:
    """probe, train or holdout, from the hash of the text alone: adding documents never moves another one."""
    place = int.from_bytes(hash_fields(SPLIT_TAG, document)[:8], "big") / 2**64
    if place < split.holdout:
        return "holdout"
    return "probe" if place < split.holdout + split.probe else "train"


def prepare_corpora(
    domain: str,
    documents: Sequence[str],
    encode: Encode,
    *,
    tokenizer_digest: str,
    separator: int,
    split: Split | None = None,
    max_tokens: int = 0,
    min_tokens: int = 0,
    near: float = 0.7,
) -> Prepared:
    """De-duplicate, split by document hash, decontaminate, tokenise.

    Nothing that is in the hold-out, or mostly made of it, is left in probe or train. `separator` is the token id put
    behind every document when packing. `max_tokens` (0: all) stops at that many tokens over the three parts, in the
    order of `documents`. `min_tokens` is what each part must have. Raises `Invalid` (BAD_SPEC) with the numbers when
    there is too little text.
    """
    split = split or Split()
    texts = [text.strip() for text in documents]
    filled = [text for text in texts if text]
    unique = deduplicate(filled, near)
    kept = [filled[index] for index in unique.kept]
    encoded = _encode(kept, encode, max_tokens)
    kept_used = kept[: len(encoded)]
    parts: dict[str, list[int]] = {"probe": [], "train": [], "holdout": []}
    for index, text in enumerate(kept_used):
        parts[part_of(text, split)].append(index)
    held_out = [kept_used[index] for index in parts["holdout"]]
    dropped = 0
    for name in ("probe", "train"):
        dirty = {parts[name][i] for i in contaminated([kept_used[index] for index in parts[name]], held_out)}
        parts[name] = [index for index in parts[name] if index not in dirty]
        dropped += len(dirty)
    corpora = {
        name: Corpus.from_documents(
            [encoded[index] for index in members],
            {"domain": domain, "split": name, "tokenizer": tokenizer_digest, "separator": str(separator)},
        )
        for name, members in parts.items()
    }
    _check_size(domain, corpora, min_tokens, len(filled))
    statistics = Statistics(
        domain=domain,
        documents=len(texts),
        empty=len(texts) - len(filled),
        exact_duplicates=unique.exact,
        near_duplicates=unique.near,
        contaminated=dropped,
        unused=len(kept) - len(kept_used),
        **{f"{name}_documents": corpus.documents for name, corpus in corpora.items()},
        **{f"{name}_tokens": len(corpus.tokens) for name, corpus in corpora.items()},
    )
    return Prepared(**corpora, statistics=statistics, train_texts=[kept_used[index] for index in parts["train"]])


def _encode(documents: list[str], encode: Encode, max_tokens: int) -> list[Sequence[int]]:
    encoded: list[Sequence[int]] = []
    total = 0
    for start in range(0, len(documents), _BATCH_DOCUMENTS):
        for tokens in encode(documents[start : start + _BATCH_DOCUMENTS]):
            if max_tokens and total >= max_tokens:
                return encoded
            encoded.append(tokens)
            total += len(tokens)
    return encoded


def _check_size(domain: str, corpora: dict[str, Corpus], min_tokens: int, documents: int) -> None:
    for name, corpus in corpora.items():
        if len(corpus.tokens) < max(min_tokens, 1):
            raise Invalid(
                f"too little text for {domain}: {documents} documents leave {corpus.documents} documents with "
                f"{len(corpus.tokens)} tokens for the {name} part, which needs {max(min_tokens, 1)}; add documents, or "
                "give that part a larger share",
                reason=reasons.REASON_BAD_SPEC,
            )


def tokenizer_digest(files: Iterable[Path]) -> str:
    """Return hex SHA-256 over a tokenizer's files (name and content, sorted by name): what `tokenizer_digest` stands
    for.
    """
    state = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        state.update(hash_fields(b"connito.v1.tokenizer", file.name, file.read_bytes()))
    return state.hexdigest()
