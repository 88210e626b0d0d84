"""Split a job's text into training, probe and held-out text, without duplicates; find contamination. Needs no model.

Everything is decided by the text and the job alone, so the same job prepared anywhere gives the same corpora. Documents
lie on disk from the moment they are read.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.data.dedup import contaminated, deduplicate
from connito.data.prepare import Split, part_of
from connito.data.reading.passages import CHARACTERS, passages
from connito.data.spool import Records
from connito.errors import Invalid, NotFound
from connito.jobs.findings import Finding
from connito.jobs.sources import Document, Reach, document_spool, read_source, rows_of
from connito.jobs.spec import Benchmark, Job, Source
from connito.render import formats
from connito.runtime.progress import Progress, silent
from connito.wire.hashing import hash_fields

if TYPE_CHECKING:
    from connito.experts.tasks import Task

WEIGHT_TAG = b"connito.v1.job.weight"
# Shared passages (a header, a licence notice) make a few documents look alike; above this share it is no accident.
TOLERATED = 0.02
# From here on a source is more copies than text.
MANY_DUPLICATES = 0.5
_EXAMPLES = 5
# Rows of which even the smallest part, the probe, has one or two.
FEW_ROWS = 20
# Shares of a check that reading and comparing begin at, and documents between two words about it.
_READING, _COMPARING, _TOLD = 0.2, 0.4, 10_000
# Of text that selects experts; scores do not change with more, and the selector reads all of it.
PROBE_CHARACTERS = 100_000
# Of general text: with less, all of it is held out.
ENOUGH_FOR_BOTH = 200_000

Documents = Sequence[Document]


@dataclass
class Texts:
    """The parts of a job's text. `general` and `replay` by domain, `benchmarks` by name."""

    reaches: list[Reach] = field(default_factory=list)
    probe: Documents = ()
    train: Documents = ()
    holdout: Documents = ()
    general: dict[str, Documents] = field(default_factory=dict)
    replay: dict[str, Documents] = field(default_factory=dict)
    benchmarks: dict[str, Documents] = field(default_factory=dict)
    tasks: list[Task] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    progress: Progress = silent

    def note(self, check: str, level: str, detail: str, remedy: str = "", **numbers: Any) -> None:
        """Add a finding."""
        self.findings.append(Finding(check, level, detail, remedy, numbers))


def sort_texts(job: Job, root: Path, progress: Progress = silent) -> Texts:
    """Read everything the job names (paths relative to `root`) and part it. Never raises for the customer's text:
    what is wrong with it is among the findings, all of it at once."""
    texts = Texts(progress=progress)
    data = _as_passages(texts, _read_all(texts, "data", job.data, root))
    held = _unique(_read_all(texts, "holdout", job.holdout, root))
    general = {row.domain: _unique(_read_all(texts, f"general {row.domain}", [row], root)) for row in job.general}
    for benchmark in job.benchmarks:
        if benchmark.task:
            _read_task(texts, benchmark, root)
            continue
        read = _read_all(texts, f"benchmark {benchmark.name}", [benchmark], root)
        texts.benchmarks[benchmark.name] = _unique(read)
    _part(texts, job, _deduplicate(texts, job, data), held)
    _part_general(texts, job, general)
    _decontaminate(texts, job)
    _without_tasks(texts, job)
    _overlap(texts)
    texts.train = weighted(texts.train, [source.weight for source in job.data])
    return texts


def _read_all(texts: Texts, what: str, sources: Sequence[Source], root: Path) -> Records[Document]:
    spool, kept = document_spool(), array("Q")
    for number, source in enumerate(sources):
        reading = rows_of(source, root)
        reach = Reach(source.label, reading.account)
        try:
            found = array("Q")
            for document in read_source(source, number, reading, reach):
                found.append(spool.append(document))
                if len(found) % _TOLD == 0:
                    texts.progress(f"reading {source.label}: {formats.count(len(found), 'document')}", _READING)
        except (Invalid, OSError) as error:
            texts.note(
                "reach", "error", f"{what}: {reading.shown(str(error))}", "correct the path, the template or the file"
            )
            continue
        texts.reaches.append(reach)
        account = reach.account
        numbers = {**account.to_json(), "characters": reach.characters}
        if not reach.documents:
            detail = f"{what}: {reach.label} holds no text ({account})"
            texts.note("reach", "error", detail, "fill it, or take it out of the job", **numbers)
            continue
        detail = f"{what}: {reach.label}: {account}, {formats.count(reach.characters, 'character')}"
        lost = account.empty + sum(count for reason, count in account.dropped.items() if reason.startswith("rows"))
        level = "warning" if lost > account.rows / 10 else "ok"
        remedy = "look at the template and the rows: many give no text" if level == "warning" else ""
        texts.note("reach", level, detail, remedy, **numbers)
        kept.extend(found)
    return Records(spool, kept)


def _as_passages(texts: Texts, rows: Records[Document]) -> Records[Document]:
    """Cut a few long rows into passages, as plain text is: so few documents are not parted evenly, and one not at all."""
    if len(rows) >= FEW_ROWS:
        return rows
    spool, found = document_spool(), array("Q")
    for row in rows:
        parts = [row.text] if row.chat or len(row.text) <= CHARACTERS else passages([row.text])
        found.extend(spool.append(replace(row, text=part.strip())) for part in parts)
    if len(found) == len(rows):
        return rows
    cut = f"{formats.count(len(rows), 'row')} of data, cut into {formats.count(len(found), 'passage')} as plain text is"
    texts.note("reach", "ok", cut, rows=len(rows), passages=len(found))
    return Records(spool, found)


def _unique(documents: Records[Document]) -> Records[Document]:
    return documents.take(deduplicate(documents.mapped(_text)).kept)


def _text(document: Document) -> str:
    return document.own


def _texts(documents: Documents) -> Iterator[str]:
    return map(_text, documents)


def _deduplicate(texts: Texts, job: Job, documents: Records[Document]) -> Records[Document]:
    """Keep the first of equal or nearly equal documents; say how many fell within and across sources."""
    if not documents:
        return documents
    texts.progress(f"comparing {formats.count(len(documents), 'document')}", _COMPARING)
    unique = deduplicate(documents.mapped(_text))
    within, across = Counter[int](), Counter[int]()
    for index, twin in unique.twin.items():
        source = documents[index].source
        (within if documents[twin].source == source else across)[source] += 1
    lost, share = len(unique.twin), len(unique.twin) / len(documents)
    per_source = [
        f"{source.label}: {within[number]} repeat a document of its own, {across[number]} one of another source"
        for number, source in enumerate(job.data)
        if within[number] or across[number]
    ]
    detail = (
        f"{lost} of {formats.count(len(documents), 'document')} repeat "
        f"another one ({unique.exact} exactly, {unique.near} nearly)"
    )
    if per_source:
        detail += "; " + "; ".join(per_source)
    numbers: dict[str, float] = {
        "documents": len(documents),
        "exact": unique.exact,
        "near": unique.near,
        "share": share,
    }
    if len(unique.kept) < 4:
        few = f"{formats.count(len(unique.kept), 'different document')}: too few to train on some and judge by others"
        if lost:
            texts.note("duplicates", "error", detail, f"{few}; add text that is not a copy", **numbers)
        else:
            texts.note("size", "error", few, "add text", **numbers)
    elif share > MANY_DUPLICATES:
        texts.note("duplicates", "warning", detail, "they are dropped; more different text would help", **numbers)
    else:
        texts.note("duplicates", "ok", detail, "they are dropped" if lost else "", **numbers)
    return documents.take(unique.kept)


def _part(texts: Texts, job: Job, kept: Records[Document], held: Records[Document]) -> None:
    """Split by the hash of each text alone, so that adding documents never moves another one."""
    # The smallest share that a split can have: the hold-out is given.
    split = Split(job.split.probe, 1e-12 if job.holdout else job.split.holdout)
    parts = _by_part(kept, split)
    texts.probe, texts.train = _bounded(parts["probe"], parts["train"])
    texts.holdout = held if job.holdout else parts["holdout"]


def _bounded(probe: Records[Document], train: Records[Document]) -> tuple[Records[Document], Records[Document]]:
    """Leave of the probe what selects experts surely; the rest, of a very large job, is trained on."""
    characters = 0
    for place, document in enumerate(probe):
        characters += len(document.text)
        if characters > PROBE_CHARACTERS:
            rest = sorted([*probe.indices[place + 1 :], *train.indices])
            return probe.take(range(place + 1)), train.reordered(rest)
    return probe, train


def _by_part(documents: Records[Document], split: Split) -> dict[str, Records[Document]]:
    places = {"probe": array("Q"), "train": array("Q"), "holdout": array("Q")}
    for place, document in enumerate(documents):
        places[part_of(document.text, split)].append(place)
    return {name: documents.take(found) for name, found in places.items()}


def _decontaminate(texts: Texts, job: Job) -> None:
    """Drop training text that also occurs in the hold-out or a benchmark; where it is more than an accident, and
    the customer gave the held-out text, the job is refused unless it says `contamination: drop`."""
    held = {"hold-out": texts.holdout, **{f"benchmark {name}": docs for name, docs in texts.benchmarks.items()}}
    for name, documents in held.items():
        given = name != "hold-out" or bool(job.holdout)
        before = len(texts.train) + len(texts.probe)
        if not documents or not before:
            continue
        hit = contaminated(_texts(documents), chain(_texts(texts.train), _texts(texts.probe)))
        texts.train, texts.probe = _without(texts.train, documents), _without(texts.probe, documents)
        dropped, share = before - len(texts.train) - len(texts.probe), len(hit) / len(documents)
        numbers: dict[str, float | list[str]] = {"share": share, "found": len(hit), "dropped": dropped}
        detail = f"{len(hit)} of the {formats.count(len(documents), 'document')} of the {name} also occur in the training data"
        if given and share > TOLERATED and job.contamination == "refuse":
            examples = [documents[index].where for index in hit[:_EXAMPLES]]
            remedy = f"take them out of one of the two (first: {', '.join(examples)}), or write `contamination: drop`"
            texts.note("contamination", "error", detail, remedy, **numbers, examples=examples)
        elif dropped > before / 2:
            left = (
                f"{dropped} of {formats.count(before, 'training document')} were dropped, "
                "which share most of their text with held-out ones"
            )
            remedy = (
                f"{left}: take out what documents have in common (headers, templates), or name a `holdout` of your own"
            )
            texts.note(
                "contamination", "warning" if texts.train and texts.probe else "error", detail, remedy, **numbers
            )
        else:
            remedy = f"dropped {formats.count(dropped, 'training document')}" if dropped else ""
            texts.note("contamination", "warning" if given and hit else "ok", detail, remedy, **numbers)


def _read_task(texts: Texts, benchmark: Benchmark, root: Path) -> None:
    from connito.experts.tasks import read_task

    texts.progress(f"reading the task {benchmark.name}", _READING)
    try:
        task = read_task(root / benchmark.task, benchmark.name)
    except (Invalid, NotFound, OSError) as error:
        texts.note("task", "error", f"benchmark {benchmark.name}: {error}", "correct the task file, or leave it out")
        return
    texts.tasks.append(task)
    metrics = ", ".join(str(metric["metric"]) for metric in task.metrics)
    detail = f"benchmark {task.name}: {formats.count(len(task.items), 'item')} of {task.kind}, scored by {metrics}"
    texts.note("task", "ok", detail, items=len(task.items))


def _without_tasks(texts: Texts, job: Job) -> None:
    """Drop training text that shares a run of words with a task's item; where it is more than an accident, the job is refused
    unless it says `contamination: drop`."""
    for task in texts.tasks:
        hit, before = task.seen_in(chain(_texts(texts.train), _texts(texts.probe))), len(texts.train) + len(texts.probe)
        if not hit:
            texts.note("contamination", "ok", f"no item of the task {task.name} is in the training data", found=0)
            continue
        texts.train, texts.probe = _apart(texts.train, task), _apart(texts.probe, task)
        dropped, share = before - len(texts.train) - len(texts.probe), len(hit) / len(task.items)
        numbers: dict[str, float | list[int]] = {"share": share, "found": len(hit), "dropped": dropped}
        detail = (
            f"{len(hit)} of the {formats.count(len(task.items), 'item')} of "
            f"the task {task.name} share a run of words with the training data"
        )
        if share > TOLERATED and job.contamination == "refuse":
            first = ", ".join(str(place + 1) for place in hit[:_EXAMPLES])
            remedy = f"take them out of one of the two (first: items {first}), or write `contamination: drop`"
            texts.note("contamination", "error", detail, remedy, **numbers, examples=hit[:_EXAMPLES])
        else:
            texts.note(
                "contamination",
                "warning",
                detail,
                f"dropped {formats.count(dropped, 'training document')}",
                **numbers,
            )


def _apart(documents: Documents, task: Task) -> Documents:
    dirty = task.held_by(_texts(documents))
    return _take(documents, (place for place in range(len(documents)) if place not in dirty))


def _overlap(texts: Texts) -> None:
    """Warn of a benchmark that is mostly the hold-out, which adds no information."""
    for name, documents in texts.benchmarks.items():
        hit = contaminated(_texts(documents), _texts(texts.holdout)) if documents else []
        if hit:
            share = len(hit) / len(documents)
            detail = (
                f"{len(hit)} of the {formats.count(len(documents), 'document')} "
                f"of the benchmark {name} are also in the hold-out"
            )
            level = "warning" if share > TOLERATED else "ok"
            remedy = (
                "that part of it measures the same thing twice; use text of another source" if level != "ok" else ""
            )
            texts.note("contamination", level, detail, remedy, share=share, found=len(hit))


def _without(documents: Documents, held: Documents) -> Documents:
    dirty = set(contaminated(_texts(documents), _texts(held)))
    return _take(documents, (place for place in range(len(documents)) if place not in dirty))


def _take(documents: Documents, places: Iterable[int]) -> Documents:
    return documents.take(places) if isinstance(documents, Records) else [documents[place] for place in places]


def _part_general(texts: Texts, job: Job, general: dict[str, Records[Document]]) -> None:
    """Split general text: without replay all of it is held out; with it, most may be replayed and none of that is held out.

    Where the job leaves replay open, there has to be enough text for both.
    """
    for domain, documents in general.items():
        texts.general[domain] = documents
        share = job.asked_replay
        if share or (share is None and sum(len(document.text) for document in documents) >= ENOUGH_FOR_BOTH):
            parts = [part_of(document.text, Split(0.01, 0.4)) for document in documents]
            held = documents.take(place for place, part in enumerate(parts) if part == "holdout")
            rest = documents.take(place for place, part in enumerate(parts) if part != "holdout")
            texts.general[domain], texts.replay[domain] = held, _without(rest, held)


def weighted(documents: Documents, weights: Sequence[float]) -> Documents:
    """Repeat each document as its source's weight says, the fraction by the hash of its text. Order is kept.

    A batch draws sequences evenly, so a source of weight 2 is seen twice as often a document as one of weight 1.
    """
    found = array("Q")
    for index, document in enumerate(documents):
        weight = weights[document.source]
        place = int.from_bytes(hash_fields(WEIGHT_TAG, document.text)[:8], "big") / 2**64
        found.extend([index] * (math.floor(weight) + (place < weight - math.floor(weight))))
    return _take(documents, found)
