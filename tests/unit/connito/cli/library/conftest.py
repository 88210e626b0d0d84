"""Fixtures of a shelf: `run` a verb and read its JSON; `exports` one folder an expert; `stocked` a shelf with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from connito.base.description import build_manifest
from connito.base.loading import load_full
from connito.cli.library import app
from connito.experts.compose import Part, layers_of, state_of
from connito.library.artifact import ExpertHeader, tensor_sizes, write_expert
from connito.library.record import encode, expert_id
from connito.library.schema import ExpertRecord
from connito.moe.rows import base_digests
from connito.moe.state import save_state
from typer.testing import CliRunner

from tests.support.models import full, one_thread, sequences, tiny
from tests.support.parts import base, parts

__all__ = ["base", "full", "one_thread", "parts", "sequences", "tiny"]


@pytest.fixture
def run(tmp_path: Path) -> Any:
    def invoke(*arguments: object) -> Any:
        result = CliRunner().invoke(app, [*map(str, arguments), "--json"])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code == 0, result.output
        return json.loads(result.stdout)

    return invoke


@pytest.fixture
def exports(tiny: Path, parts: dict[str, Part], tmp_path: Path) -> dict[str, Path]:
    """One folder an expert, as an export leaves it."""
    model, manifest = load_full(tiny), build_manifest(tiny)
    folders = {}
    for domain, part in parts.items():
        folder = tmp_path / "exports" / domain
        folder.mkdir(parents=True)
        layers = layers_of(part.rows)
        base = base_digests(model, layers)
        header = ExpertHeader(domain, manifest.name, manifest.digest, layers, "run-1", 1, base.rest, base.rows)
        save_state(state_of(part.rows), folder / "state")
        digest = write_expert(folder / "state", folder / "expert.safetensors", header)
        (folder / "state").unlink()
        record: ExpertRecord = {
            "format": "connito-record/1", "expert_id": expert_id(domain, digest), "domain": domain, "run": "run-1",
            "created": "2031-01-01T00:00:00.000+00:00", "base": {"name": manifest.name, "manifest": manifest.digest},
            "expert": {"digest": digest, "bytes": (folder / "expert.safetensors").stat().st_size,
                       "parameters": tensor_sizes(folder / "expert.safetensors")[0]},
            "model_parameters": 1000,
            "selection": {"method": "esft-token", "threshold": 0.2, "layers": {str(k): v for k, v in layers.items()},
                          "selected": 5, "total": 16, "report": ""},
            "losses": [{"domain": domain, "before": 2.0, "after": 1.5, "tokens": 100}], "lineage": [],
            "contributors": [{"miner": f"U-{domain}", "label": domain, "reward": 10, "merged": 1, "share": 1.0, "reasons": {}}],
            "license": "CC0-1.0" if domain == "logs" else "CC-BY-4.0", "data_statement": f"generated {domain}",
            "customer": "", "training_data": f"corpus-{domain}",
        }  # fmt: skip
        (folder / "record.json").write_bytes(encode(record))
        folders[domain] = folder
    return folders


@pytest.fixture
def stocked(run: Any, exports: Any, tmp_path: Path) -> Any:
    """(shelf folder, expert ids by domain)."""
    shelf = tmp_path / "shelf"
    return shelf, {d: run("deposit", folder, "--shelf", shelf)["expert_id"] for d, folder in exports.items()}
