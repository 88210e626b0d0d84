"""Which earlier cycle's remainder a cycle begins with, whatever became of the submissions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from connito.data.codecs.file import CODED
from connito.data.safetensors_header import SAFETENSORS
from connito.data.tensors import tensor_bytes
from connito.protocol.policy.choices import ROWS
from connito.v1 import cycle_pb2, reasons_pb2

from services.trainer.feedback import code, counts, media_type
from tests.support.run import ME, Run, ref


def judged(run: Run, cycle: int, *, merged: bool, origin: int = 0) -> Run:
    entry = cycle_pb2.Submission(miner=ME, artifact=ref("aa"), origin_cycle=origin or cycle)
    run.say("submit", cycle, "accepted", submission=entry)
    return run.say("merge", cycle, "version", merged=[ME] if merged else [])


def test_only_merged_work_counts(story: Run) -> None:
    assert not counts(judged(story, 1, merged=False).facts, ME, 1)
    assert counts(judged(story, 2, merged=True).facts, ME, 2)


def test_late_work_counts_by_the_cycle_that_judged_it(story: Run) -> None:
    story.say("commit", 1, "settled", committed=[ME])
    story.say("submit", 1, "refused", miner=ME, reason=reasons_pb2.REASON_LATE_REVEAL, ingress_sequence=5)
    assert counts(story.facts, ME, 1), "it may still be merged"
    assert not counts(judged(story, 2, merged=False, origin=1).facts, ME, 1)


def test_refused_and_missed_work_does_not_count(story: Run) -> None:
    assert not counts(story.facts, ME, 1), "nothing was committed"
    story.say("commit", 1, "settled", committed=[ME])
    story.say("submit", 1, "refused", miner=ME, reason=reasons_pb2.REASON_NORM_EXCEEDED, ingress_sequence=5)
    assert not counts(story.facts, ME, 1)


def test_work_never_revealed_ends_to_count(story: Run) -> None:
    story.say("commit", 1, "settled", committed=[ME])
    assert counts(story.facts, ME, 1)
    story.say("submit", 2, "closed", stream="INGRESS", last_sequence=9)
    assert not counts(story.facts, ME, 1)


def rows(path: Path, seed: int) -> Path:
    path.write_bytes(
        tensor_bytes({"layers.0.w": np.random.default_rng(seed).standard_normal((4, 64)).astype(np.float32)})
    )
    return path


@pytest.fixture
def coded(story: Run) -> Run:
    training = story.facts.require_spec().training
    training.codec, training.codec_share = "top-k", 0.1
    return story


@pytest.mark.parametrize("codec", ["ternary", "int4", "int8"])
def test_what_only_rounds_leaves_nothing_for_later(coded: Run, tmp_path: Path, codec: str) -> None:
    coded.facts.require_spec().training.codec = codec
    judged(coded, 1, merged=True)
    left, state = tmp_path / "left", rows(tmp_path / "state", 0)
    handed = [
        code(coded.facts, ME, cycle, state, rows(tmp_path / "draft.safetensors", 7), left).read_bytes()
        for cycle in (1, 2)
    ]
    assert handed[0] == handed[1], "each cycle sends its own work"
    assert not left.exists()


def test_a_cycle_begins_with_what_the_newest_merged_one_left(coded: Run, tmp_path: Path) -> None:
    judged(coded, 1, merged=True)
    judged(coded, 2, merged=False)
    left, state = tmp_path / "left", rows(tmp_path / "state", 0)

    def handed(cycle: int) -> bytes:
        found = code(coded.facts, ME, cycle, state, rows(tmp_path / "draft.safetensors", 7), left)
        assert found.read_bytes().startswith(b"connito\x01")
        return found.read_bytes()

    first = handed(1)
    assert handed(1) == first, "again after a crash"
    second = handed(2)
    assert second != first, "with what the first left"
    assert handed(3) == second, "the second was not merged: only what the first left"
    assert sorted(path.name for path in left.iterdir()) == ["1.safetensors", "3.safetensors"]


def number(value: float) -> bytes:
    return np.float32(value).tobytes()


@pytest.mark.parametrize(
    "content",
    [
        lambda whole: b"",
        lambda whole: bytes(len(whole)),
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-4] + number(np.nan),
        lambda whole: whole[:-4] + number(np.inf),
        lambda whole: whole[:-4] + number(1e30),
        lambda whole: tensor_bytes({"layers.0.w": np.zeros((4, 64), np.int64)}),
    ],
    ids=["empty", "zeros", "half", "nan", "infinite", "huge", "integers"],
)
def test_a_damaged_remainder_costs_no_submission(coded: Run, tmp_path: Path, content: Callable[[bytes], bytes]) -> None:
    judged(coded, 1, merged=True)
    left, state = tmp_path / "left", rows(tmp_path / "state", 0)

    def handed(cycle: int) -> Path:
        return code(coded.facts, ME, cycle, state, rows(tmp_path / "draft.safetensors", 7), left)

    first = handed(1).read_bytes()
    kept = left / "1.safetensors"
    kept.write_bytes(content(kept.read_bytes()))
    assert handed(2).read_bytes() == first, "as if nothing had been left"


def test_foreign_files_beside_a_remainder_are_left_alone(coded: Run, tmp_path: Path) -> None:
    left = tmp_path / "left"
    (left / "3.safetensors").mkdir(parents=True)
    (left / "notes.safetensors").write_bytes(b"mine")
    found = code(coded.facts, ME, 4, rows(tmp_path / "state", 0), rows(tmp_path / "draft.safetensors", 7), left)
    assert found.suffix == ".coded"
    assert (left / "notes.safetensors").read_bytes() == b"mine"


def test_rows_of_another_form_are_handed_in_as_they_are(coded: Run, tmp_path: Path) -> None:
    draft = tmp_path / "draft.safetensors"
    draft.write_bytes(tensor_bytes({"layers.0.other": np.zeros((4, 64), np.float32)}))
    assert code(coded.facts, ME, 1, rows(tmp_path / "state", 0), draft, tmp_path / "left") == draft


def test_a_run_of_rows_keeps_no_remainder(story: Run, tmp_path: Path) -> None:
    draft = rows(tmp_path / "draft.safetensors", 7)
    for spoken in ("", ROWS):
        story.facts.require_spec().training.codec = spoken
        assert code(story.facts, ME, 1, rows(tmp_path / "state", 0), draft, tmp_path / "left") == draft
        assert media_type(story.facts) == SAFETENSORS
    assert not (tmp_path / "left").exists()
    story.facts.require_spec().training.codec = "ternary"
    assert media_type(story.facts) == CODED
