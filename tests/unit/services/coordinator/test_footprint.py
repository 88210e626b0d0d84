"""The coordinator starts without the model libraries and stays small."""

from __future__ import annotations

import json
import subprocess
import sys

PROBE = """
import json, re, sys
import services.coordinator.__main__
heavy = sorted({"torch", "transformers", "scipy"} & set(sys.modules))
# Not getrusage: its maximum outlives exec, so it would tell the size of whoever started this.
peak = int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
print(json.dumps({"heavy": heavy, "mb": peak / 1024}))
"""


def test_no_model_library_is_imported_and_memory_is_small() -> None:
    found = json.loads(subprocess.run([sys.executable, "-c", PROBE], capture_output=True, check=True).stdout)
    assert found["heavy"] == []
    assert found["mb"] < 120
