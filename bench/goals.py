"""Memory that published models are to be trained in, as `connito miner fits` predicts it from their configurations.

Targets of DeepSeek-V2-Lite are those that the authors of ESFT published for one task at p = 0.2; of other models the
same share of the experts of every layer, rounded up, since nobody published theirs. One sequence a step, documents kept
apart, frozen experts in four bits, on a GPU. Other settings are chosen as `fits` chooses them.
"""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from bench.harness import Options, Result, main, note
from bench.published_models import CONFIGS
from bench.residency import THRESHOLD, TRACES

# Bytes by model. Then whose targets are published, for which task, and the tokens of a sequence.
GOALS = {"OLMoE-1B-7B": 12 * 10**9, "DeepSeek-V2-Lite": 24 * 10**9, "Qwen3-30B-A3B": 48 * 10**9}
PUBLISHED, TASK, LENGTH = "DeepSeek-V2-Lite", "law", 2048


def run(options: Options) -> Result:
    """Predict each model at work, with the settings that are chosen for its goal."""
    if not TRACES.exists():
        sys.exit(
            f"the published selections are not at {TRACES}; set CONNITO_TEST_DATA to the folder that holds esft-traces"
        )
    rows = []
    for name in list(GOALS)[: 1 if options.quick else None]:
        note(name)
        rows.append(_row(name))
    settings = {"sequences": 1, "length": LENGTH, "dtype": "bfloat16", "threshold": THRESHOLD, "task": TASK}
    return Result(settings, rows, {row["model"]: row for row in rows})


def _row(name: str) -> dict[str, Any]:
    import torch
    from connito.moe.footprint import SWITCHES, Workload, lean
    from connito.moe.residency import FOUR_BIT
    from connito.workloads.predicting import predictor
    from connito.workloads.rehearsal import same_everywhere
    from transformers import AutoConfig

    family, values = CONFIGS[name]
    config = AutoConfig.for_model(family, **values)
    config.dtype = torch.bfloat16
    published = json.loads((TRACES / f"{TASK}.selected.json").read_text())
    targets = {int(layer): sorted(experts) for layer, experts in published.items()}
    chosen = sum(map(len, targets.values())) / len(targets)
    if name != PUBLISHED:
        of, experts = CONFIGS[PUBLISHED][1]["n_routed_experts"], values["num_experts"]
        targets = same_everywhere(config, math.ceil(chosen / of * experts))
    predict = predictor(config, targets, {})
    work = Workload(1, LENGTH, micro_batch=1, residency=FOUR_BIT, packed=True, cuda=True)
    work, turned = lean(predict, work, GOALS[name], tuple(s for s in SWITCHES if s.field != "residency"))
    return {
        "model": name,
        "targets_a_layer": round(sum(map(len, targets.values())) / len(targets), 1),
        "residency": work.residency,
        "settings": [switch.setting for switch in turned],
        "predicted": predict(work).to_json(),
        "goal": GOALS[name],
    }


if __name__ == "__main__":
    main("goals", run, doc=__doc__)
