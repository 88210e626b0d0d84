"""The schema of library records: what every reader may rely on, and the check of records that came from outside.

Records are JSON that people read and that digests name, so they stay dictionaries: a checked one is handed on as it came,
with fields that a later version added.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NotRequired, cast

from pydantic import TypeAdapter, ValidationError
from typing_extensions import TypedDict

from connito.data.documents import parse_json
from connito.errors import Invalid


class Base(TypedDict):
    """The base model: its name, the digest of its manifest, and how its publisher packed it where it is quantised."""

    name: str
    manifest: str
    quantised: NotRequired[str]


class File(TypedDict):
    """A file that a record names."""

    digest: str
    bytes: int


class ExpertFile(File):
    """The file of an expert, or of a model, and how many numbers it holds."""

    parameters: int


class Selection(TypedDict):
    """Experts by layer and how they were chosen; `report` is the digest of the selection's report."""

    method: str
    threshold: float
    layers: dict[str, list[int]]
    selected: int
    total: int
    report: str


class Loss(TypedDict):
    """Held-out loss on one domain in nats per token, with the paired 95 % interval of the change where it is known."""

    domain: str
    before: float | None
    after: float | None
    tokens: int
    change_low: NotRequired[float]
    change_high: NotRequired[float]


class Version(TypedDict):
    """One version of the run: the digests of its state and its parent's, the gate's decision, weights by miner."""

    version: int
    parent: int
    state: str
    parent_state: str
    gate: str
    merged: dict[str, float]


class Contributor(TypedDict):
    """A miner that was judged: units paid, its share of all, cycles merged, and how often it was refused for what."""

    miner: str
    label: str
    reward: int
    merged: int
    share: float
    reasons: dict[str, int]


class Governance(TypedDict, total=False):
    """Visibility and owner of an expert, and the digests or names of its data."""

    visibility: str
    organisation: str
    owner: str
    sources: list[str]


class Signature(TypedDict):
    """The mean routing input by layer (base64 of float32) and the tokens behind it."""

    layers: dict[str, str]
    tokens: dict[str, int]


class Start(TypedDict):
    """The library expert that a run started from, and what that saved on the probe."""

    expert_id: str
    digest: str
    rows: int
    saved_on_probe: float
    interval: list[float]
    considered: int


class Parent(TypedDict):
    """An expert that went into another with a weight."""

    expert_id: str
    digest: str
    weight: float


class Derived(TypedDict):
    """The derivation of an expert from others, complete enough to repeat it."""

    verb: str
    settings: dict[str, Any]
    parents: list[Parent]


class ExpertRecord(TypedDict):
    """The record of a library expert, or of a model made of experts."""

    format: str
    expert_id: str
    domain: str
    version: NotRequired[int]
    parents: NotRequired[list[str]]
    run: str
    created: str
    base: Base
    expert: ExpertFile
    model_parameters: int
    selection: Selection
    losses: list[Loss]
    lineage: list[Version]
    contributors: list[Contributor]
    license: str
    data_statement: str
    customer: str
    training_data: str
    signature: NotRequired[Signature | None]
    # Without it, an expert is public.
    governance: NotRequired[Governance]
    started_from: NotRequired[Start]
    derived: NotRequired[Derived]
    card: NotRequired[File]
    tags: NotRequired[list[str]]
    # Of models. `precision`: the type of the numbers in their files.
    precision: NotRequired[str]
    verb: NotRequired[str]
    experts: NotRequired[dict[str, list[int]]]
    settings: NotRequired[dict[str, Any]]
    measured: NotRequired[dict[str, Any]]
    files: NotRequired[dict[str, File]]


# A record, or the little that is known of one: an expert that the platform names without showing its record.
Described = Mapping[str, Any]

_SCHEMA: TypeAdapter[ExpertRecord] = TypeAdapter(ExpertRecord)


def read_record(data: bytes | str, where: object) -> ExpertRecord:
    """Return the record that `data` holds; `where` names its place. Raises `Invalid` naming the field that does not fit."""
    try:
        document = parse_json(data)
        _SCHEMA.validate_python(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise Invalid(
            f"{where} is no record of a library expert: {field}: {first['msg'].lower()}; get the record again from the "
            "library that it came from"
        ) from error
    except ValueError as error:
        raise Invalid(f"{where} is no record of a library expert: it is not JSON ({error}); get it again") from error
    return cast("ExpertRecord", document)
