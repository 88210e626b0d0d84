from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from connito.errors import VerificationFailed
from connito.library.artifact import ExpertHeader, write_expert
from connito.library.attestation import attest, check_attestation, countersign
from connito.library.record import build_record, encode
from connito.moe.state import save_state
from connito.v1 import artifacts_pb2, cycle_pb2, run_pb2
from connito.wire import subjects
from connito.wire.envelope import seal
from connito.wire.facts import RunFacts
from connito.wire.identity import Identity
from connito.wire.roster import Roster

AGGREGATOR, LIBRARY, STRANGER = (Identity.generate(name * 32) for name in (b"a", b"l", b"s"))
ROSTER = Roster({"aggregator": frozenset({AGGREGATOR.public}), "library": frozenset({LIBRARY.public})})


@pytest.fixture
def folder(tmp_path: Path, finished: RunFacts) -> Path:
    """An expert's folder as the library gives it out; signed by `AGGREGATOR` and `LIBRARY`."""
    state = tmp_path / "state"
    save_state({"layers.2.up_proj": torch.arange(6.0).reshape(2, 3)}, state, {"version": "2"})
    out = tmp_path / "expert"
    out.mkdir()
    header = ExpertHeader("medical", "smol", "b" * 64, {2: [1, 5]}, "run-1", 2)
    digest = write_expert(state, out / "expert.safetensors", header)
    record = encode(build_record(finished, digest, 10, 6))
    (out / "record.json").write_bytes(record)

    def ref(path: Path) -> artifacts_pb2.ArtifactRef:
        return artifacts_pb2.ArtifactRef(digest=hashlib.sha256(path.read_bytes()).hexdigest(), size=1)

    version = cycle_pb2.VersionPublished(run="run-1", cycle=2, version=2, state=ref(state))
    subject = subjects.fact("run-1", "merge", 2, "version")
    made = attest(subject, seal(AGGREGATOR, subject, version).SerializeToString(), state)
    deposit = run_pb2.ExpertDeposited(
        run="run-1", expert_id="medical-1", expert=ref(out / "expert.safetensors"), record=ref(out / "record.json")
    )
    subject = subjects.fact("run-1", "library", 0, "deposited", "medical-1")
    whole = countersign(made, subject, seal(LIBRARY, subject, deposit).SerializeToString())
    (out / "attestation.json").write_text(json.dumps(whole))
    return out


def test_both_signatures_hold_without_a_network(folder: Path) -> None:
    assert [line.split()[1] for line in check_attestation(folder, ROSTER)] == ["library", "aggregator"]
    assert all("no roster" in line for line in check_attestation(folder))


@pytest.mark.parametrize("name", ["expert.safetensors", "record.json"])
def test_another_byte_is_found_out(folder: Path, name: str) -> None:
    data = bytearray((folder / name).read_bytes())
    data[-2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(VerificationFailed, match="not those that the library signed"):
        check_attestation(folder, ROSTER)


def test_a_key_that_the_roster_does_not_have_is_named(folder: Path) -> None:
    other = Roster({"aggregator": frozenset({STRANGER.public}), "library": frozenset({LIBRARY.public})})
    with pytest.raises(VerificationFailed, match=AGGREGATOR.public):
        check_attestation(folder, other)


def test_a_state_that_the_aggregator_did_not_sign_is_found_out(folder: Path) -> None:
    attestation = json.loads((folder / "attestation.json").read_text())
    attestation["aggregator"]["subject"] = subjects.fact("run-1", "merge", 1, "version")
    (folder / "attestation.json").write_text(json.dumps(attestation))
    with pytest.raises(VerificationFailed, match="signature"):
        check_attestation(folder, ROSTER)
