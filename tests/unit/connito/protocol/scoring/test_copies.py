from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from connito.data.pseudo_gradients import DeltaFiles, DeltaSubset, gram_matrix
from connito.errors import Invalid
from connito.protocol.scoring.copies import (
    REMEMBERED_CYCLES,
    copies,
    cosines,
    handed_in_before,
)
from connito.v1 import artifacts_pb2, cycle_pb2, reasons_pb2

from tests.support.files import write_tensors
from tests.support.run import Run, ref

RNG = np.random.default_rng(3)
SHAPES = {"layers.0.a": (3, 40, 10), "layers.1.a": (2, 40, 10)}


def files(folder: Path, deltas: list[dict[str, np.ndarray]]) -> DeltaFiles:
    base = {name: RNG.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    write_tensors(folder / "base", base)
    for index, delta in enumerate(deltas):
        write_tensors(folder / str(index), {name: base[name] - delta[name] for name in base})
    return DeltaFiles([folder / str(index) for index in range(len(deltas))], [folder / "base"] * len(deltas))


def noise(scale: float = 1.0) -> dict[str, np.ndarray]:
    return {name: (scale * RNG.normal(size=shape)).astype(np.float32) for name, shape in SHAPES.items()}


def entries(*order: int, digests: tuple[str, ...] = ()) -> list[cycle_pb2.Submission]:
    return [
        cycle_pb2.Submission(
            miner=f"U{i}",
            commit_sequence=sequence,
            artifact=artifacts_pb2.ArtifactRef(digest=digests[i] if digests else str(i)),
        )
        for i, sequence in enumerate(order)
    ]


def test_the_gram_matrix_is_that_of_the_flattened_deltas(tmp_path: Path) -> None:
    deltas = files(tmp_path, [noise(), noise(2.0), noise(0.1)])
    flat = np.stack(
        [np.concatenate([deltas.load(i, n).reshape(-1) for n in deltas.names]).astype(np.float64) for i in range(3)]
    )
    gram = gram_matrix(deltas)
    np.testing.assert_allclose(gram, flat @ flat.T, rtol=1e-9, atol=1e-8)
    np.testing.assert_array_equal(gram, gram.T)
    subset = gram_matrix(DeltaSubset(deltas, (2, 0)))
    np.testing.assert_allclose(subset, gram[np.ix_([2, 0], [2, 0])], rtol=1e-9, atol=1e-8)


def test_noise_and_scaling_do_not_hide_a_copy(tmp_path: Path) -> None:
    original, extra = noise(), noise(0.05)
    copied = {name: 0.5 * original[name] + extra[name] for name in original}
    similarity = cosines(gram_matrix(files(tmp_path, [copied, original, noise()])))
    assert similarity[0, 1] > 0.98
    assert abs(similarity[1, 2]) < 0.1
    # The copy stands first in the list but committed later.
    assert copies(entries(7, 3, 5), similarity, 0.98) == {"U0": "U1"}


def test_a_chain_of_copies_is_traced_to_the_first_and_never_blames_it() -> None:
    similarity = np.array([[1, 0.99, 0.5], [0.99, 1, 0.99], [0.5, 0.99, 1]])
    assert copies(entries(1, 2, 3), similarity, 0.98) == {"U1": "U0", "U2": "U0"}
    assert copies(entries(3, 2, 1), similarity, 0.98) == {"U1": "U2", "U0": "U2"}


def test_the_same_file_is_a_copy_at_any_threshold() -> None:
    assert copies(entries(1, 2, digests=("x", "x")), np.eye(2), 0.0) == {"U1": "U0"}
    assert copies(entries(1, 2), np.ones((2, 2)), 0.0) == {}


def test_doing_nothing_is_similar_to_nothing(tmp_path: Path) -> None:
    still = {name: np.zeros(shape, np.float32) for name, shape in SHAPES.items()}
    similarity = cosines(gram_matrix(files(tmp_path, [still, still, noise()])))
    assert similarity[0].tolist() == [0, 0, 0]


def test_states_of_different_layout_are_refused(tmp_path: Path) -> None:
    deltas = files(tmp_path, [noise()])
    write_tensors(tmp_path / "other", {"layers.0.a": np.zeros(3, np.float32)})
    with pytest.raises(Invalid, match="same tensors"):
        DeltaFiles([*deltas.states, tmp_path / "other"], [*deltas.bases, tmp_path / "base"])


@pytest.mark.parametrize("threshold", [0.0, 0.8])
@pytest.mark.parametrize("seed", range(5))
def test_pairs_are_those_of_looking_at_each(threshold: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((40, 6))
    rows[rng.integers(40, size=15)] = rows[rng.integers(40, size=15)]
    similarity = cosines(rows @ rows.T)
    similarity[3] = similarity[:, 3] = np.nan
    entries = [
        cycle_pb2.Submission(
            miner=f"U{place}",
            commit_sequence=int(turn),
            artifact=artifacts_pb2.ArtifactRef(digest="" if place % 7 == 0 else f"{rng.integers(25):064x}"),
        )
        for place, turn in enumerate(rng.permutation(40))
    ]
    want: dict[str, str] = {}
    order = sorted(range(40), key=lambda place: entries[place].commit_sequence)
    for turn, later in enumerate(order):
        for earlier in order[:turn]:
            one, other = entries[earlier].artifact.digest, entries[later].artifact.digest
            if (one == other != "") or (threshold > 0.0 and similarity[earlier, later] >= threshold):
                first = entries[earlier].miner
                want[entries[later].miner] = want.get(first, first)
                break
    assert copies(entries, similarity, threshold) == want
    assert want


def test_bytes_of_an_earlier_cycle_are_a_copy_whoever_hands_them_in_again() -> None:
    run = Run().created().selected()
    handed = {
        1: {"UA": "aa", "UB": "bb"},
        2: {"UA": "cc", "UB": "aa", "UC": "dd"},
        3: {"UA": "cc", "UC": "ee", "UD": "aa"},
    }
    for cycle, by in handed.items():
        entries = [cycle_pb2.Submission(miner=miner, artifact=ref(digest)) for miner, digest in by.items()]
        run.say("submit", cycle, "settled", submissions=entries)
    found = [handed_in_before(run.facts, cycle, run.facts.window("submit", cycle).submissions) for cycle in (1, 2, 3)]
    assert [{miner: refusal.finding.copy_of for miner, refusal in each.items()} for each in found] == [
        {},
        {"UB": "UA"},
        {"UA": "UA", "UD": "UA"},
    ]
    assert {refusal.reason for each in found for refusal in each.values()} == {reasons_pb2.REASON_COPY}
    last = REMEMBERED_CYCLES + 2
    again = [cycle_pb2.Submission(miner="UE", artifact=ref("bb")), cycle_pb2.Submission(miner="UF", artifact=ref("dd"))]
    run.say("submit", last, "settled", submissions=again)
    assert set(handed_in_before(run.facts, last, again)) == {"UF"}, "the first cycle is out of mind"


def test_under_another_key_the_same_work_was_handed_in_before() -> None:
    run = Run().created().selected()
    for cycle, (digest, content) in enumerate([("aa", "11"), ("bb", "11"), ("cc", "22"), ("11", "")], 1):
        entry = cycle_pb2.Submission(miner=f"U{cycle}", artifact=ref(digest))
        entry.artifact.content = content
        run.say("submit", cycle, "settled", submissions=[entry])
    found = [handed_in_before(run.facts, cycle, run.facts.window("submit", cycle).submissions) for cycle in range(1, 5)]
    assert [sorted(each) for each in found] == [[], ["U2"], [], ["U4"]]
