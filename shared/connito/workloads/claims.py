"""Counting again what submissions claim of their text, on the full model that judges them. Blocking; needs torch."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from connito.data.corpus import Corpus
from connito.data.packing import Rows, text_of
from connito.errors import Invalid
from connito.protocol.claims import claim_of, claimed_rows, falsehood
from connito.protocol.coding import stated
from connito.protocol.findings import Refusal
from connito.protocol.sequences import miner_batches, sequences
from connito.protocol.submission import read_header
from connito.v1 import cycle_pb2, reasons_pb2
from connito.v1.run_pb2 import RunSpec
from connito.wire.facts import RunFacts
from connito.workloads.shared_losses import SharedLosses

if TYPE_CHECKING:
    from connito.moe.evaluate import Evaluator


class Text:
    """The training text of a run, from which follows what each miner was given."""

    def __init__(self, spec: RunSpec, train: Path, replay: Path | None) -> None:
        self.train = sequences(Corpus.load(train), spec)
        self.replay = None if replay is None else sequences(Corpus.load(replay), spec)


class Recount:
    """Recounts the claims of those submissions of a cycle whose miners are `drawn`."""

    def __init__(
        self,
        evaluator: Evaluator,
        text: Text,
        facts: RunFacts,
        cycle: int,
        drawn: Container[str],
        shared: SharedLosses | None = None,
    ) -> None:
        self._evaluator, self._text, self._facts, self._cycle, self._drawn = evaluator, text, facts, cycle, drawn
        self._shared = shared or SharedLosses(None, facts.run)

    def falsehood(self, entry: cycle_pb2.Submission, artifact: Path, start: Path) -> Refusal | None:
        """Return why a drawn submission's claim is false, from its file and the state that it started from; None when it is
        not, or makes none. May leave `start` in the model.
        """
        if entry.miner not in self._drawn:
            return None
        spec, selection = self._facts.require_spec(), self._facts.require_selection()
        try:
            claim = claim_of(replace(read_header(start), metadata=stated(artifact, spec.training)), spec, selection)
        except Invalid:
            return None  # whoever reads its tensors says so
        if claim is None:
            return None
        cycle = entry.origin_cycle or self._cycle
        rows = claimed_rows(miner_batches(self._facts, cycle, entry.miner, self._text.train, self._text.replay))
        begun_from = entry.base_state.digest or self._facts.window("train", cycle).require_opened().state.digest
        counted = self._shared.counts(begun_from, rows, lambda: self._count(start, rows))
        found = falsehood(claim, counted, int(text_of(rows[:, :-1]).sum()))
        return None if found is None else Refusal(reasons_pb2.REASON_FALSE_CLAIM, found)

    def _count(self, start: Path, rows: Rows) -> dict[int, list[int]]:
        from connito.moe.routed import routed_tokens
        from connito.moe.state import load_state

        self._evaluator.put(load_state(start))
        with self._evaluator.begun(rows):
            return routed_tokens(self._evaluator.model, self._evaluator.targets, rows)
