"""What `connito up` asks for when it is not told: sizes that fit two cores and six minutes, or a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from google.protobuf.json_format import ParseDict, ParseError

from connito.data.domains import DEMO_DOMAINS
from connito.errors import Invalid
from connito.v1.run_pb2 import MergePolicy, RunSpec, ScorePolicy, SelectionPolicy, TrainPolicy, WindowPolicy

ADVERSARIES = (
    "copier", "noisy-copier", "masked-copier", "scaled-copier", "mixed-copier", "freerider", "noise", "sign-flip",
    "large-norm", "nan", "oversized", "late",
)  # fmt: skip
TINY_DOMAINS = ("recipes", "logs", "poems", "ledgers")
MAX_PEOPLE = 64
OVERRIDABLE = ("selection", "training", "scoring", "merging", "windows", "rewards")


@dataclass(frozen=True)
class UpOptions:
    """What was asked of `connito up`."""

    cycles: int = 3
    miners: int = 3
    validators: int = 3
    adversaries: tuple[str, ...] = ()
    domain: str = ""
    base: str = "demo"
    data_dir: Path | None = None
    report: Path | None = None
    seed: int | None = None
    # `section.field=value` of the run's policies, for example `training.local_steps=1`.
    overrides: tuple[str, ...] = ()

    def checked(self) -> UpOptions:
        """Raises `Invalid` naming the option that cannot be."""
        for name, value, low, high in (
            ("--cycles", self.cycles, 1, 1000),
            ("--miners", self.miners, 1, MAX_PEOPLE),
            ("--validators", self.validators, 1, MAX_PEOPLE),
        ):
            if not low <= value <= high:
                raise Invalid(f"{name} is {value}; choose {low} to {high}")
        for kind in self.adversaries:
            if kind not in ADVERSARIES:
                raise Invalid(f"--adversaries names {kind!r}; known kinds: {', '.join(ADVERSARIES)}")
        if self.domain and self.domain not in self.domains:
            raise Invalid(f"--domain {self.domain} is not known for this base; choose {', '.join(self.domains)}")
        if self.base not in ("demo", "tiny") and not Path(self.base).is_dir():
            raise Invalid(f"--base {self.base} is neither 'demo', 'tiny' nor a folder with a model")
        return self

    @property
    def domains(self) -> tuple[str, ...]:
        """Domains with text for this base; the first is the default target."""
        return TINY_DOMAINS if self.base == "tiny" else DEMO_DOMAINS

    @property
    def target(self) -> str:
        """The domain to adapt to."""
        return self.domain or self.domains[0]


@dataclass(frozen=True)
class Machine:
    """How the cores are shared: `slots` computations at a time, each with `threads` threads."""

    slots: int
    threads: int


@dataclass(frozen=True)
class Texts:
    """How much text to prepare, in tokens over probe, training and hold-out together."""

    target_tokens: int
    general_tokens: int


@dataclass(frozen=True)
class Profile:
    """Policies and sizes that go with a kind of base."""

    spec: RunSpec
    texts: Texts
    small: bool = field(default=False)

    def machine(self, cores: int) -> Machine:
        """A small model gains nothing from a second thread; a large one needs all cores for one step at a time."""
        return Machine(cores, 1) if self.small else Machine(1, cores)


def profile(options: UpOptions) -> Profile:
    """The profile for a base. Raises `Invalid` naming an override that does not fit."""
    chosen = _tiny(options) if options.base == "tiny" else _demo(options)
    for override in options.overrides:
        _override(chosen.spec, override)
    return chosen


def _override(spec: RunSpec, override: str) -> None:
    path, _, value = override.partition("=")
    section, _, field_name = path.strip().partition(".")
    if section not in OVERRIDABLE or not field_name or not value:
        raise Invalid(f"--set {override!r} is not SECTION.FIELD=VALUE with a section of {', '.join(OVERRIDABLE)}")
    policy = getattr(spec, section)
    known_field = policy.DESCRIPTOR.fields_by_name.get(field_name)
    several = known_field is not None and known_field.is_repeated
    given = value.strip().split(",") if several else value.strip()
    try:
        ParseDict({field_name: given}, policy)
    except ParseError as error:
        known = ", ".join(sorted(policy.DESCRIPTOR.fields_by_name))
        raise Invalid(f"--set {override!r} does not fit {section} ({error}); its fields: {known}") from error


def _demo(options: UpOptions) -> Profile:
    """SmolLM2 upcycled: a step of 512 tokens takes some 2 s on two cores, so six of them for three miners 40 s."""
    spec = RunSpec(
        domain=options.target,
        cycles=options.cycles,
        selection=SelectionPolicy(method="esft-token", threshold=0.5, helpers_per_layer=2, causal_effects=4),
        training=TrainPolicy(
            local_steps=6,
            sequence_length=256,
            batch_sequences=2,
            learning_rate=2e-4,
            routing_mode="natural",
        ),
        scoring=ScorePolicy(
            target_sequences=8,
            general_sequences=1,
            confidence=0.95,
            retention_margin=0.02,
            copy_threshold=0.95,
            copy_span_threshold=0.95,
            copy_effect_threshold=0.08,
            paid_ranks=10,
            max_relative_norm=0.5,
        ),
        merging=MergePolicy(
            aggregator="utility-mean",
            outer_learning_rate=0.7,
            outer_momentum=0.9,
            gate_target_sequences=8,
            gate_general_sequences=1,
            gate_general_margin=0.02,
            report_target_sequences=12,
            report_general_sequences=2,
        ),
        windows=WindowPolicy(floor_seconds=20, ceiling_seconds=900, assemble_seconds=300),
    )
    return Profile(_people(spec, options), Texts(target_tokens=160_000, general_tokens=40_000))


def _tiny(options: UpOptions) -> Profile:
    spec = RunSpec(
        domain=options.target,
        cycles=options.cycles,
        selection=SelectionPolicy(method="esft-token", threshold=0.5, helpers_per_layer=2, causal_effects=4),
        training=TrainPolicy(
            local_steps=8,
            sequence_length=64,
            batch_sequences=4,
            learning_rate=2e-3,
            # Over a few short cycles outer momentum has hardly built up; with less, an honest miner can stay below significance.
            beta1=0.9,
            routing_mode="natural",
        ),
        scoring=ScorePolicy(
            target_sequences=16,
            general_sequences=8,
            confidence=0.99,
            retention_margin=0.05,
            copy_threshold=0.95,
            copy_span_threshold=0.95,
            copy_effect_threshold=0.08,
            paid_ranks=10,
            max_relative_norm=1.0,
        ),
        merging=MergePolicy(
            aggregator="utility-mean",
            outer_learning_rate=0.7,
            outer_momentum=0.9,
            gate_target_sequences=16,
            gate_general_sequences=8,
            gate_general_margin=0.05,
            report_target_sequences=16,
            report_general_sequences=8,
        ),
        windows=WindowPolicy(floor_seconds=20, ceiling_seconds=30, assemble_seconds=60),
    )
    return Profile(_people(spec, options), Texts(target_tokens=130_000, general_tokens=50_000), small=True)


def _people(spec: RunSpec, options: UpOptions) -> RunSpec:
    """Wait for everyone who was started, so that the first cycle has all of them."""
    spec.windows.min_miners = options.miners + len(options.adversaries)
    spec.windows.min_validators = options.validators
    spec.customer = ""
    spec.license = _LICENCES.get(options.target, "Apache-2.0")
    spec.data_statement = _STATEMENTS.get(options.target, "")
    return spec


# SPDX identifiers of the target texts; the tiny base's texts are generated here.
_LICENCES = {
    "medical": "LicenseRef-HPO",
    "code": "PSF-2.0",
    "legal": "CC-BY-4.0",
    "speeches": "CC0-1.0",
    "math": "Apache-2.0",
}

_STATEMENTS = {
    "medical": "Definitions of the Human Phenotype Ontology (hp.obo, HPO licence).",
    "code": "Source of the Python standard library (PSF licence).",
    "legal": "Licence texts of licensedcode-data (CC-BY-4.0), de-duplicated.",
    "speeches": "State of the Union addresses (public domain).",
    "math": "Generated exercises of reasoning-gym (Apache-2.0).",
}
