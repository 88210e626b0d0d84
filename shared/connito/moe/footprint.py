"""A training model's memory: what a miner may choose about it, how many bytes it takes, and the choice that fits.

The bytes come from `connito.workloads.rehearsal`, which needs torch; here are none of it. What a run's rules decide by
size is arithmetic over the base's manifest (`connito.moe.helper_experts`), so that everybody gets the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from connito.errors import Invalid
from connito.moe.engine import Engine
from connito.moe.residency import FOUR_BIT, HELPERS
from connito.protocol.policy.choices import ADAMW
from connito.render.formats import size
from connito.v1 import reasons_pb2


@dataclass(frozen=True)
class Workload:
    """A miner's training settings.

    sequences    of a step; `micro_batch` of them go through the model at once, 0: all
    bf16, half   run the forward pass in bfloat16; hold what is frozen in it as well
    top_k        experts per token in adapted layers, 0: as the model has it
    residency, engine    see `connito.moe.residency` and `connito.moe.engine`
    cuda         on a GPU, whose attention keeps no scores and whose experts of a bank are one product
    packed       rows hold several documents, which are kept apart
    inner        the run's optimizer of local steps
    mass         share of the routing decisions that fall on targets; 0: as if all experts were used alike
    """

    sequences: int
    length: int
    half: bool = False
    background: bool = False
    bf16: bool = False
    micro_batch: int = 0
    top_k: int = 0
    routing_mode: str = "natural"
    residency: str = HELPERS
    packed: bool = False
    cuda: bool = False
    engine: Engine = field(default_factory=Engine)
    mass: float = 0.0
    inner: str = ADAMW


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training model at work, at the moment of a step in which they are most.

    weights      parameters, and rows that are frozen
    buffers      what a model holds beside its weights: rotary tables, routers' biases
    masters      what completes the trained rows to float32
    gradients    of the trained rows
    moments      the optimizer's
    activations  kept from the forward for the backward pass
    workspace    everything else: logits of a chunk, inputs and outputs of the layer at work
    """

    weights: int
    buffers: int
    masters: int
    gradients: int
    moments: int
    activations: int
    workspace: int

    @property
    def total(self) -> int:
        """Return the sum of all parts, in bytes."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """Return the parts and their sum, in bytes."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Switch:
    """A setting that lowers the memory: the field of `Workload` or its engine and the value, its name for a miner, and what it
    costs.
    """

    field: str
    value: Any
    setting: str
    costs: str

    def turn(self, work: Workload) -> Workload:
        """Return `work` with this setting."""
        if hasattr(work.engine, self.field):
            return replace(work, engine=replace(work.engine, **{self.field: self.value}))
        return replace(work, **{self.field: self.value})


# What costs time alone, then what rounds, then what sends tokens to other experts.
SWITCHES = (
    Switch("micro_batch", 1, "CONNITO_MICRO_BATCH=1", "one sequence at a time: the same step, slower on a GPU"),
    Switch("checkpointing", True, "CONNITO_CHECKPOINTING=on", "layers computed once more: a third more time"),
    Switch("half", True, "CONNITO_BF16_PARAMETERS=true", "frozen weights and the forward pass rounded to bfloat16"),
    Switch(
        "residency", FOUR_BIT, "CONNITO_RESIDENCY=four-bit", "frozen experts in four bits: a little off, and slower"
    ),
    Switch("residency", HELPERS, "CONNITO_RESIDENCY=helpers", "a few frozen experts stand for the absent ones"),
)

Predict = Callable[[Workload], Footprint]
Turned = tuple[Switch, ...]


def lean(predict: Predict, work: Workload, have: int, switches: Turned = SWITCHES) -> tuple[Workload, Turned]:
    """Return settings that fit into `have` bytes, and the switches turned for it: as few as it takes, or all that help where
    even they do not suffice.
    """

    def total(turned: Turned) -> int:
        return predict(_with(work, turned)).total

    turned: Turned = ()
    for switch in switches:
        if total(turned) <= have:
            break
        if total((*turned, switch)) < total(turned):
            turned = (*[other for other in turned if other.field != switch.field], switch)
    if total(turned) <= have:
        for switch in reversed(turned[:-1]):
            fewer = tuple(other for other in turned if other is not switch)
            turned = fewer if total(fewer) <= have else turned
    return _with(work, turned), turned


def _with(work: Workload, turned: Turned) -> Workload:
    for switch in turned:
        work = switch.turn(work)
    return work


def fit(predict: Predict, work: Workload, have: int, where: str, mine: Turned = ()) -> Workload:
    """Return `work`, or with as few of the switches `mine` as it takes to fit into `have` bytes.

    Raises `Invalid` (DOES_NOT_FIT) with the numbers and the settings that make it fit, if any do.
    """
    chosen, _ = lean(predict, work, have, mine)
    need = predict(chosen)
    if need.total <= have:
        return chosen
    leaner, turned = lean(predict, chosen, have)
    best = predict(leaner)
    parts = ", ".join(f"{name} {size(value)}" for name, value in asdict(need).items())
    settings = " and ".join(switch.setting for switch in turned)
    fewer = "use a larger machine, or ask for fewer experts (selection.max_experts) or helpers (selection.helpers_per_layer)"
    if best.total <= have:
        advice = f"set {settings}, with which it needs {size(best.total)}"
    elif turned:
        advice = f"even with {settings} it needs {size(best.total)}: {fewer}"
    else:
        advice = f"no setting of a miner lowers that: {fewer}"
    raise Invalid(
        f"the training model needs {size(need.total)} ({parts}) and {where} has {size(have)} free; {advice}",
        reason=reasons_pb2.REASON_DOES_NOT_FIT,
    )


def free_bytes() -> int:
    """Return memory that this process may still take: what the system has available, or less where a control group
    says so.
    """
    available: float = math.inf
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text().splitlines()
        available = 1024 * int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1])
    with suppress(OSError, ValueError, KeyError):
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        # The group's use counts what it read from disk, which the kernel gives back when memory is asked for.
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        cached = int(counts["active_file"]) + int(counts["inactive_file"])
        available = min(available, limit - max(0, used - cached))
    return 1 << 62 if available == math.inf else int(available)
