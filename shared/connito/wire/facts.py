"""A run as the set of its facts: the one projection that every service decides on.

A fact is written once, to a subject of its own, and never changes; so a run's state is a set that only grows, the
order in which streams are read does not matter, and applying a fact twice is applying it once. What to do next is a
pure function of that set and the time (each service's `handlers.py`), evaluated whenever something arrived.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from itertools import count

from connito.v1 import cycle_pb2, run_pb2
from connito.wire.fact import Fact, FactSet, message_of, require
from connito.wire.subjects import WINDOWS
from connito.wire.window import Window


class RunFacts(FactSet):
    """The facts of one run, kind by kind.

    Accessors return messages; those called `…_fact` return the message with its place in the log, and plurals map ids to
    facts in the order of ids.
    """

    # The run: what was asked for, who takes part, how it ended.

    @property
    def created_fact(self) -> Fact[run_pb2.RunCreated] | None:
        """Return the specification as it was written."""
        return self.one(run_pb2.RunCreated, "run", 0, "created")

    @property
    def spec(self) -> run_pb2.RunSpec | None:
        """Return the run's specification."""
        created = self.created_fact
        return None if created is None else created.message.spec

    def require_created(self) -> run_pb2.RunCreated:
        """Return the specification with the customer's order for it. Raises `MissingFactError` for what is no run."""
        return require(message_of(self.created_fact), self.run, "specification")

    def require_spec(self) -> run_pb2.RunSpec:
        """Return the specification of a run that was created. Raises `MissingFactError` for another."""
        return require(self.spec, self.run, "specification")

    @property
    def selected_fact(self) -> Fact[run_pb2.SelectionMade] | None:
        """Return the selection as it was written."""
        return self.one(run_pb2.SelectionMade, "run", 0, "selected")

    @property
    def selection(self) -> run_pb2.SelectionMade | None:
        """Return the target experts."""
        return message_of(self.selected_fact)

    def require_selection(self) -> run_pb2.SelectionMade:
        """Return the target experts of a run that was assembled. Raises `MissingFactError` before the selection."""
        return require(self.selection, self.run, "selection")

    @property
    def selection_failed(self) -> run_pb2.SelectionFailed | None:
        """Return the reason why no experts could be selected."""
        return message_of(self.one(run_pb2.SelectionFailed, "run", 0, "selection_failed"))

    @property
    def ended_fact(self) -> Fact[run_pb2.RunEnded] | None:
        """Return the end as it was written."""
        return self.one(run_pb2.RunEnded, "run", 0, "ended")

    @property
    def ended(self) -> run_pb2.RunEnded | None:
        """Return the outcome, once the run has ended."""
        return message_of(self.ended_fact)

    @property
    def paused(self) -> list[run_pb2.RunPaused]:
        """Return who stopped working on the run, in the order of keys, as far as the run has not gone on since.

        What is left to do in one that has ended is its deposit.
        """
        found = [fact.message for fact in self.many(run_pb2.RunPaused, "run", 0, "paused").values()]
        if self.ended is not None:
            left = [message for message in found if (message.service, message.action) == ("library", "deposit")]
            return [] if self.deposits else left
        return [message for message in found if message.in_cycle == self.cycle]

    @property
    def enrolled(self) -> Mapping[str, Fact[run_pb2.MinerEnrolled]]:
        """Return enrolments by miner."""
        return self.many(run_pb2.MinerEnrolled, "run", 0, "miner")

    @property
    def miners(self) -> list[str]:
        """Return enrolled miners, sorted."""
        return list(self.enrolled)

    def is_enrolled(self, miner: str) -> bool:
        """Return whether a key is enrolled, without a look at all of them."""
        return self.has("run", 0, "miner", miner)

    def label(self, key: str) -> str:
        """Return the label that a miner enrolled with, or a validator joined with; the empty string for none."""
        enrolled = self.one(run_pb2.MinerEnrolled, "run", 0, "miner", key)
        if enrolled is not None:
            return enrolled.message.label
        joined = self.joined.get(key)
        return "" if joined is None or not joined.message.label.isprintable() else joined.message.label

    @property
    def joined(self) -> Mapping[str, Fact[run_pb2.ValidatorJoined]]:
        """Return validators that joined, by key."""
        return self.many(run_pb2.ValidatorJoined, "run", 0, "validator")

    @property
    def validators(self) -> list[str]:
        """Return validators that joined, sorted."""
        return list(self.joined)

    @property
    def stakes(self) -> Mapping[str, Fact[run_pb2.StakeCounted]]:
        """Return what votes weigh in this run before trust, by validator."""
        return self.many(run_pb2.StakeCounted, "run", 0, "stake")

    def stake(self, validator: str) -> float | None:
        """Return what a validator's vote weighs in this run; None until the log says so."""
        counted = self.stakes.get(validator)
        return None if counted is None else counted.message.stake

    @property
    def invites_used(self) -> Mapping[str, Fact[run_pb2.InviteUsed]]:
        """Return uses of invites, by invite and number."""
        return self.many(run_pb2.InviteUsed, "run", 0, "invited")

    @property
    def bans(self) -> Mapping[str, Fact[run_pb2.MinerBan]]:
        """Return bans and their liftings, by miner and number."""
        return self.many(run_pb2.MinerBan, "run", 0, "ban")

    @property
    def benchmarked(self) -> run_pb2.BenchmarksMeasured | None:
        """Return what base and result score on the run's benchmarks and tasks, once it has ended."""
        return message_of(self.one(run_pb2.BenchmarksMeasured, "library", 0, "benchmarked"))

    @property
    def deposits(self) -> Mapping[str, Fact[run_pb2.ExpertDeposited]]:
        """Return experts of this run in the library, by expert id."""
        return self.many(run_pb2.ExpertDeposited, "library", 0, "deposited")

    @property
    def archived(self) -> run_pb2.RunArchived | None:
        """Return which file holds the run, once its windows were released from the streams."""
        return message_of(self.one(run_pb2.RunArchived, "library", 0, "archived"))

    @property
    def uses(self) -> Mapping[str, Fact[run_pb2.ExpertUsed]]:
        """Return uses of library experts that were declared, by id."""
        return self.many(run_pb2.ExpertUsed, "library", 0, "used")

    @property
    def notices(self) -> Mapping[str, Fact[run_pb2.ExpertNotice]]:
        """Return what was said about experts and sources of data, by id."""
        return self.many(run_pb2.ExpertNotice, "library", 0, "notice")

    # The log itself.

    @property
    def log_id(self) -> str:
        """Return what tells this run's log from any other of a run of the same name; empty before the run was created."""
        created = self.created_fact
        return "" if created is None else created.digest.hex()

    def head(self, number: int) -> Fact[run_pb2.LogHead] | None:
        """Return a signed head of the log."""
        return self.one(run_pb2.LogHead, "run", number, "head")

    def cosigned(self, number: int) -> Mapping[str, Fact[run_pb2.HeadCosigned]]:
        """Return validators' cosignatures under a head."""
        return self.many(run_pb2.HeadCosigned, "run", number, "cosigned")

    def received(self, number: int) -> Fact[run_pb2.IngressHead] | None:
        """Return a receipt for what miners had said."""
        return self.one(run_pb2.IngressHead, "run", number, "received")

    @property
    def newest_receipt(self) -> run_pb2.IngressHead | None:
        """Return the last of the receipts, which are numbered without gaps; None before the first."""
        beyond = next(1 << power for power in count() if self.received(1 << power) is None)
        last = bisect_left(range(1, beyond), True, key=lambda number: self.received(number) is None)
        return message_of(self.received(last))

    @property
    def next_head(self) -> int:
        """Return the number of the head to be written next."""
        return next(number for number in count(max(1, self.cycle)) if self.head(number) is None)

    # One cycle, window by window.

    def cycles(self) -> range:
        """Return the numbers of the cycles whose train window was opened, from 1."""
        return range(1, self.cycle + 1)

    @property
    def recent(self) -> range:
        """Return the cycles in which something may be left to do: a cycle opens when the one before has its version, and
        streams are read side by side.
        """
        return range(max(1, self.cycle - 1), self.cycle + 1)

    def window(self, name: str, cycle: int) -> Window:
        """Return one window of one cycle."""
        return Window(self, name, cycle)

    def windows(self, cycle: int) -> list[Window]:
        """Return the windows of a cycle in their order."""
        return [Window(self, name, cycle) for name in WINDOWS]

    @property
    def next_train(self) -> Window:
        """Return the train window of the cycle after the current one, not opened yet."""
        return Window(self, "train", self.cycle + 1)

    @property
    def open_window(self) -> Window | None:
        """Return the window of the current cycle that is opened and not closed; None between windows."""
        opened = [window for window in self.windows(self.cycle) if window.opened is not None]
        return opened[-1] if opened and opened[-1].is_open else None

    def trained(self, cycle: int) -> Mapping[str, Fact[cycle_pb2.TrainingFinished]]:
        """Return the miners that said their local steps are done."""
        return self.many(cycle_pb2.TrainingFinished, "ingress", cycle, "trained")

    def seed_commitments(self, cycle: int) -> Mapping[str, Fact[cycle_pb2.SeedCommitted]]:
        """Return validators' commitments to their secrets."""
        return self.many(cycle_pb2.SeedCommitted, "train", cycle, "seed")

    def seed_reveals(self, cycle: int) -> Mapping[str, Fact[cycle_pb2.SeedRevealed]]:
        """Return validators' secrets."""
        return self.many(cycle_pb2.SeedRevealed, "validate", cycle, "seed")

    def seed_commitment(self, cycle: int, validator: str) -> cycle_pb2.SeedCommitted | None:
        """Return a validator's commitment to its secret."""
        return message_of(self.one(cycle_pb2.SeedCommitted, "train", cycle, "seed", validator))

    def commitments(self, cycle: int) -> Mapping[str, Fact[cycle_pb2.CommitmentAccepted]]:
        """Return accepted commitments by miner."""
        return self.many(cycle_pb2.CommitmentAccepted, "commit", cycle, "accepted")

    def commitment(self, cycle: int, miner: str) -> cycle_pb2.CommitmentAccepted | None:
        """Return a miner's accepted commitment."""
        return message_of(self.one(cycle_pb2.CommitmentAccepted, "commit", cycle, "accepted", miner))

    def reveals(self, cycle: int) -> Mapping[str, Fact[cycle_pb2.RevealAccepted]]:
        """Return the accepted reveals that `cycle` scores, by miner."""
        return self.many(cycle_pb2.RevealAccepted, "submit", cycle, "accepted")

    def reveal(self, cycle: int, miner: str) -> cycle_pb2.RevealAccepted | None:
        """Return a miner's accepted reveal that `cycle` scores."""
        return message_of(self.one(cycle_pb2.RevealAccepted, "submit", cycle, "accepted", miner))

    def require_drawn(self, cycle: int) -> cycle_pb2.SeedDrawn:
        """Return a cycle's draw. Raises `MissingFactError` before it."""
        return require(self.drawn(cycle), self.run, f"draw in cycle {cycle}")

    def drawn(self, cycle: int) -> cycle_pb2.SeedDrawn | None:
        """Return a cycle's seed and the validators whose secrets are in it."""
        return message_of(self.window("validate", cycle).drawn_fact)

    def objections(self, cycle: int) -> Mapping[str, Fact[cycle_pb2.Objection]]:
        """Return validators' objections to a cycle that breaks a rule."""
        return self.many(cycle_pb2.Objection, "validate", cycle, "objection")

    def reports(self, cycle: int) -> Mapping[str, Fact[cycle_pb2.ScoreReport]]:
        """Return score reports by validator."""
        return self.many(cycle_pb2.ScoreReport, "validate", cycle, "report")

    def scored_fact(self, cycle: int) -> Fact[cycle_pb2.CycleScored] | None:
        """Return a cycle's result as it was written."""
        return self.one(cycle_pb2.CycleScored, "merge", cycle, "scored")

    def scored(self, cycle: int) -> cycle_pb2.CycleScored | None:
        """Return a cycle's verdicts and standings."""
        return message_of(self.scored_fact(cycle))

    def result_before(self, cycle: int) -> cycle_pb2.CycleScored:
        """Return the result of the cycle before, empty before the first one."""
        return self.scored(cycle - 1) or cycle_pb2.CycleScored()

    def version_fact(self, cycle: int) -> Fact[cycle_pb2.VersionPublished] | None:
        """Return the version that a cycle produced as it was written."""
        return self.one(cycle_pb2.VersionPublished, "merge", cycle, "version")

    def version(self, cycle: int) -> cycle_pb2.VersionPublished | None:
        """Return the model version that a cycle produced."""
        return message_of(self.version_fact(cycle))

    @property
    def latest_version(self) -> cycle_pb2.VersionPublished | None:
        """Return the newest model version that a cycle produced; None before the first."""
        found = (self.version(cycle) for cycle in reversed(self.cycles()))
        return next((version for version in found if version is not None), None)

    @property
    def versions(self) -> dict[int, cycle_pb2.VersionPublished]:
        """Return published model versions by cycle, the first cycle first."""
        known = {cycle: self.version(cycle) for cycle in self.cycles()}
        return {cycle: version for cycle, version in known.items() if version is not None}


def experts_of(selection: run_pb2.SelectionMade) -> tuple[dict[int, list[int]], dict[int, list[int]]]:
    """Return target experts and helpers by layer."""
    targets = {layer.layer: list(layer.experts) for layer in selection.layers}
    return targets, {layer.layer: list(layer.helpers) for layer in selection.layers}
