"""Copies in function space: what thieves make is found, and miners that learnt the same from the same text are not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from connito.data.pseudo_gradients import DeltaFiles, gram_matrix
from connito.data.tensors import tensor_bytes
from connito.protocol.scoring.copies import CopyEvidence
from connito.protocol.scoring.functions import function_gram, outputs
from connito.protocol.scoring.own_work import OwnWork, handed_in_again, own_work, withhold
from connito.v1 import artifacts_pb2, cycle_pb2, run_pb2
from numpy.typing import NDArray

Array = NDArray[np.float64]
POLICY = run_pb2.ScorePolicy(copy_threshold=0.95, copy_span_threshold=0.95, copy_effect_threshold=0.08)
NUMBERS = 20_000


def submissions(count: int) -> list[cycle_pb2.Submission]:
    return [
        cycle_pb2.Submission(
            miner=f"U{place}", commit_sequence=place, artifact=artifacts_pb2.ArtifactRef(digest=f"{place:064x}")
        )
        for place in range(count)
    ]


def judged(works: Sequence[Array], policy: run_pb2.ScorePolicy = POLICY) -> OwnWork:
    rows = np.stack(works)
    gram = rows @ rows.T
    return own_work(submissions(len(rows)), CopyEvidence(gram), gram, policy, NUMBERS)


def honest(count: int, alike: float, seed: int = 0) -> list[Array]:
    """Return works that share a signal; `alike` is the cosine of two of them."""
    rng = np.random.default_rng(seed)
    signal, own = rng.standard_normal(NUMBERS), rng.standard_normal((count, NUMBERS))
    return [np.sqrt(alike) * signal + np.sqrt(1.0 - alike) * each for each in own]


def noise(length: float, seed: int = 99) -> Array:
    return length * np.random.default_rng(seed).standard_normal(NUMBERS)


@pytest.mark.parametrize("alike", [0.1, 0.6, 0.9, 0.99, 0.999])
@pytest.mark.parametrize("count", [1, 2, 3, 6, 40])
def test_miners_that_learn_the_same_are_not_accused(alike: float, count: int) -> None:
    found = judged(honest(count, alike))
    assert (found.original, found.leaning) == ({}, {}), (
        "the old signs called all of them copies from a cosine of 0.95 on"
    )


def test_miners_of_two_domains_are_not_accused() -> None:
    one, other = honest(4, 0.9, seed=1), honest(4, 0.9, seed=2)
    for order in ([0, 4, 5], [0, 1, 4, 5], [0, 4, 1, 5, 2, 6, 3, 7], [0, 1, 2, 4, 5, 3, 6]):
        works = [(one + other)[place] for place in order]
        assert judged(works).original == {}


def thefts(works: Sequence[Array]) -> dict[str, Array]:
    first, second = works[0], works[1]
    rng = np.random.default_rng(7)
    return {
        "copy": first,
        "scaled": 1.7 * first,
        "noise as long": first + noise(1.0),
        "noise twice as long": first + noise(2.0),
        "two mixed": 0.5 * first + 0.5 * second,
        "two mixed under noise": 0.5 * first + 0.5 * second + noise(1.0),
        "all averaged": np.asarray(np.mean(works, axis=0)),
        "dropped": first * (rng.random(NUMBERS) < 0.2) * 5.0,
        "copy and little own work": 0.95 * first + 0.05 * honest(1, 0.6, seed=5)[0],
    }


@pytest.mark.parametrize("kind", list(thefts(honest(2, 0.5))))
def test_what_was_made_of_earlier_work_is_found(kind: str) -> None:
    works = honest(6, 0.6)
    found = judged([*works, thefts(works)[kind]])
    assert set(found.original) == {"U6"}, "nobody else is blamed"
    assert found.original["U6"] == "U0" or "mixed" in kind or "averaged" in kind


def test_the_order_of_commitments_decides() -> None:
    works = honest(6, 0.6)
    copy = 1.3 * works[5] + noise(0.1)
    assert set(judged([works[0], works[1], works[2], works[3], copy, works[4], works[5]]).original) == {"U6"}


def effects(works: Sequence[Array], sequences: int) -> dict[str, dict[tuple[str, int], float]]:
    """Return gains by miner: what the works do along as many drawn directions, which noise beside them does not change."""
    lenses = np.stack([work[:sequences] for work in works])
    return {f"U{place}": {("target", k): float(gain) for k, gain in enumerate(row)} for place, row in enumerate(lenses)}


@pytest.mark.parametrize("count", [4, 5])
def test_noise_that_changes_no_effect_is_seen_by_the_stake_that_measured_it(count: int) -> None:
    works = honest(count, 0.6)
    blur = noise(1.0)
    blur[:40] = 0.0
    # As unlike in weights as any other: a mix of three, which leans on no single one.
    thief = sum(works[:3]) / 3.0 + blur
    rows = np.stack([*works, thief])
    gram, gains = rows @ rows.T, effects(list(rows), 40)
    blind = {
        miner: {key: float(np.random.default_rng(int(miner[1:])).normal()) for key in row}
        for miner, row in gains.items()
    }
    told = CopyEvidence(gram, {"A": gains, "B": gains, "liar": blind}, {"A": 1.0, "B": 1.0, "liar": 1.5})
    assert set(own_work(submissions(count + 1), told, gram, POLICY, NUMBERS).original) == {f"U{count}"}
    framed = CopyEvidence(gram, {"A": blind, "B": blind, "liar": gains}, {"A": 1.0, "B": 1.0, "liar": 1.5})
    assert own_work(submissions(count + 1), framed, gram, POLICY, NUMBERS).original == {}


def test_weights_that_show_nothing_do_not_hide_a_function() -> None:
    same = own_work(submissions(2), CopyEvidence(np.eye(2)), np.ones((2, 2)), POLICY, NUMBERS)
    assert same.original == {"U1": "U0"}, "the only other one's function"
    works = honest(6, 0.6)
    rows = np.stack([*works, 0.6 * works[1] + 0.4 * works[4]])
    mixed = own_work(submissions(7), CopyEvidence(np.eye(7)), rows @ rows.T, POLICY, NUMBERS)
    assert mixed.original == {"U6": "U1"}


def test_a_thief_that_commits_second_is_held_against_those_after_it() -> None:
    works = honest(5, 0.6)
    thief = works[0] + noise(1.0)
    assert judged([works[0], thief, *works[1:]]).original == {"U1": "U0"}


def test_nobody_leans_on_what_was_committed_later() -> None:
    works = honest(6, 0.6)
    blurred = [works[0] + noise(length, seed=seed) for seed, length in ((1, 0.5), (2, 1.0), (3, 1.0))]
    found = judged([*works[:2], *blurred, *works[2:]])
    assert set(found.original) == {"U2", "U3", "U4"}
    assert set(found.original.values()) == {"U0"}


def test_works_that_moved_nothing_or_anywhere_shield_nobody() -> None:
    works = honest(6, 0.6)
    idle, anywhere = np.zeros(NUMBERS), noise(1.0, seed=8)
    thefts_ = [np.asarray(np.mean(works, axis=0)), works[2] + noise(1.0)]
    assert set(judged([idle, anywhere, *works, *thefts_]).original) == {"U8", "U9"}


@pytest.mark.parametrize("earlier", [3, 4, 6, 12])
@pytest.mark.parametrize(("stolen", "low", "high"), [(0.55, 0.0, 0.0), (0.4, 0.0, 0.9), (0.15, 1.0, 1.0)])
def test_stolen_work_is_no_copy_and_only_its_own_part_is_paid(
    earlier: int, stolen: float, low: float, high: float
) -> None:
    works = honest(earlier, 0.6)
    own = honest(earlier + 1, 0.6)[earlier]
    found = judged([*works, stolen * works[2] + (1.0 - stolen) * own])
    assert not found.original
    thief = f"U{earlier}"
    assert set(found.leaning) <= {thief}
    assert low <= (found.leaning[thief].share if found.leaning else 1.0) <= high
    assert not found.leaning or found.leaning[thief].copy_of == "U2"


def test_of_two_that_share_a_domain_alone_neither_leans() -> None:
    pair, others = honest(2, 0.5, seed=3), honest(4, 0.6, seed=4)
    assert judged([*others, *pair]).leaning == {}


def test_where_all_learn_nearly_the_same_what_two_share_beside_the_rest_is_no_theft() -> None:
    """Of six sequences read again and again two miners may learn more alike than the others do."""
    works, signal = honest(6, 0.97), np.sqrt(0.97) * honest(1, 1.0)[0]
    near = signal + np.sqrt(0.5) * (works[5] - signal) + noise(np.sqrt(0.015))
    found = judged([*works, near])
    assert found.original == {}
    assert all(leaning.share > 0.2 for leaning in found.leaning.values())


def test_a_sign_that_the_policy_leaves_out_convicts_nobody() -> None:
    works = honest(6, 0.6)
    off = run_pb2.ScorePolicy()
    assert judged([*works, works[0] + noise(1.0)], off).original == {}


def test_vectors_of_few_numbers_are_not_judged_by_what_explains_them() -> None:
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 5))
    gram = rows @ rows.T
    assert own_work(submissions(6), CopyEvidence(gram), gram, POLICY, numbers=5).original == {}


def test_a_leaning_verdict_is_paid_its_share_and_says_so() -> None:
    verdict = cycle_pb2.Verdict(status=cycle_pb2.VERDICT_STATUS_SCORED, reward=1001)
    withhold(verdict, cycle_pb2.Finding(kind=cycle_pb2.FINDING_KIND_LEANS, copy_of="V", share=0.25))
    assert (verdict.reward, verdict.withheld, verdict.leaning.copy_of) == (250, 751, "V")
    assert verdict.finding.kind == cycle_pb2.FINDING_KIND_LEANS


# Files: (gate_up [E, 2I, H], down [E, H, I]) in the three layouts that models come in.


def expert_state(seed: int, gated: bool = True, scale: float = 1.0) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng(seed)
    into = rng.standard_normal((3, 24 if gated else 12, 8)) * scale
    out = rng.standard_normal((3, 8, 12)) * scale
    first = "gate_up_proj" if gated else "up_proj"
    return {f"layers.0.{first}": into.astype(np.float32), "layers.0.down_proj": out.astype(np.float32)}


def moved(state: dict[str, NDArray[np.float32]], seed: int) -> dict[str, NDArray[np.float32]]:
    step = expert_state(seed, "layers.0.gate_up_proj" in state, 0.05)
    return {name: rows + step[name] for name, rows in state.items()}


def other_weights(state: dict[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """Return the same function: neurons permuted, and those of a gate scaled and with turned signs."""
    rng, made = np.random.default_rng(3), {name: rows.copy() for name, rows in state.items()}
    first = next(name for name in made if "up_proj" in name)
    for into, out in zip(made[first], made["layers.0.down_proj"], strict=True):
        order, factors = rng.permutation(12), rng.choice([-2.0, 0.5, 4.0], 12)
        if len(into) == 12:
            into[:], out[:] = into[order], out[:, order]
            continue
        into[:12], into[12:] = into[:12][order], into[12:][order] * factors[:, None]
        out[:] = out[:, order] / factors
    return made


def turned(state: dict[str, NDArray[np.float32]], interleaved: bool) -> dict[str, NDArray[np.float32]]:
    """Return the layouts that keep inputs first: halves one after the other, or gate and up by turns with biases."""
    into, out = state["layers.0.gate_up_proj"], state["layers.0.down_proj"]
    if interleaved:
        into = np.stack([into[:, :12], into[:, 12:]], axis=2).reshape(3, 24, 8)
    made = {"layers.0.gate_up_proj": into.swapaxes(1, 2), "layers.0.down_proj": out.swapaxes(1, 2)}
    bias = {"layers.0.gate_up_proj_bias": np.zeros((3, 24), np.float32)} if interleaved else {}
    return {name: np.ascontiguousarray(rows) for name, rows in {**made, **bias}.items()}


def files(folder: Path, states: Sequence[dict[str, NDArray[np.float32]]]) -> list[Path]:
    paths = [folder / f"{place}.safetensors" for place in range(len(states))]
    for path, state in zip(paths, states, strict=True):
        path.write_bytes(tensor_bytes(state))
    return paths


@pytest.mark.parametrize("gated", [True, False])
def test_other_weights_of_the_same_function_are_the_same_to_the_eye(tmp_path: Path, gated: bool) -> None:
    theta = expert_state(0, gated)
    work = moved(theta, 1)
    base, same, other, unlike = files(tmp_path, [theta, work, other_weights(work), moved(theta, 2)])
    gram = function_gram([same, other, unlike], [base] * 3, b"seed")
    likeness = gram / np.sqrt(np.outer(np.diag(gram), np.diag(gram)))
    assert likeness[0, 1] > 0.9999
    assert abs(likeness[0, 2]) < 0.8
    weights = gram_matrix(DeltaFiles([same, other], [base] * 2))
    assert weights[0, 1] / np.sqrt(weights[0, 0] * weights[1, 1]) < 0.3, "weights do not show it"
    found = own_work(submissions(3), CopyEvidence(gram_matrix(DeltaFiles([same, unlike, other], [base] * 3))),
                     gram[np.ix_([0, 2, 1], [0, 2, 1])], POLICY, NUMBERS)  # fmt: skip
    assert found.original == {"U2": "U0"}


@pytest.mark.parametrize("interleaved", [True, False])
def test_the_layout_of_a_family_does_not_change_the_function(tmp_path: Path, interleaved: bool) -> None:
    state = expert_state(4)
    plain, other = files(tmp_path, [state, turned(state, interleaved)])
    np.testing.assert_allclose(outputs(plain, b"s"), outputs(other, b"s"), rtol=1e-5, atol=1e-5)


def test_activations_are_drawn_from_the_seed(tmp_path: Path) -> None:
    (path,) = files(tmp_path, [expert_state(0)])
    assert np.array_equal(outputs(path, b"a"), outputs(path, b"a"))
    assert not np.allclose(outputs(path, b"a"), outputs(path, b"b"))


def test_an_unknown_layout_says_nothing(tmp_path: Path) -> None:
    (path,) = files(tmp_path, [{"layers.0.odd": np.ones((2, 3), np.float32)}])
    assert not outputs(path, b"a").any()


def test_among_many_a_work_whose_likes_all_came_later_leans_on_nobody() -> None:
    """The first works of a second domain, behind more than are compared of the first: all that is near them came later."""
    first, second = honest(2, 0.5, seed=1), honest(60, 0.5, seed=2)
    found = judged([*first, *second])
    assert (found.original, found.leaning) == ({}, {})


def told_again(
    earlier: Sequence[Array], works: Sequence[Array], miners: Sequence[str], policy: run_pb2.ScorePolicy = POLICY
) -> dict[str, str]:
    """Whose earlier work each is; earlier ones are of U0, U1 …, and those of now were committed later."""
    before, now = submissions(len(earlier)), submissions(len(works))
    for place, entry in enumerate(now):
        entry.miner, entry.commit_sequence = miners[place], 100 + place
    rows = np.stack([*earlier, *works])
    gram = rows @ rows.T
    found = handed_in_again(now, now, before, (gram, gram), policy, NUMBERS)
    return {miner: refusal.finding.copy_of for miner, refusal in found.items()}


REPACKED: dict[str, Callable[[list[Array]], Array]] = {
    "as it was": lambda works: works[1],
    "scaled": lambda works: 0.3 * works[1],
    "under little noise": lambda works: works[1] + noise(0.1),
    "under noise": lambda works: works[1] + noise(0.3),
    "mixed": lambda works: 0.7 * works[1] + 0.3 * works[2],
    "of all": lambda works: np.stack(works).mean(axis=0),
}


@pytest.mark.parametrize("how", REPACKED)
@pytest.mark.parametrize("count", [3, 8])
def test_work_of_an_earlier_cycle_is_known_however_it_is_packed(how: str, count: int) -> None:
    before = honest(count, 0.4)
    assert told_again(before, [REPACKED[how](before)], ["UTHIEF"])["UTHIEF"] in {"U0", "U1"}


@pytest.mark.parametrize("alike", [0.0, 0.3, 0.6, 0.9, 0.99])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_work_of_now_is_no_earlier_work(alike: float, count: int) -> None:
    works = honest(2 * count, alike)
    names = [f"U{place}" for place in range(count)]
    assert told_again(works[:count], works[count:], names) == {}


def test_work_from_the_same_text_in_another_cycle_is_no_copy() -> None:
    before = honest(6, 0.3)
    works = [0.85 * each + noise(0.53, 100 + place) for place, each in enumerate(before)]
    assert told_again(before, works, [f"U{place}" for place in range(6)]) == {}
    assert told_again(before, works, [f"UOTHER{place}" for place in range(6)]) == {}, (
        "nor is it a copy of whoever trained from its text before, so that it be called one"
    )
    assert told_again(before, [0.7 * before[0]], ["U0"]) == {"U0": "U0"}, "its very own again is no work"


def test_nobody_is_held_against_what_was_committed_later() -> None:
    """A reveal that rolls over counts in the next cycle, when whoever copied it was on time."""
    before, works = submissions(3), honest(3, 0.4)
    late = submissions(1)
    late[0].miner, late[0].commit_sequence = "ULATE", 1
    rows = np.stack([*works, works[2]])
    gram = rows @ rows.T
    assert handed_in_again(late, late, before, (gram, gram), POLICY, NUMBERS) == {}
    off = run_pb2.ScorePolicy(copy_threshold=0.95)
    late[0].commit_sequence = 9
    assert set(handed_in_again(late, late, before, (gram, gram), POLICY, NUMBERS)) == {"ULATE"}
    assert handed_in_again(late, late, before, (gram, gram), off, NUMBERS) == {}
