"""Run tasks that need torch or much memory, each in a process of its own: `python -m connito.local.tasks NAME JSON`.

What it prints on stdout are JSON lines: `{"progress": [what, share]}` while it works, then `{"result": …}`, or
`{"error": {"type", "message"}}` for an error that has a meaning,
`{"lack": {"message", "dependency"}}` for what the machine lacks.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from connito.errors import ConnitoError, Invalid, Unusable
from connito.runtime.compute import set_threads
from connito.runtime.waiting import here_and_now, of_rights


def build_base(params: dict[str, Any]) -> dict[str, Any]:
    """Build a named base into the cache."""
    from connito.base.recipes import build_cached

    return {"folder": str(build_cached(params["name"], _progress))}


def manifest(params: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest of a folder with a base model."""
    from connito.base.checks import check_base
    from connito.base.description import build_manifest

    check_base(Path(params["folder"]))
    Path(params["out"]).write_bytes(build_manifest(Path(params["folder"]), progress=_progress).to_bytes())
    return {"manifest": params["out"]}


def corpora(params: dict[str, Any]) -> dict[str, Any]:
    """Build the tokenised corpora of all domains in the cache."""
    from connito.base.corpora import Plan, build_corpora

    return {"folder": str(build_corpora(Plan.from_json(params), _progress))}


def proof(params: dict[str, Any]) -> dict[str, Any]:
    """Measure what base and adapted model get right of held-out text, and let both write."""
    from connito.local.proof import prove

    holdouts = {domain: Path(path) for domain, path in params["holdouts"].items()}
    return prove(Path(params["folder"]), Path(params["state"]), params["layers"], holdouts, params["target"])


TASKS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "build_base": build_base,
    "manifest": manifest,
    "corpora": corpora,
    "proof": proof,
}


def _progress(what: str, share: float) -> None:
    _print({"progress": [what, share]})


def _print(line: dict[str, Any]) -> None:
    print(json.dumps(line), flush=True)


def main(name: str, params: dict[str, Any]) -> None:
    """Run one task."""
    threads = int(os.environ.get("CONNITO_TORCH_THREADS", "0"))
    if threads:
        set_threads(threads)
    try:
        _print({"result": TASKS[name](params)})
    except Exception as error:
        fault = here_and_now(error)
        if fault is not None and not (fault.dependency in ("disk", "machine") and of_rights(error)):
            _print({"lack": {"message": str(fault), "dependency": fault.dependency}})
        elif isinstance(error, ConnitoError):
            kind = Invalid if isinstance(error, Unusable) else type(error)
            _print({"error": {"type": kind.__name__, "message": str(error)}})
        else:
            raise


def read_lines(lines: Iterator[str], progress: Callable[[str, float], None]) -> dict[str, Any] | None:
    """Return the result among a task's output lines, None without one. Raises the error that the task reported."""
    from connito import errors

    for line in lines:
        message = json.loads(line)
        if "progress" in message:
            progress(*message["progress"])
        elif "lack" in message:
            raise errors.Retry(**message["lack"])
        elif "error" in message:
            raise getattr(errors, message["error"]["type"])(message["error"]["message"])
        else:
            result: dict[str, Any] = message["result"]
            return result
    return None


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]))
