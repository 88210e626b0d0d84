"""Peak memory of what reads a text through a model, against the number of its MoE layers: pruning, skipping, statistics.

Random weights, the same layers in every model; each row in a process of its own. `peak_bytes` is what the work holds beyond
the model. `everything_kept` holds the experts' outputs of all layers at once, for comparison: what grows where nothing is
let go.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import Any

from bench.harness import Options, Result, main, note
from bench.peak import peak_of
from bench.random_moe import Shape, build

LAYERS, TOKENS = (4, 8, 16), 2048
EXPERTS, HIDDEN = 16, 128


def run(options: Options) -> Result:
    """Measure every verb on models of 4, 8 and 16 layers; --quick takes 512 tokens."""
    tokens, rows = TOKENS // 4 if options.quick else TOKENS, list[dict[str, Any]]()
    for verb in VERBS:
        for layers in LAYERS:
            note(f"{verb}, {layers} layers")
            seconds, peak = _measured(verb, layers, tokens)
            rows.append({"verb": verb, "layers": layers, "seconds": round(seconds, 2), "peak_bytes": peak})
    figures: dict[str, Any] = {}
    for verb in VERBS:
        peaks = {str(row["layers"]): int(row["peak_bytes"]) for row in rows if row["verb"] == verb}
        growth = (peaks[str(LAYERS[-1])] - peaks[str(LAYERS[0])]) / (LAYERS[-1] - LAYERS[0])
        figures[verb] = {"peak_bytes": peaks, "bytes_per_layer": round(growth)}
    settings = {"tokens": tokens, "experts": EXPERTS, "hidden": HIDDEN, "layers": list(LAYERS)}
    return Result(settings, rows, figures)


def _measured(verb: str, layers: int, tokens: int) -> tuple[float, int]:
    context = multiprocessing.get_context("spawn")
    results: Any = context.SimpleQueue()
    process = context.Process(target=_child, args=(verb, layers, tokens, results))
    process.start()
    found: tuple[float, int] = results.get()
    process.join()
    return found


def _child(verb: str, layers: int, tokens: int, results: Any) -> None:
    import numpy as np
    import torch

    torch.set_num_threads(1)
    shape = Shape(layers, 0, HIDDEN, HIDDEN, EXPERTS, 2, vocabulary=512)
    model, length = build(shape), 128
    text = np.random.default_rng(0).integers(3, 500, (tokens // length, length + 1)).astype("int32")
    model(input_ids=torch.from_numpy(text[:1].astype("int64")), use_cache=False)  # what the first pass of all allocates
    results.put(peak_of(lambda: VERBS[verb](model, text)))


def _prune(method: str) -> Callable[[Any, Any], object]:
    def work(model: Any, text: Any) -> object:
        from connito.experts.choose import choose

        # One expert a layer less: 16 subsets, all tried.
        return choose(model, text, method, max_experts=(EXPERTS - 1) * model.config.num_hidden_layers)

    return work


def _zeros(model: Any, text: Any) -> object:
    from connito.experts.lowrank import sparsify

    return sparsify(model, text[:, :-1], 0.5)


def _skip(model: Any, text: Any) -> object:
    from connito.experts.token_skipping import skip_thresholds

    return skip_thresholds(model, text[:, :-1])


def _statistics(model: Any, text: Any) -> object:
    from connito.moe.statistics import collect

    return collect(model, text[:, :-1], served={})


def _kept(model: Any, text: Any) -> object:
    from connito.experts.tape import each_layer

    return each_layer(model, text[:, :-1], lambda tape: tape.outputs)


VERBS: dict[str, Callable[[Any, Any], object]] = {
    "naee": _prune("naee"),
    "router-weighted": _prune("router-weighted"),
    "zeros": _zeros,
    "skip": _skip,
    "statistics": _statistics,
    "everything_kept": _kept,
}

if __name__ == "__main__":
    main("calibration", run, doc=__doc__, seeds=1)
