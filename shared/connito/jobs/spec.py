"""Schema of `job.yaml`, a customer's job. Everything that has a default may be left out."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from google.protobuf.json_format import ParseDict, ParseError
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from connito.errors import Invalid, NotFound
from connito.library.governance import VISIBILITIES
from connito.protocol.policy.choices import ENROLMENT
from connito.protocol.policy.law import MAX_CYCLES, MAX_EMISSION, MAX_TEXT, choice, number
from connito.protocol.policy.profiles import PLATFORM, PROFILES
from connito.render import formats
from connito.render.formats import SHOWN, shown
from connito.v1 import reasons_pb2 as reasons
from connito.v1.run_pb2 import RunSpec

if TYPE_CHECKING:
    import yaml

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
_SIZE = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*")
# A job is a page of text; a parser takes minutes over what is none.
_MOST_BYTES = 1 << 20
# Digits of a number that anything here could hold, and lines about what is wrong.
_MOST_DIGITS, _MOST_FAULTS = 40, 20
_NAME = r"^[A-Za-z0-9_-]{1,64}$"


def parse_size(value: object) -> object:
    """Return the bytes of `20 MB`, `1.5 GiB` or a number. Raises `ValueError` for anything else."""
    if not isinstance(value, str):
        return value
    found = _SIZE.fullmatch(value) if len(value) <= _MOST_DIGITS else None
    if found is None or found[2].upper() not in _UNITS:
        raise ValueError(f"{value[:SHOWN]!r} is not a size; write for example 20 MB, 1.5 GB or 512 MiB")
    return round(float(found[1]) * _UNITS[found[2].upper()])


def _within(path: str) -> Any:
    """Return the limits that the law of policies sets to a number."""
    rule = number(path)
    return Field(ge=rule.low, le=rule.high)


def _one_of(choices: Sequence[str]) -> Any:
    """Return a check that a word is one of the law's."""

    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"choose one of {', '.join(choices)}")
        return value

    return AfterValidator(check)


Size = Annotated[int, BeforeValidator(parse_size), _within("selection.max_bytes")]
Cycles = Annotated[int, Field(le=MAX_CYCLES)]


class _Strict(BaseModel):
    """Refuse unknown fields: a typing mistake in a job costs a run."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Source(_Strict):
    """Text: a file, a folder, a glob or an address. `text` is a template over the fields of a row; `config` and `split`
    choose what of a published data set is read."""

    path: str = Field(min_length=1)
    text: str = ""
    config: str = ""
    split: str = ""
    # How often a document of this source is seen, against one of weight 1.
    weight: float = Field(default=1.0, gt=0, le=100)
    name: str = ""

    @property
    def label(self) -> str:
        """Return the name of the source in findings."""
        return self.name or self.path


class General(Source):
    """Text of a domain that must not be forgotten."""

    domain: str = Field(pattern=_NAME)


class Benchmark(Source):
    """Held-out text, or a task of lm-evaluation-harness, that the delivery report measures on and that decides nothing."""

    path: str = ""
    # The task's YAML file.
    task: str = ""
    name: str = Field(pattern=_NAME)

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if bool(self.path) == bool(self.task):
            raise ValueError("give either `path`, to held-out text, or `task`, a task file of lm-evaluation-harness")
        if self.task and self.model_fields_set - {"task", "name", "path"}:
            raise ValueError("a task file says itself where its data are: leave the other fields out")
        return self


class Objective(_Strict):
    """The stopping rule: after `max_cycles`, or as soon as the gate's held-out loss is `improvement` nats per token lower."""

    improvement: Annotated[float, _within("objective.improvement")] = 0.0
    max_cycles: Cycles = Field(default=4, ge=1)


class Budget(_Strict):
    """Caps on cost; 0 is no cap. `upload` is what one miner sends in one cycle, `memory` what a miner needs."""

    cycles: Cycles = Field(default=0, ge=0)
    upload: Size = 0
    memory: Size = 0
    emission: int = Field(default=0, ge=0, le=MAX_EMISSION)


class Privacy(_Strict):
    """Visibility of the expert. The training text itself is read by every miner that takes part, whatever is said here."""

    visibility: Annotated[str, _one_of(VISIBILITIES)] = "public"
    organisation: str = ""


class Quorum(_Strict):
    """Miners and validators that the first cycle waits for, and who may mine: anybody, keys on a list, or by invite."""

    miners: Annotated[int, _within("windows.min_miners")] = 1
    validators: Annotated[int, _within("windows.min_validators")] = 1
    enrolment: Annotated[str, _one_of(ENROLMENT)] = choice("enrolment.mode").default
    # Public keys: the list, or those that need no invite.
    allowed: list[str] = []
    # Miners at most; 0 is no cap.
    at_most: Annotated[int, _within("enrolment.max_miners")] = 0


class Shares(_Strict):
    """Shares of a split by the hash of each document, used without a given hold-out. The rest is training text."""

    probe: float = Field(default=0.08, gt=0, lt=0.5)
    holdout: float = Field(default=0.2, gt=0, lt=0.9)


class Job(_Strict):
    """A whole `job.yaml`."""

    domain: str = Field(pattern=_NAME)
    base: str = Field(default="demo", min_length=1)
    run: str = Field(default="", pattern=r"^$|^[A-Za-z0-9_-]{1,64}$")
    data: list[Source] = Field(min_length=1)
    holdout: list[Source] = []
    split: Shares = Shares()
    general: list[General] = []
    # Share of general text mixed into each batch; left out: the smallest that a pilot held at.
    replay: Annotated[float, _within("training.replay_share")] | None = None
    benchmarks: list[Benchmark] = []
    objective: Objective = Objective()
    budget: Budget = Budget()
    privacy: Privacy = Privacy()
    people: Quorum = Quorum()
    # How conversations are laid out: a file with a template, or the name of one of the base's; empty: the base's own.
    chat_template: str = ""
    license: str = Field(min_length=1)
    data_statement: str = Field(default="", max_length=MAX_TEXT)
    start_from: str = "auto"
    # Held-out text that also occurs in the training data: refuse the job, or drop it from the training data.
    contamination: Literal["refuse", "drop"] = "refuse"
    # Policies to start from: the platform's, or a named overlay over them.
    profile: Annotated[str, _one_of(tuple(PROFILES))] = PLATFORM
    # Fields of the run's policies, for those who know them: {training: {local_steps: 20}}.
    policies: dict[str, dict[str, Any]] = {}

    @property
    def asked_replay(self) -> float | None:
        """Return the share of general text that the job says, in its own field or a policy; None where it leaves it open."""
        said = self.policies.get("training", {})
        given = said.get("replay_share", said.get("replayShare"))
        # What is no number, the check of policies says.
        told = float(given) if isinstance(given, int | float) and abs(given) <= 1 else None
        return told if self.replay is None else self.replay

    @property
    def cycles(self) -> int:
        """Return largest number of cycles: the smaller of objective and budget."""
        return min(self.objective.max_cycles, self.budget.cycles or self.objective.max_cycles)


# Fields that a RunSpec has and a job has not, in either spelling of protobuf's JSON.
_OF_RUN_SPEC = {
    "cycles", "probe", "train", "selection", "training", "scoring", "merging", "windows", "general_holdouts",
    "generalHoldouts",
}  # fmt: skip


def is_job(content: Mapping[str, Any]) -> bool:
    """Return whether YAML content is a `job.yaml`: it has no field that only a RunSpec has."""
    return "data" in content or not _OF_RUN_SPEC & content.keys()


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file. Raises `NotFound` for a missing one, `Invalid` for something else."""
    import yaml

    try:
        with file.open("rb") as opened:
            # As bytes: YAML tells UTF-16 from UTF-8 by itself.
            text = opened.read(_MOST_BYTES + 1)
        if len(text) > _MOST_BYTES:
            raise _bad(
                f"{file} is over {_MOST_BYTES:,} bytes, and no job is; `data:` names files, it does not hold them"
            )
        _check_nodes(file, yaml.compose(text, yaml.SafeLoader))
        content = yaml.safe_load(text)
    except FileNotFoundError as error:
        raise NotFound(f"there is no file {file}") from error
    except (OSError, ValueError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        raise _bad(f"{file} cannot be read as YAML: {error}") from error
    if not isinstance(content, dict):
        raise _bad(f"{file} holds no mapping; write one `field: value` a line, beginning with `domain:` and `data:`")
    return content


def _check_nodes(file: Path, root: yaml.Node | None) -> None:
    """Raise `Invalid` for a mapping that gives a key twice, of which YAML would take the last in silence, and for a number with
    more digits than Python writes: hexadecimal, or in base 60, YAML reads any.
    """
    todo, known = [root], set()
    while todo:
        node = todo.pop()
        if node in known or node is None:
            continue
        if isinstance(node.value, str):
            if node.tag.endswith((":int", ":float")) and len(node.value) > _MOST_DIGITS:
                raise _bad(
                    f"{file}: the number in line {node.start_mark.line + 1} has {formats.count(len(node.value), 'character')}"
                )
            continue
        known.add(node)
        todo += [row[1] if isinstance(row, tuple) else row for row in node.value]
        keys = [row[0] for row in node.value if isinstance(row, tuple)]
        names = [key.value for key in keys]
        for index, key in enumerate(keys):
            if key.value in names[:index]:
                line = key.start_mark.line + 1
                raise _bad(f"{file}: {key.value!r} is given twice, again in line {line}; write it once")


def read_job(file: Path) -> Job:
    """Read the job in `file`. Raises `NotFound`, or `Invalid` that names every field that is wrong and what would be right."""
    return parse_job(read_yaml(file), str(file))


def read_run_spec(file: Path) -> RunSpec:
    """Read a RunSpec from YAML. Raises `NotFound` for a missing file, `Invalid` for a field that does not exist."""
    try:
        return ParseDict(read_yaml(file), RunSpec())
    except ParseError as error:
        known = ", ".join(RunSpec.DESCRIPTOR.fields_by_name)
        raise _bad(f"{file} is not a RunSpec: {str(error).splitlines()[0]} Its fields: {known}") from error


def parse_job(content: object, where: str = "the job") -> Job:
    """Return a job from plain data. Raises `Invalid` naming every field that is wrong."""
    try:
        job = Job.model_validate(content)
    except ValidationError as error:
        rows = error.errors(include_url=False)
        more = [f"  … and {len(rows) - _MOST_FAULTS} more"] if len(rows) > _MOST_FAULTS else []
        said = [_explain(row) for row in rows[:_MOST_FAULTS]]
        raise _bad("\n".join([f"{where} is not a job:", *said, *more])) from error
    if job.privacy.visibility == "organisation" and not job.privacy.organisation:
        raise _bad(f"{where}: privacy.visibility is organisation; say which in privacy.organisation")
    _unique(where, "general", [entry.domain for entry in job.general], job.domain)
    _unique(where, "benchmarks", [entry.name for entry in job.benchmarks])
    return job


def _unique(where: str, field: str, names: Sequence[str], taken: str = "") -> None:
    for name in names:
        if name == taken or names.count(name) > 1:
            raise _bad(f"{where}: {field} names {name!r} twice, or the job's own domain; give each its own name")


def _explain(row: Any) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in row["loc"]).lstrip(".")
    if row["type"] == "extra_forbidden":
        return f"  {path}: there is no such field; {_known(row['loc'])}"
    if row["type"] == "missing":
        return f"  {path}: is missing; {_MISSING.get(path, 'give it a value')}"
    given = "" if isinstance(row["input"], (dict, list)) else f" (given: {shown(row['input'])})"
    return f"  {path}: {_WRONG.get(row['type'], row['msg'].removeprefix('Value error, '))}{given}"


_MAPPING = "has to be a mapping: write `field: value`, one a line"
_WRONG = {
    "dict_type": _MAPPING,
    "model_type": _MAPPING,
    "list_type": "has to be a list: begin each entry with `-`",
    "too_short": "is empty: give at least one entry",
    "string_type": "has to be text: put it in quotes",
    "string_pattern_mismatch": "use 1 to 64 letters, digits, '-' and '_'",
}

_MISSING = {
    "domain": "name what the expert is for, in one word",
    "data": "list the text to train on: `data: [{path: texts/}]`",
    "license": "give the SPDX identifier of your text's licence, for example CC-BY-4.0",
}


def _known(path: tuple[Any, ...]) -> str:
    """Return the known fields of the mapping that `path` points into."""
    model: Any = Job
    for part in path[:-1]:
        if isinstance(part, str):
            model = _NESTED.get(part, model)
    return f"known fields: {', '.join(sorted(model.model_fields))}"


_NESTED: dict[str, type[BaseModel]] = {
    "data": Source, "holdout": Source, "general": General, "benchmarks": Benchmark, "objective": Objective,
    "budget": Budget, "privacy": Privacy, "people": Quorum, "split": Shares,
}  # fmt: skip


def _bad(message: str) -> Invalid:
    return Invalid(message, reason=reasons.REASON_BAD_SPEC)
