"""Library experts that a run may start from, by the log and their terms. Pure; measuring is in `experts.start`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path

from connito.errors import Invalid
from connito.library.governance import VISIBILITIES, Viewer, terms_of
from connito.library.schema import Described, Start
from connito.v1 import artifacts_pb2, reasons_pb2, run_pb2
from connito.wire.fact import Fact

AUTO, NONE = "auto", "none"


@dataclass(frozen=True)
class Shelved:
    """A deposit with its record and its file. `notice`: why the library says that it is not to be used, if it does."""

    deposit: run_pb2.ExpertDeposited
    record: Described
    path: Path
    notice: str = ""


def wants_start(spec: run_pb2.RunSpec) -> bool:
    """Return whether the job asks for a start from the library at all. A spec that says nothing does not."""
    return spec.start_from not in ("", NONE)


def deposits(library: Iterable[Fact], spec: run_pb2.RunSpec, upto: int) -> list[run_pb2.ExpertDeposited]:
    """Return deposits of the run's base at or before sequence `upto` of LIBRARY, each expert once, in the order of the
    log.

    Only the expert that the job names, if it names one. Raises `Invalid` (START_IMPOSSIBLE) when that one is not there.
    """
    found: dict[str, run_pb2.ExpertDeposited] = {}
    models: set[str] = set()
    other_bases: dict[str, str] = {}
    for fact in sorted(library, key=lambda fact: fact.sequence):
        message = fact.message
        if not isinstance(message, run_pb2.ExpertDeposited) or fact.sequence > upto:
            continue
        if message.files:
            models.add(message.expert_id)
        elif message.base_digest == spec.base.manifest.digest:
            found.setdefault(message.expert_id, message)
        else:
            other_bases[message.expert_id] = message.base_digest
    if spec.start_from == AUTO:
        return list(found.values())
    if spec.start_from in found:
        return [found[spec.start_from]]
    if spec.start_from in other_bases:
        raise _impossible(
            f"{spec.start_from} is of another base ({other_bases[spec.start_from][:12]}…) than this job's "
            f"({spec.base.manifest.digest[:12]}…); start from one of the same base, or write start_from: auto"
        )
    if spec.start_from in models:
        raise _impossible(
            f"{spec.start_from} is a whole model made of experts, and no rows of this base: to train it further make it the "
            f"base of a job (`connito library export {spec.start_from}`, then base: FOLDER)"
        )
    raise unknown(spec)


def unknown(spec: run_pb2.RunSpec) -> Invalid:
    """Return the same error for a missing expert and for one that the customer may not see."""
    return _impossible(
        f"there is no expert {spec.start_from!r} in the library; `connito library list` shows them, or write "
        "start_from: auto"
    )


def seen_by(spec: run_pb2.RunSpec, record: Described) -> bool:
    """Return whether the run's customer may know of an expert. What a run says of its start is read by every miner."""
    organisations = frozenset({spec.organisation} if spec.organisation else ())
    return Viewer(spec.customer, organisations).sees(record)


def notices(library: Iterable[Fact], upto: float = inf) -> dict[str, str]:
    """Return the notices against experts and data sources at sequence `upto` of LIBRARY: by subject, with the reason."""
    against: dict[str, str] = {}
    for fact in sorted(library, key=lambda fact: fact.sequence):
        message = fact.message
        if not isinstance(message, run_pb2.ExpertNotice) or fact.sequence > upto:
            continue
        if message.kind in _AGAINST:
            against[message.subject] = f"{_AGAINST[message.kind]}: {message.reason}"
        else:
            against.pop(message.subject, None)
    return against


_AGAINST = {
    run_pb2.NOTICE_KIND_DEPRECATED: "deprecated",
    run_pb2.NOTICE_KIND_YANKED: "yanked",
    run_pb2.NOTICE_KIND_OPTED_OUT: "the owner of a source of its data has opted out",
}


def notice_of(record: Described, expert_id: str, against: Mapping[str, str]) -> str:
    """Return the notice against one expert, or against a source of its data; empty if there is none."""
    subjects = (expert_id, *record.get("governance", {}).get("sources", []))
    return next((against[subject] for subject in subjects if subject in against), "")


def refusal(record: Described, spec: run_pb2.RunSpec) -> str:
    """Return why the terms of an expert do not allow the run to start from it; empty where they do.

    What is trained further is a derivative: it may be shown no wider than its parent, and carries share-alike terms on.
    """
    if not seen_by(spec, record):
        return "it may not be seen by this customer"
    shown = str(record.get("governance", {}).get("visibility", "public"))
    wanted = spec.visibility or "public"
    if VISIBILITIES.index(wanted) < VISIBILITIES.index(shown):
        return f"it is {shown}, and what is made of it would be {wanted}"
    licence = str(record.get("license", ""))
    terms = terms_of(licence)
    if terms is None:
        return "" if licence and licence == spec.license else f"its licence {licence!r} is not known here"
    if not terms.derivatives:
        return f"{licence} allows no derivatives"
    if terms.share_alike and spec.license != licence:
        return f"{licence} demands that what is made of it carries it, and the job's licence is {spec.license!r}"
    mine = terms_of(spec.license)
    if not terms.commercial and (mine is None or mine.commercial):
        return f"{licence} forbids commercial use, and the job's licence {spec.license!r} does not"
    return ""


def start_ref(selection: run_pb2.SelectionMade | None) -> artifacts_pb2.ArtifactRef | None:
    """Return the record of the expert that a run started from; None where it was the base."""
    if selection is None or not selection.start.expert_id:
        return None
    return next(row.record for row in selection.start.candidates if row.expert_id == selection.start.expert_id)


def start_record(selection: run_pb2.SelectionMade | None) -> Start | None:
    """Return the record's entry on the expert that its run started from; None where it was the base."""
    if selection is None or not selection.start.expert_id:
        return None
    start = selection.start
    chosen = next(row for row in start.candidates if row.expert_id == start.expert_id)
    return {
        "expert_id": start.expert_id,
        "digest": chosen.expert.digest,
        "rows": start.shared_rows,
        "saved_on_probe": chosen.saved,
        "interval": [chosen.low, chosen.high],
        "considered": len(start.candidates),
    }


def _impossible(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_START_IMPOSSIBLE)
