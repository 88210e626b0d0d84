from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from connito.data.pseudo_gradients import DeltaFiles, DeltaSubset, gram_matrix
from connito.errors import Invalid
from connito.protocol.scoring.copies import (
    REMEMBERED_CYCLES,
    CopyEvidence,
    copies,
    cosines,
    distance,
    explained,
    find_copies,
    handed_in_before,
)
from connito.v1 import artifacts_pb2, cycle_pb2, reasons_pb2, run_pb2
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

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


POLICY = run_pb2.ScorePolicy(copy_threshold=0.95, copy_span_threshold=0.95, copy_effect_threshold=0.08)
SEQUENCES = [("medical", number) for number in range(30)]


def honest(count: int, shared: float = 0.8, seed: int = 0) -> np.ndarray:
    """Pseudo-gradients [count, d] of which any two have a cosine of about `shared`."""
    rng = np.random.default_rng(seed)
    common, own = rng.normal(size=4000), rng.normal(size=(count, 4000))
    made: NDArray[Any] = np.sqrt(shared) * common + np.sqrt(1 - shared) * own
    return made


def gains(*effects: np.ndarray, validators: str = "ABC") -> dict[str, dict[str, dict[tuple[str, int], float]]]:
    """What every validator measured of miners U0, U1, …"""
    of = {f"U{i}": dict(zip(SEQUENCES, map(float, effect), strict=True)) for i, effect in enumerate(effects)}
    return dict.fromkeys(validators, of)


def effect(seed: int) -> np.ndarray:
    """Half of it is what everybody learns."""
    return 1.0 + np.random.default_rng(seed).normal(size=len(SEQUENCES))


def test_a_mix_of_victims_lies_in_their_span_though_it_is_like_none_of_them() -> None:
    one, two, three = honest(3, shared=0.6)
    deltas = np.stack([one, two, three, 0.6 * one + 0.4 * two])
    similarity = deltas @ deltas.T
    assert copies(entries(1, 2, 3, 4), np.corrcoef(deltas), 0.95) == {}
    assert find_copies(entries(1, 2, 3, 4), CopyEvidence(similarity), POLICY) == {"U3": "U0"}
    assert find_copies(entries(2, 3, 4, 1), CopyEvidence(similarity), POLICY) == {"U1": "U3"}, (
        "what is left of it is stolen"
    )
    off = run_pb2.ScorePolicy(copy_threshold=0.95)
    assert find_copies(entries(1, 2, 3, 4), CopyEvidence(similarity), off) == {}


def test_honest_work_that_is_much_alike_is_nobodys_copy() -> None:
    deltas = honest(16, shared=0.8)
    assert find_copies(entries(*range(16)), CopyEvidence(deltas @ deltas.T), POLICY) == {}
    shared, parts = explained(np.corrcoef(deltas), range(15), 15)
    assert 0.8 < shared < 0.95
    assert (np.abs(parts) < 0.3).all()


def test_free_noise_hides_the_direction_but_not_the_effect() -> None:
    deltas = honest(3)
    noise = 1.5 * np.random.default_rng(9).normal(size=deltas.shape[1])
    deltas = np.vstack([deltas, deltas[1] + noise])
    measured = gains(effect(1), effect(2), effect(3), 1.01 * effect(2) + 0.01 * effect(4))
    blind = CopyEvidence(deltas @ deltas.T)
    assert find_copies(entries(1, 2, 3, 4), blind, POLICY) == {}
    assert find_copies(entries(1, 2, 3, 4), CopyEvidence(blind.gram, measured), POLICY) == {"U3": "U1"}


def test_two_victims_under_noise_are_found_by_what_their_mix_does() -> None:
    deltas = honest(3)
    deltas = np.vstack([deltas, (deltas[0] + deltas[2]) / 2 + np.random.default_rng(9).normal(size=deltas.shape[1])])
    measured = gains(effect(1), effect(2), effect(3), 0.5 * effect(1) + 0.5 * effect(3))
    assert set(find_copies(entries(1, 2, 3, 4), CopyEvidence(deltas @ deltas.T, measured), POLICY)) == {"U3"}


def test_a_lying_minority_frames_nobody_and_equal_effects_alone_convict_nobody() -> None:
    deltas = honest(3)
    truth, lie = gains(effect(1), effect(2), effect(3)), gains(effect(1), effect(2), effect(1), validators="C")
    framed = CopyEvidence(deltas @ deltas.T, {**truth, **lie})
    assert find_copies(entries(1, 2, 3), framed, POLICY) == {}
    weighty = CopyEvidence(framed.gram, framed.gains, {"A": 1.0, "B": 1.0, "C": 5.0})
    assert find_copies(entries(1, 2, 3), weighty, POLICY) == {"U2": "U0"}
    strangers = np.random.default_rng(4).normal(size=(2, 4000))
    same = CopyEvidence(strangers @ strangers.T, gains(effect(1), effect(1)))
    assert find_copies(entries(1, 2), same, POLICY) == {}


def test_one_liar_that_alone_was_given_both_frames_nobody() -> None:
    """Of three validators that each scored the accused, where the seed gave the other one to the liar and to others."""
    deltas = np.array([[1.0, 0, 0], [0, 1.0, 0], [0.5, 0.0, 0.87]])
    truth, lie = gains(effect(1), effect(2), effect(3)), gains(effect(1), effect(2), effect(1), validators="C")
    given = {"A": ("U1", "U2"), "B": ("U1", "U2"), "C": ("U0", "U1", "U2")}
    apart = {
        validator: {miner: {**truth, **lie}[validator][miner] for miner in miners}
        for validator, miners in given.items()
    }
    assert find_copies(entries(1, 2, 3), CopyEvidence(deltas @ deltas.T, apart), POLICY) == {}
    # Two that agree, of three, are enough.
    apart["B"] = apart["C"]
    assert find_copies(entries(1, 2, 3), CopyEvidence(deltas @ deltas.T, apart), POLICY) == {"U2": "U0"}


def test_too_few_sequences_and_opposite_effects_say_nothing() -> None:
    few = dict.fromkeys(SEQUENCES[:11], 1.0)
    assert distance(few, [few]) == float("inf")
    many = dict.fromkeys(SEQUENCES, 1.0)
    assert distance(many, [many]) == 0.0
    assert distance(many, [dict.fromkeys(SEQUENCES, -1.0)]) == float("inf")
    assert distance(dict.fromkeys(SEQUENCES, 0.0), [many]) == float("inf")


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1), st.lists(st.sampled_from(["own", "copy", "mix", "noise", "minus"]), max_size=6))
def test_nothing_committed_later_makes_a_copy_of_earlier_work(seed: int, later: list[str]) -> None:
    """The griefer's hope: whatever it commits after them, honest work stays what it was."""
    rng, mine = np.random.default_rng(seed), honest(4, seed=seed)
    rows, effects = list(mine), [effect(seed + i) for i in range(4)]
    for kind in later:
        a, b = rng.choice(4, 2, replace=False)
        made = {"own": rng.normal(size=4000), "copy": mine[a], "mix": mine[a] + rng.normal() * mine[b],
                "noise": mine[a] + rng.normal(size=4000), "minus": mine[a] - mine[b]}[kind]  # fmt: skip
        rows.append(made)
        effects.append(effects[a])
    deltas = np.stack(rows)
    found = find_copies(entries(*range(len(rows))), CopyEvidence(deltas @ deltas.T, gains(*effects)), POLICY)
    assert set(found).isdisjoint({"U0", "U1", "U2", "U3"})
    assert all(f"U{4 + i}" in found for i, kind in enumerate(later) if kind in ("copy", "mix"))


def test_where_everybody_learns_the_same_an_effect_convicts_nobody() -> None:
    """A model and a text on which all miners' gains are within 5 % of each other."""
    deltas = honest(6)
    measured = gains(*(effect(1) + 0.05 * (effect(10 + i) - 1.0) for i in range(6)))
    assert find_copies(entries(*range(6)), CopyEvidence(deltas @ deltas.T, measured), POLICY) == {}
    two = CopyEvidence(deltas[:2] @ deltas[:2].T, measured)
    assert find_copies(entries(1, 2), two, POLICY) == {}


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
