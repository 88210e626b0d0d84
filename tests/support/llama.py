"""llama.cpp as a reader of GGUF files, in a process of its own: it writes to the terminal and keeps threads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

_PROGRAM = """
import json, sys, xllamacpp
asked = xllamacpp.CommonParams()
asked.model.path, asked.n_ctx, asked.n_parallel, asked.warmup, asked.cpuparams.n_threads = sys.argv[1], 64, 1, False, 1
asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
said = xllamacpp.Server(asked).handle_completions(
    {"prompt": sys.argv[2], "n_predict": 1, "temperature": 0, "n_probs": 1000, "post_sampling_probs": False}
)
first = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
print("READ", json.dumps({"tokens": said["usage"]["prompt_tokens"], "next": {str(x["id"]): x["logprob"] for x in first}}))
"""


def next_token(file: Path, prompt: str) -> tuple[int, dict[int, float]]:
    """The number of the prompt's tokens, and the log-probability of every next token."""
    pytest.importorskip("xllamacpp", reason="llama.cpp has no wheel for this platform")
    command = [sys.executable, "-c", _PROGRAM, str(file), prompt]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    line = next((line for line in done.stdout.splitlines() if line.startswith("READ ")), None)
    assert line is not None, done.stderr[-2000:]
    said = json.loads(line[5:])
    return said["tokens"], {int(token): value for token, value in said["next"].items()}
