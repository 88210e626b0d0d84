"""The schema of library records: what every reader may rely on, and the check of records that came from outside.

Records are JSON that people read and that digests name, so they stay dictionaries: a checked one is handed on as it came,
with fields that a later version added.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, NotRequired, cast

from pydantic import AfterValidator, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from connito.data.documents import is_shown, parse_json
from connito.errors import Invalid
from connito.files import plain_name

_ID = re.compile(r"[A-Za-z0-9_-]{1,80}")
_LARGEST = 1 << 63


def _is_id(text: str) -> str:
    if not _ID.fullmatch(text):
        raise ValueError("it may hold only letters, digits, '-' and '_' (1 to 80 of them)")
    return text


def _is_file(text: str) -> str:
    if not plain_name(text):
        raise ValueError("a file in a folder has a plain name, without a path")
    return text


# Both become names in folders of whoever takes an expert over.
ExpertId = Annotated[str, AfterValidator(_is_id)]
FileName = Annotated[str, AfterValidator(_is_file)]


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


class Score(TypedDict):
    """Scores of the base alone and of the result on a benchmark (`loss`, nats per token) or by a metric of a task, over so many
    sequences or items, with the paired 95 % interval of the change where there is one.
    """

    name: str
    metric: str
    items: int
    before: float
    after: float
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

    expert_id: ExpertId
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
    expert_id: ExpertId
    domain: str
    version: NotRequired[int]
    parents: NotRequired[list[str]]
    # The version of the rules that its run was under.
    protocol: NotRequired[int]
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
    # On what the customer named before the run: scores, and why there are none, by name.
    scores: NotRequired[list[Score]]
    unscored: NotRequired[dict[str, str]]
    derived: NotRequired[Derived]
    card: NotRequired[File]
    tags: NotRequired[list[str]]
    # Of models. `precision`: the type of the numbers in their files.
    precision: NotRequired[str]
    verb: NotRequired[str]
    experts: NotRequired[dict[str, list[int]]]
    settings: NotRequired[dict[str, Any]]
    measured: NotRequired[dict[str, Any]]
    files: NotRequired[dict[FileName, File]]


# A record, or the little that is known of one: an expert that the platform names without showing its record.
Described = Mapping[str, Any]

_SCHEMA: TypeAdapter[ExpertRecord] = TypeAdapter(ExpertRecord)


def read_record(data: bytes | str, where: object) -> ExpertRecord:
    """Return the record that `data` holds; `where` names its place. Raises `Invalid` naming the field that does not fit."""
    try:
        document = parse_json(data)
        # What is handed on is what came: a number that is written as text would be taken here and fail whoever counts with it.
        _SCHEMA.validate_python(document, strict=True)
        _check_values(document)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "it"
        raise Invalid(
            f"{where} is no record of a library expert: {field}: {first['msg'].lower()}; get the record again from the "
            "library that it came from"
        ) from error
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{where} is no record of a library expert: it is not JSON ({error}); get it again") from error
    return cast("ExpertRecord", document)


def _check_values(value: Any) -> None:
    """Raise `ValueError` for what JSON cannot say, no table can hold, or a terminal obeys, anywhere in a document."""
    if isinstance(value, dict):
        for name, inside in value.items():
            _check_values(name)
            _check_values(inside)
    elif isinstance(value, list):
        for inside in value:
            _check_values(inside)
    elif isinstance(value, str):
        if not is_shown(value):
            raise ValueError("it holds control characters or halves of characters")
    elif isinstance(value, (int, float)) and not (math.isfinite(value) and abs(value) < _LARGEST):
        raise ValueError("it holds a number that is too large, or none")
