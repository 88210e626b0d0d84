"""What happens to simulated runs: storms that follow from a seed, and the faults that were once found, each by its name."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tests.sim.broker import Weather
from tests.sim.world import FAULTS, Scenario, World

Happening = tuple[float, Callable[[World], object]]


def storm_of(seed: int) -> Scenario:
    """Return a storm of some kinds of faults: a storm of every kind at once seldom lets a run come far enough."""
    rng = Random(f"storm {seed}")
    kinds = tuple(sorted(rng.sample(sorted(FAULTS), rng.randint(1, 5))))
    weather = Weather(
        slow=rng.choice([0.0, 0.0, 0.02]), lost_ack=rng.choice([0.0, 0.0, 0.05]),
        lost_hint=rng.choice([0.0, 0.1]), forget_id=rng.choice([0.0, 0.3]), behind=rng.choice([0.0, 0.2]),
    )  # fmt: skip
    return Scenario(
        storm=kinds, every=rng.choice([0.4, 0.8, 1.5]), seconds=rng.uniform(5, 20),
        skew=rng.choice([0.0, 0.0, 1800.0]), weather=weather,
    )  # fmt: skip


def rough(seed: int) -> Scenario:
    """A storm that tries what services say to the broker."""
    weather = Weather(lost_ack=0.1, lost_hint=0.1, forget_id=0.5, behind=0.2)
    return Scenario(storm=("kill", "cut", "pause", "broker"), every=0.7, weather=weather, limit=300)


def behind(seed: int) -> Scenario:
    """Replicas that are behind, and hints that get lost, so that readers are behind too."""
    weather = Weather(lost_hint=0.3, behind=0.3)
    return Scenario(storm=("skew",), every=5.0, seconds=60, weather=weather, limit=300)


def brief(seed: int) -> Scenario:
    return Scenario(cycles=3, storm=("brief",), every=0.4, seconds=30, brief=True)


def torn(seed: int) -> Scenario:
    return Scenario(storm=("torn",), every=0.3, limit=200)


def drift(seed: int) -> Scenario:
    """A run in which the state goes farther than one submission may, though each goes as far as it may."""
    return Scenario(cycles=8, codec="rows")


def clocks_apart(seed: int) -> Scenario:
    """Machines half an hour apart, and leaders that change, so that one judges the deadlines of the other."""
    return Scenario(storm=("kill", "pause"), every=0.8, skew=1800, limit=400)


def after_a_reveal(seconds: float, gone: tuple[str, ...] = ("store",), *, answered: int = 0) -> tuple[Happening, ...]:
    """Store, broker or both go away at the moment at which a reveal is stored, beside so many answered ones, and come back."""
    done: list[object] = []

    def look(world: World) -> None:
        reveals = sum(record.subject.endswith(".reveal") for record in world.broker.records("INGRESS"))
        accepted = sum(".submit.1.accepted." in subject for subject in world.broker.last)
        if not done and reveals > answered and (not answered or accepted == answered):
            leave = {"store": world.store.leave, "broker": world.broker.stop}
            done.extend(leave[what](seconds) for what in gone)

    return tuple((1.0 + 0.005 * step, look) for step in range(2000))


def outage(seed: int) -> Scenario:
    return Scenario(script=after_a_reveal(60), limit=1000)


def outage_once_heard(seed: int) -> Scenario:
    """The window has heard one miner, and so waits for the others no longer than was announced."""
    return Scenario(miners=4, script=after_a_reveal(60, answered=1), limit=1000)


def long_outage(seed: int) -> Scenario:
    """The store is away for ten minutes."""
    return Scenario(script=after_a_reveal(600), limit=2000)


def hours_away(seed: int) -> Scenario:
    """Store, broker, or both are away for two hours; which, follows from the seed."""
    gone = (("store",), ("broker",), ("store", "broker"))[seed % 3]
    return Scenario(cycles=3, script=after_a_reveal(7200, gone), limit=20_000)


def lost_object(seed: int) -> Scenario:
    """Submissions that were all accepted are gone from the store, and are put back after half a minute."""
    gone: dict[str, bytes] = {}

    def look(world: World) -> None:
        accepted = sum(".submit.1.accepted." in subject for subject in world.broker.last)
        if not gone and accepted == world.scenario.miners:
            for key in [key for key in world.store.objects if key.startswith("submissions/")]:
                gone[key] = world.store.objects.pop(key)
            world.loop.call_later(30.0, world.store.objects.update, gone, context=world.loop.between)

    return Scenario(script=tuple((1.0 + 0.005 * step, look) for step in range(2000)))


def full_disk(seed: int) -> Scenario:
    """The aggregator's disk is full while it merges."""

    def full(world: World) -> None:
        for node in world.nodes:
            node.disk_full = node.name.startswith("aggregator") and not node.disk_full

    return Scenario(script=((1.5, full), (40.0, full)))


def elections(seed: int) -> Scenario:
    """The bucket of leases is without a leader again and again, at any moment of a standby's questions."""
    return Scenario(storm=("lease",), every=0.5, weather=Weather(slow=0.05))


def nobody_there(seed: int) -> Scenario:
    """All miners are gone for ten minutes."""

    def gone(world: World) -> None:
        for node in world.nodes:
            if node.name.startswith("miner"):
                node.kill(600)

    return Scenario(cycles=4, script=((5.0, gone),), limit=4000)


def api_gone(seed: int) -> Scenario:
    """The committer whose address was registered last never comes back; the other one lives."""

    def kill(world: World) -> None:
        address = bytes(world.broker.keys["$KV.ENDPOINTS.committer"].value).decode()
        world.apis[address][0].kill(1e6)

    return Scenario(cycles=3, script=((2.0, kill),), limit=600)


def stakes_change(seed: int) -> Scenario:
    """A validator's stake in the roster changes in the midst of the run, for whoever reads the file, and services restart."""

    def change(world: World) -> None:
        key = min(world.roster.keys["validator"])
        if any(".train.2.opened" in subject for subject in world.broker.last):
            world.roster.stakes[key] = 5.0

    return Scenario(
        cycles=3, storm=("kill",), every=1.0, script=tuple((1.0 + 0.1 * step, change) for step in range(100))
    )


def cached_rot(seed: int) -> Scenario:
    """A bit flips in a file of every cache, which keeps its size and its time."""
    import os

    def flip(world: World) -> None:
        for path in world.folder.glob("aggregator-*/cache/sha256/*/*"):
            if path.suffix == "" and path.stat().st_size < 1000:
                status, data = path.stat(), bytearray(path.read_bytes())
                data[-1] ^= 1
                path.chmod(0o644)
                path.write_bytes(bytes(data))
                os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    return Scenario(script=tuple((2.0 + 0.5 * step, flip) for step in range(12)))
