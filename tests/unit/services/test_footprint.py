"""Services without a model start without the model libraries and stay small."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "tokenizers", "accelerate", "safetensors", "gguf", "scipy", "openskill", "matplotlib"}
ARRAYS = HEAVY | {"numpy"}
PROBE = """
import importlib, json, pkgutil, re, sys
import services.{name} as service
# Every room: a service may import some of them only once it runs.
for room in pkgutil.iter_modules(service.__path__):
    importlib.import_module(f"services.{name}.{{room.name}}")
# Not getrusage: its maximum outlives exec, so it would tell the size of whoever started this.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(json.dumps({{"modules": sorted(sys.modules), "mb": peak / 1024}}))
"""


@pytest.mark.parametrize(
    ("name", "forbidden"),
    # The committer looks into what miners upload, the console draws how far experts have moved.
    [("coordinator", ARRAYS), ("committer", HEAVY), ("library", ARRAYS), ("console", HEAVY)],
)
def test_no_model_library_is_imported_and_memory_is_small(name: str, forbidden: set[str]) -> None:
    probe = [sys.executable, "-c", PROBE.format(name=name)]
    found = json.loads(subprocess.run(probe, capture_output=True, check=True).stdout)
    assert forbidden & set(found["modules"]) == set()
    assert found["mb"] < 120


@pytest.mark.parametrize(
    ("module", "ours"), [("services.aggregator.actions", True), ("connito.cli", True), ("connito", False)]
)
def test_our_programs_spread_no_product_over_cores_beside_threads_of_their_own(module: str, ours: bool) -> None:
    """A merge of forty files took two and a half times the CPU seconds where they were (`bench.merge_pass`)."""
    code = (
        f"import {module}, numpy, os;"
        "numpy.ones((900, 900)) @ numpy.ones((900, 900)); print(len(os.listdir('/proc/self/task')), len(os.sched_getaffinity(0)))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    threads, cores = map(int, done.stdout.split())
    assert (threads > 1) == (not ours and cores > 1), done.stderr
