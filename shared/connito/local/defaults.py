"""Options of `connito up`, and the policies and sizes that go with its base."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from connito.base.corpora import TINY_DOMAINS
from connito.data.domains import DEMO_DOMAINS
from connito.errors import Invalid
from connito.protocol.policy.choices import ADVERSARIES
from connito.protocol.policy.law import MAX_CYCLES
from connito.protocol.policy.profiles import override_text, policies
from connito.runtime.compute import multiplies_bf16
from connito.v1.run_pb2 import RunSpec

MAX_PARTICIPANTS = 64
# Of the rates tried on this base, between the one that gains little in three cycles and the one that the gate refuses.
DEMO_RATE = 4e-4


@dataclass(frozen=True)
class UpOptions:
    """Options of `connito up`."""

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
    # Start another run, whatever was left unfinished.
    new: bool = False

    def checked(self) -> UpOptions:
        """Return the options if they are valid. Raises `Invalid` naming the one that is not."""
        for name, value, low, high in (
            ("--cycles", self.cycles, 1, MAX_CYCLES),
            ("--miners", self.miners, 1, MAX_PARTICIPANTS),
            ("--validators", self.validators, 1, MAX_PARTICIPANTS),
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
        """Return domains with text for this base; the first is the default target."""
        return TINY_DOMAINS if self.base == "tiny" else DEMO_DOMAINS

    @property
    def target(self) -> str:
        """Return the domain to adapt to."""
        return self.domain or self.domains[0]


@dataclass(frozen=True)
class Machine:
    """Share of the cores: `slots` trainings at a time, each with `threads` threads; `alone`: the threads of what has nothing
    beside it: all that selects, judges and merges. `bf16`: miners train in bfloat16.
    """

    slots: int
    threads: int
    alone: int = 1
    bf16: bool = False


@dataclass(frozen=True)
class Profile:
    """Policies and sizes that go with a kind of base."""

    spec: RunSpec
    small: bool = field(default=False)

    def machine(self, cores: int) -> Machine:
        """Return the shares of the cores: one thread for each step of a small model; of a large one two steps at a time, whose
        products leave half of the cores idle otherwise, in bfloat16 where that is faster.
        """
        if self.small:
            return Machine(cores, 1)
        slots = min(cores, 2)
        return Machine(slots, cores // slots, cores, multiplies_bf16())


def profile(options: UpOptions) -> Profile:
    """Return what goes with the base. Raises `Invalid` naming an override that does not fit."""
    tiny = options.base == "tiny"
    spec = policies("tiny" if tiny else "laptop")
    spec.domain, spec.cycles = options.target, options.cycles
    if options.base == "demo":
        spec.training.learning_rate = DEMO_RATE
    # Wait for everyone who was started, so that the first cycle has all of them.
    spec.windows.min_miners = options.miners + len(options.adversaries)
    spec.windows.min_validators = options.validators
    spec.license = _LICENCES.get(options.target, "Apache-2.0")
    spec.data_statement = _STATEMENTS.get(options.target, "")
    for override in options.overrides:
        override_text(spec, override)
    return Profile(spec, small=tiny)


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
