"""Prediction of a training model's memory, rehearsed once by all miners of a machine."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import transformers

from connito.files import write_durably
from connito.moe.footprint import Footprint, Predict, Workload
from connito.workloads.rehearsal import Experts, rehearse


def predictor(config: Any, targets: Experts, helpers: Experts, folder: Path | None = None) -> Predict:
    """Return a function that rehearses settings on this model and selection, each only once; with a `folder`, once for all that
    share it. What is wrong there may cost memory, and nothing else.
    """
    if folder is None:
        return cache(lambda work: rehearse(config, targets, helpers, work))
    model = [
        version("connito"),
        torch.__version__,
        transformers.__version__,
        config.to_json_string(use_diff=False),
        str(config.dtype),
    ]
    experts = [sorted((layer, list(rows)) for layer, rows in one.items()) for one in (targets, helpers)]

    def predict(work: Workload) -> Footprint:
        name = hashlib.sha256(json.dumps([*model, experts, asdict(work)]).encode()).hexdigest()
        path = folder / f"{name}.json"
        try:
            return Footprint(**json.loads(path.read_bytes()))
        except (OSError, ValueError, TypeError):
            found = rehearse(config, targets, helpers, work)
        with suppress(OSError):  # Without a disk it is rehearsed again.
            folder.mkdir(parents=True, exist_ok=True)
            write_durably(path, json.dumps(asdict(found)))
        return found

    return cache(predict)
