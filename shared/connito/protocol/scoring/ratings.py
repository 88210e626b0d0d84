"""Ratings: how good a miner is, over cycles. Losses of different cycles cannot be compared, who beat whom can.

Each cycle is one game of OpenSkill's Plackett-Luce model (Weng and Lin, JMLR 12, 2011) between everybody that was judged:
ranked miners in their order, the others tied behind them. Whoever is absent becomes uncertain again, and drifts towards
the rating of a stranger. Ratings live in the log, rounded, so that each follows from the cycle before alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from connito.v1 import cycle_pb2, reasons_pb2
from connito.wire.facts import RunFacts

# A stranger's rating.
MU, SIGMA = 25.0, 25.0 / 3
# In a cycle without a miner: what its variance grows by, and the part of its distance to a stranger's μ that is kept.
ABSENT_VARIANCE, ABSENT_KEEPS = 0.5, 0.98
# Decimals. Coarser than what another machine's `exp` differs by, finer than anybody can see.
DECIMALS = 6
# What is not the miner's doing is no game.
_NO_GAME = frozenset({reasons_pb2.REASON_NO_QUORUM, reasons_pb2.REASON_ARTIFACT_MISSING})


def rate(facts: RunFacts, cycle: int, verdicts: Iterable[cycle_pb2.Verdict]) -> list[cycle_pb2.MinerStanding]:
    """Return everybody's rating after a cycle, sorted by miner; nothing in a run without a reward policy."""
    if facts.spec is None or not facts.spec.HasField("rewards"):
        return []
    known = {standing.miner: standing for standing in facts.result_before(cycle).miners}
    games = {verdict.miner: verdict for verdict in verdicts if verdict.reason not in _NO_GAME}
    played = _play(known, games)
    found = []
    for miner in sorted({*known, *games}):
        old = known.get(miner, cycle_pb2.MinerStanding(mu=MU, sigma=SIGMA))
        mu, sigma = played[miner] if miner in played else _absent(old.mu, old.sigma)
        found.append(
            cycle_pb2.MinerStanding(
                miner=miner,
                mu=round(mu, DECIMALS),
                sigma=round(sigma, DECIMALS),
                judged=old.judged + (miner in games),
                useful=old.useful + (miner in games and games[miner].utility > 0.0),
            )
        )
    return found


def _absent(mu: float, sigma: float) -> tuple[float, float]:
    return MU + ABSENT_KEEPS * (mu - MU), min(SIGMA, math.sqrt(sigma * sigma + ABSENT_VARIANCE))


def _play(
    known: Mapping[str, cycle_pb2.MinerStanding], games: Mapping[str, cycle_pb2.Verdict]
) -> dict[str, tuple[float, float]]:
    """Return (μ, σ) of everybody who played. Alone, nobody learns anything."""
    from openskill.models import PlackettLuce

    miners = sorted(games)
    ratings = {miner: (known[miner].mu, known[miner].sigma) if miner in known else (MU, SIGMA) for miner in miners}
    if len(miners) < 2:
        return ratings
    model = PlackettLuce(mu=MU, sigma=SIGMA)
    teams = [[model.rating(mu=ratings[miner][0], sigma=ratings[miner][1])] for miner in miners]
    ranks = [float(games[miner].rank or len(miners) + 1) for miner in miners]
    return {
        miner: (team[0].mu, team[0].sigma) for miner, team in zip(miners, model.rate(teams, ranks=ranks), strict=True)
    }
