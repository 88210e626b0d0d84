"""The names that requests may use, and the rows behind them: loaded when first asked for, gone when they may not be used.

`<base>` is the base, `<base>+<expert>` an expert, `<base>+<a>+<b>` their composition (linear, equal weights), and
`<base>+<a>|<b>` both, among which every token chooses.
"""

from __future__ import annotations

import time
from collections import Counter, OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from connito.curation.composing import parts_of
from connito.curation.holdings import Agreement, Expert, Holdings
from connito.curation.serving.errors import RefusedError
from connito.data.manifest import Manifest
from connito.errors import Invalid, NotFound
from connito.experts.compose import Part, Recipe, merge
from connito.experts.table import BASE, ExpertTable
from connito.library.artifact import EXPERT_FILE, MODEL_FORMAT
from connito.library.governance import Standing, Viewer
from connito.library.schema import Base, ExpertRecord
from connito.render import formats

VERB = "serve"
MAX_PARTS, MAX_NAME = 8, 200


@dataclass
class Loaded:
    """Rows in the table. `busy`: requests that are computed with them; `gone`: why no more may be."""

    slot: int
    experts: tuple[str, ...]
    busy: int = 0
    gone: str = ""


@dataclass(frozen=True)
class Asked:
    """A model name, read: `key` is the same for every way to write it."""

    key: str
    experts: tuple[str, ...] = ()
    routed: bool = False


class Roster:
    """Experts of one base for many viewers. Its methods that load or unload change the table: call them while it rests."""

    def __init__(
        self,
        base: str,
        manifest: Manifest,
        table: ExpertTable,
        holdings: Holdings,
        agreement: Agreement,
        *,
        places: int,
    ) -> None:
        """Serve experts of the base that `manifest` describes, at most `places` ways at once."""
        self.base, self._manifest, self._table = base, manifest, table
        self._holdings, self._agreement, self._places = holdings, agreement, places
        self.loaded: OrderedDict[str, Loaded] = OrderedDict()
        self._found: dict[str, Expert] = {}
        self._records: dict[str, ExpertRecord] = {}
        self._bases: dict[tuple[str, str], bool] = {}
        self._permitted: dict[tuple[str, Viewer], float] = {}
        self._uses: Counter[tuple[str, Viewer]] = Counter()

    def read(self, name: str) -> Asked:
        """Read a model name. Raises `RefusedError` (404) for one that names another base or no expert."""
        if name == self.base:
            return Asked(name)
        rest = name.removeprefix(f"{self.base}+")
        routed = "|" in rest
        experts = tuple(sorted(set(rest.split("|" if routed else "+"))))
        longest = max(len(expert.encode()) for expert in experts)
        if rest == name or not all(experts) or longest > MAX_NAME or (routed and (len(experts) < 2 or "+" in rest)):
            raise unknown(name)
        if len(experts) > MAX_PARTS:
            raise RefusedError(
                400,
                f"{formats.count(len(experts), 'expert')} in one model are too many: at most {MAX_PARTS}",
                param="model",
            )
        return Asked(f"{self.base}+{('|' if routed else '+').join(experts)}", experts, routed)

    def names(self, viewer: Viewer) -> list[str]:
        """Return the base and every expert of it that the viewer may use now: on the shelf, and in the platform's library."""
        self._records |= self._holdings.records(self._records)
        mine = {name: record for name, record in self._records.items() if self._serves(record)}
        standings, seer = self._holdings.standings(list(mine)), replace(self._holdings, viewer=viewer)
        usable = [name for name, record in mine.items() if self._may(seer, record, standings)]
        return [self.base, *(f"{self.base}+{name}" for name in usable)]

    def permit(self, asked: Asked, viewer: Viewer, seconds: float) -> None:
        """Raise `RefusedError` unless the viewer may use these experts so; what was allowed is asked again after `seconds`."""
        if self._permitted.get((asked.key, viewer), 0.0) > time.monotonic() - seconds:
            return
        experts = [self._expert(name) for name in asked.experts]
        try:
            verb = "compose" if len(experts) > 1 else VERB
            replace(self._holdings, viewer=viewer).permit(experts, verb, self._agreement)
        except Invalid as error:
            hidden = next((name for name in asked.experts if not viewer.sees(self._expert(name)[1])), None)
            raise (unknown(hidden) if hidden else refused(str(error))) from error
        if len(self._permitted) > 10_000:
            self._permitted.clear()
        self._permitted[asked.key, viewer] = time.monotonic()

    def load(self, asked: Asked) -> Loaded:
        """Put the rows of a model in, where they are not, in place of what was used longest ago. Raises `RefusedError`."""
        if asked.key in self.loaded:
            self.loaded.move_to_end(asked.key)
            return self.loaded[asked.key]
        parts = parts_of([self._expert(name) for name in asked.experts])
        try:
            for part in parts:
                assert part.header is not None
                self._table.check(part.header)
            self._make_room()
            self.loaded[asked.key] = Loaded(self._put(asked, parts), asked.experts)
        except Invalid as error:
            raise RefusedError(400, str(error), param="model") from error
        return self.loaded[asked.key]

    def unload_refused(self) -> list[Loaded]:
        """Take out whatever was yanked or opted out since; returns it, with the reason in `gone`."""
        names = sorted({name for loaded in self.loaded.values() for name in loaded.experts})
        bad = {
            name: f"{name} is {said.status}: {said.reason}"
            for name, said in self._holdings.standings(names).items()
            if said.status == "opted-out" or (said.status == "yanked" and not self._agreement.allow_yanked)
        }
        gone = []
        for key, loaded in list(self.loaded.items()):
            if why := next((bad[name] for name in loaded.experts if name in bad), ""):
                loaded.gone = why
                gone.append(self._unload(key))
        if bad:
            self._permitted.clear()
        for name in bad:
            self._found.pop(name, None)
        return gone

    def use(self, asked: Asked, viewer: Viewer) -> None:
        """Count one use of every expert in a model."""
        self._uses.update((name, viewer) for name in asked.experts)

    def write_uses(self) -> None:
        """Write the uses since last time into the ledger."""
        uses, self._uses = self._uses, Counter()
        for (name, viewer), units in uses.items():
            replace(self._holdings, viewer=viewer).meter([{"expert_id": name}], VERB, units)

    def _put(self, asked: Asked, parts: Sequence[Part]) -> int:
        if asked.routed:
            return self._table.add_choice(asked.key, parts)
        if len(parts) == 1:
            return self._table.add(asked.key, parts[0].rows)
        return self._table.add(asked.key, merge(parts, self._table.origin(parts), Recipe()))

    def _make_room(self) -> None:
        while len(self.loaded) >= self._places:
            idle = next((key for key, loaded in self.loaded.items() if not loaded.busy), None)
            if idle is None:
                raise RefusedError(
                    503, f"all {self._places} places for experts are in use; try again", code="overloaded"
                )
            self._unload(idle)

    def _unload(self, key: str) -> Loaded:
        self._table.remove(key)
        return self.loaded.pop(key)

    def _may(self, seer: Holdings, record: ExpertRecord, standings: Mapping[str, Standing]) -> bool:
        try:
            seer.permit([(Path(), record)], VERB, self._agreement, standings)
        except Invalid:
            return False
        return True

    def _serves(self, record: ExpertRecord) -> bool:
        return record.get("format") != MODEL_FORMAT and self._is_of(record["base"])

    def _expert(self, name: str) -> Expert:
        if name not in self._found:
            try:
                found = self._holdings.by_id(name)
            except (NotFound, Invalid) as error:
                raise unknown(name) from error
            if not self._serves(found[1]) or not (found[0] / EXPERT_FILE).is_file():
                raise unknown(name)
            self._found[name] = found
        return self._found[name]

    def _is_of(self, base: Base) -> bool:
        """Return whether it is the base served."""
        known = (base["name"], base["manifest"])
        if known not in self._bases:
            self._bases[known] = self._manifest.is_known_as(*known)
        return self._bases[known]


def unknown(name: str) -> RefusedError:
    """Return the refusal of a model that is not there, or not for whoever asks: these look alike."""
    return RefusedError(
        404,
        f"the model {name[:200]!r} does not exist or you may not use it; see /v1/models",
        code="model_not_found",
        param="model",
    )


def refused(why: str) -> RefusedError:
    """Return the refusal of an expert that may not be used so. An option that would allow it is no field of a request."""
    whose = "; that is an option of `connito serve`, for whoever runs it" if " --" in why else ""
    return RefusedError(403, f"{why}{whose}", code="not_permitted", param="model")


BASE_ALONE = Loaded(BASE, ())
