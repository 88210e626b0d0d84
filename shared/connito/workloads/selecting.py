"""From a base model and a domain's probe text to the targets of a run. Blocking; needs torch."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.data.corpus import Corpus, check_vocabulary
from connito.errors import Invalid
from connito.library.schema import Signature
from connito.library.signature import encode_signature
from connito.moe.helper_experts import Usage, by_policy
from connito.protocol.holdout import subsets
from connito.protocol.policy.choices import CONTESTED_RULE
from connito.protocol.sequences import sequences
from connito.v1 import reasons_pb2, run_pb2

if TYPE_CHECKING:
    from torch import nn

    from connito.data.manifest import Manifest
    from connito.experts.start import Start
    from connito.library.start import Shelved
    from connito.moe.budget import Budget
    from connito.moe.selection import Selection
    from connito.moe.statistics import FloatArray, RoutingStatistics


# Tokens of the probe on which interventions are measured: each is a forward pass, and nothing is decided by them.
PROBED_TOKENS = 512


@dataclass(frozen=True)
class Library:
    """The experts that a run may start from: everything of its base up to a sequence of LIBRARY."""

    shelf: Sequence[Shelved]
    sequence: int


@dataclass(frozen=True)
class Chosen:
    """The targets of a run, and the bytes of what describes them: the same input always gives the same bytes."""

    selection: Selection
    statistics: bytes
    base: dict[str, str]
    target_parameters: int
    model_parameters: int
    signature: Signature
    # The merged experts for what is absent, where the policy wants them: a state with one row per tensor.
    background: bytes = b""
    start: run_pb2.StartChoice | None = None
    # Of the probe's tokens, by layer the share that goes to each of its selected experts.
    use: Mapping[int, Sequence[float]] = field(default_factory=dict)
    # How many experts a token has, by layer.
    per_token: Mapping[int, int] = field(default_factory=dict)

    def layers(self) -> list[run_pb2.LayerSelection]:
        """Return the selection map as the log carries it."""
        helpers = self.selection.helpers
        return [
            run_pb2.LayerSelection(
                layer=layer,
                experts=experts,
                helpers=helpers.get(layer, []),
                use=self.use.get(layer, ()),
                per_token=self.per_token.get(layer, 0),
            )
            for layer, experts in sorted(self.selection.layers.items())
        ]

    def signature_bytes(self) -> bytes:
        """Return the routing signature as JSON."""
        return json.dumps(self.signature, sort_keys=True, separators=(",", ":")).encode()

    def report(self, statistics_digest: str) -> bytes:
        """Return the report: what `connito select --json` prints, with the base's digests and the statistics' address."""
        content = {**self.selection.to_json(), "base": self.base, "statistics": statistics_digest}
        return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


@dataclass(frozen=True)
class Probes:
    """Corpora to route. `replay` is public general text: `differential` compares with it, and the diagnostics tell the
    domains apart by it. `beside`: further domains to select together with the run's, by name."""

    target: Path
    replay: Path | None = None
    beside: Mapping[str, Path] = field(default_factory=dict)


def choose(
    spec: run_pb2.RunSpec,
    manifest: Manifest,
    files: Mapping[str, Path],
    probes: Probes,
    theta: Path,
    library: Library | None = None,
) -> Chosen:
    """Route the probes through the base, select, and write θ_0, the target rows of the base, to `theta`.

    With a `library` to start from, θ_0 has the rows of the expert in it that measures best on the probe, if one helps.

    Raises `Invalid` with the reason that ends the run.
    """
    from connito.base.loading import load_full
    from connito.moe.device import device_of
    from connito.moe.rows import base_digests, read_rows
    from connito.moe.state import save_state
    from connito.moe.statistics import merge_all

    model = load_full(files, device=device_of())
    served: dict[int, FloatArray] = {}
    target = _route(model, spec, probes.target, served)
    general = {} if probes.replay is None else {spec.replay.domain: _route(model, spec, probes.replay)}
    beside = {name: _route(model, spec, path) for name, path in sorted(probes.beside.items())}
    selection = _select(spec, target, general, beside, _budget(spec, manifest))
    if spec.selection.causal_effects:
        selection = _measured(model, spec, probes.target, selection)
    usage = {index: layer.token_score for index, layer in target.layers.items()}
    helpers = by_policy(spec, manifest, usage, selection.layers)
    if helpers is not None:
        selection = replace(selection, helpers=helpers)
    rows = read_rows(model, selection)
    start = None if library is None else _start(model, spec, selection, probes.target, library)
    metadata = {"base": spec.base.manifest.digest, "version": "0"}
    if start is not None and start.state is not None:
        rows, metadata = start.state, {**metadata, "start": start.choice.expert_id}
    save_state(rows, theta, metadata)
    digests = base_digests(model, selection.layers)
    return Chosen(
        selection,
        merge_all([target, *beside.values()]).to_bytes(),
        {"rest": digests.rest, "rows": digests.rows},
        sum(tensor.numel() for tensor in rows.values()),
        sum(parameter.numel() for parameter in model.parameters()),
        signature_of(target, served, selection.layers),
        _background(model, selection, usage, theta) if spec.selection.background else b"",
        None if start is None else start.choice,
        _use(target, selection.layers),
        {index: target.layers[index].top_k for index in selection.layers},
    )


def _use(target: RoutingStatistics, layers: Mapping[int, Sequence[int]]) -> dict[int, list[float]]:
    found = {}
    for index, experts in layers.items():
        of = target.layers[index]
        found[index] = [float(of.counts[expert]) / max(1, of.tokens) for expert in experts]
    return found


def _background(model: nn.Module, selection: Selection, usage: Usage, theta: Path) -> bytes:
    from connito.moe.background import background
    from connito.moe.state import save_state

    path = theta.with_name("background.safetensors")
    save_state(background(model, selection, selection.helpers, usage), path)
    return path.read_bytes()


def _start(model: nn.Module, spec: run_pb2.RunSpec, selection: Selection, probe: Path, library: Library) -> Start:
    from connito.experts.start import propose

    rows = sequences(Corpus.load(probe), spec)
    return propose(model, spec, selection, rows, library.shelf, library.sequence)


def signature_of(
    statistics: RoutingStatistics, served: Mapping[int, FloatArray], layers: Mapping[int, Sequence[int]]
) -> Signature:
    """Return the routing signature of the experts `layers`, from what `collect` counted and summed."""
    vectors, tokens = dict[int, list[float]](), dict[int, int]()
    for layer, experts in layers.items():
        count = int(statistics.layers[layer].counts[list(experts)].sum()) if experts else 0
        if count:
            vectors[layer] = [float(x) for x in served[layer][list(experts)].sum(axis=0) / count]
            tokens[layer] = count
    return encode_signature(vectors, tokens)


def check_corpora(
    spec: run_pb2.RunSpec, files: Mapping[str, Path], read: Iterable[Path], held: Mapping[str, Path]
) -> None:
    """Raise `Invalid` unless everybody can read the run's corpora with its base: `read`, and hold-outs by domain.

    Each hold-out must have the sequences that the run's policy asks for. Here, because a run that cannot be trained or judged
    should end before anyone works for it, and nobody else looks into all of them beforehand.
    """
    from connito.base.description import describe_files
    from connito.data.checkpoint_files import find_checkpoint

    vocabulary = describe_files(find_checkpoint(files)).vocabulary
    for path in (*read, *held.values()):
        corpus = Corpus.load(path, mmap=True)
        check_vocabulary(corpus.largest, vocabulary, corpus.name)
        sequences(corpus, spec)
    for domain, path in held.items():
        subsets(sequences(Corpus.load(path), spec), spec, domain)


def _route(
    model: nn.Module, spec: run_pb2.RunSpec, path: Path, served: dict[int, FloatArray] | None = None
) -> RoutingStatistics:
    from connito.moe.statistics import collect

    rows = sequences(Corpus.load(path), spec)
    return collect(model, rows[:, :-1], served=served)


def _budget(spec: run_pb2.RunSpec, manifest: Manifest) -> Budget:
    from connito.moe.budget import Budget, of_base

    policy, sizes = spec.selection, manifest.expert_bytes()
    costs, resident = of_base(
        sizes,
        sum(map(manifest.loaded_bytes, manifest.tensors)),
        manifest.experts(),
        value_bytes=manifest.expert_value_bytes(),
        helpers_per_layer=policy.helpers_per_layer,
    )
    return Budget(
        policy.max_experts, policy.max_bytes, policy.max_vram, policy.scope or "global", costs=costs, resident=resident
    )


def _measured(model: nn.Module, spec: run_pb2.RunSpec, probe: Path, selection: Selection) -> Selection:
    """Add the diagnostics that need interventions in the model, within the run's budget for them."""
    from connito.moe.diagnostics import measure

    rows = sequences(Corpus.load(probe), spec)
    found = measure(model, selection.layers, rows, budget=spec.selection.causal_effects, max_tokens=PROBED_TOKENS)
    return replace(selection, diagnostics={**selection.diagnostics, **found})


def _select(
    spec: run_pb2.RunSpec,
    target: RoutingStatistics,
    general: Mapping[str, RoutingStatistics],
    beside: Mapping[str, RoutingStatistics],
    budget: Budget,
) -> Selection:
    from connito.moe.selection import select_experts

    policy = spec.selection
    options: dict[str, Any] = {
        "general": general or None,
        "beside": beside,
        "contested": policy.contested or CONTESTED_RULE,
        "budget": budget,
        "helpers_per_layer": policy.helpers_per_layer,
        "domain": spec.domain,
    }
    if policy.method == "differential" and not general:
        raise Invalid(
            "the method `differential` compares with general text, and the job names none; add a replay corpus or "
            "select with esft-token",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    return select_experts(target, policy.method, policy.threshold or None, **options)
