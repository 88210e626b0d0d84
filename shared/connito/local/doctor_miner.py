"""`connito doctor` for a miner: the APIs and its line to the store, and whether the runs on offer fit and what they pay."""

from __future__ import annotations

import asyncio
import email.utils
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import closing
from typing import TYPE_CHECKING, Any

from connito.client.connection import Connection
from connito.data.manifest import FileEntry, Manifest
from connito.errors import ConnitoError, Retry
from connito.local.doctor_platform import PROBE_BYTES, SLOW_BYTES_PER_SECOND, Check, clock
from connito.platform.log import read_runs
from connito.protocol.policy.choices import ADAMW
from connito.render import formats
from connito.store.named import ref_of_bytes
from connito.v1 import cycle_pb2, services_pb2
from connito.v1.artifacts_pb2 import ArtifactRef
from connito.wire.facts import RunFacts, experts_of

if TYPE_CHECKING:
    from connito.moe.footprint import Workload
    from connito.platform.session import Session

# Runs that are looked at, the newest first, and cycles that say what one pays.
_RUNS, _CYCLES = 5, 10
# A trained row with what completes it to float32, its gradient, and moments of a byte each.
_BYTES_PER_PARAMETER = 4 + 4 + 2


async def look(session: Session) -> list[Check]:
    """Return the findings of a miner's key."""
    try:
        where = await session.endpoints("coordinator", "committer")
        async with session.bus() as bus:
            log = await read_runs(session, bus)
    except ConnitoError as error:
        return [Check("miner", False, str(error), "see the message; the operator knows whether the platform is up")]
    open_runs = [facts for facts in log.runs.values() if facts.spec is not None and facts.ended is None]
    open_runs.sort(key=lambda facts: facts.created_fact.sequence if facts.created_fact else 0, reverse=True)
    if not open_runs:
        return [Check("runs on offer", True, "none now; a miner that runs takes part in the next one by itself")]
    return await asyncio.to_thread(lambda: list(_runs(session, where, open_runs[:_RUNS])))


def _runs(session: Session, where: Mapping[str, str], runs: list[RunFacts]) -> Iterator[Check]:
    measured = False
    with closing(Connection(where.__getitem__, session.identity, session.tls)) as apis:
        for facts in runs:
            links, check = _links(apis, facts, session.identity.public)
            yield check
            if links is not None and not measured:
                measured = True
                yield from _line(links)
            yield _fits(facts, links)
            yield _pays(facts)


class _Links:
    """The files of a run's base by their presigned addresses."""

    def __init__(self, apis: Connection, facts: RunFacts) -> None:
        self._apis, self._run = apis, facts.run
        ref = facts.require_spec().base.manifest
        data = _get(self.url(ref), 0, ref.size)
        if ref_of_bytes(data, ref.media_type, ref.realm).digest != ref.digest:
            raise Retry("the store answered with other bytes than the base's manifest")
        self.manifest = Manifest.from_bytes(data)

    def read(self, entry: FileEntry, start: int, length: int) -> bytes:
        """Return a range of a file."""
        return _get(self.url(entry.ref), start, length)

    def url(self, ref: ArtifactRef) -> str:
        """Return the address that reads an object."""
        command = services_pb2.DownloadsCommand(run=self._run, digests=[ref.digest])
        request = services_pb2.RequestDownloadsRequest(envelope=self._apis.seal("rpc.RequestDownloads", command))
        urls: Mapping[str, str] = self._apis.call("committer", "RequestDownloads", request).urls
        if ref.digest not in urls:
            raise Retry(f"the committer serves no artifact {ref.digest[:12]}… in run {self._run}")
        return urls[ref.digest]


def _links(apis: Connection, facts: RunFacts, me: str) -> tuple[_Links | None, Check]:
    name = f"run {facts.run}"
    spec = facts.require_spec()
    told = f"{spec.domain} on {spec.base.name}, cycle {facts.cycle} of {spec.cycles}, {formats.count(len(facts.miners), 'miner')}"
    if not facts.is_enrolled(me):
        return None, Check(name, True, f"{told}; not enrolled yet, `connito miner run` does that")
    try:
        return _Links(apis, facts), Check(name, True, f"{told}; enrolled")
    except (ConnitoError, OSError) as error:
        return None, Check(
            name, False, f"{told}; {error}", "the address of committer or store cannot be reached from here"
        )


def _get(url: str, start: int, length: int) -> bytes:
    return _fetch(url, start, length)[0]


def _fetch(url: str, start: int, length: int) -> tuple[bytes, str]:
    """Return a range of an object, and the store's date."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={start}-{start + length - 1}"})  # noqa: S310 - signed by the committer
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        return answer.read(length), answer.headers.get("Date", "")


def _line(links: _Links) -> Iterator[Check]:
    """Measure the way to the store, and its clock, which refuses links that are dated otherwise."""
    largest = max(links.manifest.files.values(), key=lambda entry: entry.size)
    size = min(largest.size, PROBE_BYTES)
    try:
        url = links.url(largest.ref)
        began = time.monotonic()
        _, date = _fetch(url, 0, size)
        rate = size / max(time.monotonic() - began, 1e-6)
    except (ConnitoError, OSError) as error:
        remedy = "the store's address cannot be reached from here: a firewall, or DNS"
        yield Check("bandwidth", False, str(error), remedy)
        return
    found = f"{formats.size(rate)}/s down ({formats.size(size)}); up is measured with the first result"
    remedy = "a result has to arrive within the submit window: use a faster line"
    yield Check("bandwidth", rate >= SLOW_BYTES_PER_SECOND or size < PROBE_BYTES, found, remedy, warning=True)
    if date:
        yield clock(email.utils.parsedate_to_datetime(date).timestamp() + 0.5 - time.time(), "store")


def _fits(facts: RunFacts, links: _Links | None) -> Check:
    """Check the memory of training in a run: predicted where its base can be read, at least its trained rows elsewhere."""
    name = f"fit of {facts.run}"
    if facts.selection is None:
        return Check(name, True, "not known before the run's experts are selected")
    have, where = _memory()
    remedy = "see `connito miner fits --help` for what takes less memory, or take a larger machine"
    try:
        if links is not None:
            need, settings = _predicted(facts, links, have, cuda=where != "memory")
            found = f"training needs {formats.size(need)} of {formats.size(have)} {where} free{settings}"
            return Check(name, need <= have, found, remedy)
    except (ConnitoError, OSError, ImportError) as error:
        return Check(name, False, f"not predicted: {error}", "pip install 'connito[model]'", warning=True)
    least = facts.selection.target_parameters * _BYTES_PER_PARAMETER
    found = (
        f"its experts alone need {formats.size(least)} of {formats.size(have)} {where} free; all of it once enrolled"
    )
    return Check(name, least <= have, found, remedy)


def _memory() -> tuple[int, str]:
    """Return the free bytes of the device that would train, and what they are called."""
    from connito.moe.device import device_of
    from connito.moe.footprint import free_bytes

    try:
        import torch
    except ImportError:
        return free_bytes(), "memory"
    device = device_of()
    if device.type != "cuda":
        return free_bytes(), "memory"
    return int(torch.cuda.mem_get_info(device)[0]), f"memory of {torch.cuda.get_device_name(device)}"


def _predicted(facts: RunFacts, links: _Links, have: int, *, cuda: bool) -> tuple[int, str]:
    from connito.base.description import describe
    from connito.base.loading import manifest_file
    from connito.moe.footprint import SWITCHES, Workload, lean
    from connito.moe.residency import ALL
    from connito.workloads.predicting import predictor

    policy, selection = facts.require_spec().training, facts.require_selection()
    config: Any = describe(
        manifest_file(links.manifest, links.read, "config.json"),
        links.manifest.headers(),
        links.manifest.extra.get("dtype", ""),
    ).plan()
    predict = predictor(config, *experts_of(selection))
    work: Workload = Workload(
        policy.batch_sequences,
        policy.sequence_length,
        routing_mode=policy.routing_mode or "natural",
        inner=policy.optimizer or ADAMW,
        residency=ALL,
        cuda=cuda,
        packed=True,
    )
    # What a miner chooses by itself comes first; a setting of the owner's is named.
    chosen, turned = lean(predict, work, have, tuple(s for s in SWITCHES if s.field in ("residency", "checkpointing")))
    if predict(chosen).total > have:
        chosen, turned = lean(predict, work, have)
        return predict(chosen).total, f", with {' and '.join(s.setting for s in turned)}" if turned else ""
    return predict(chosen).total, f", residency {chosen.residency}"


def _pays(facts: RunFacts) -> Check:
    """Report what the last cycles paid miners."""
    results = [scored for cycle in facts.cycles() if (scored := facts.scored(cycle)) is not None][-_CYCLES:]
    name, policy = f"reward of {facts.run}", facts.require_spec().rewards
    emission = facts.require_spec().emission
    if not results:
        return Check(
            name, True, f"{formats.count(emission, 'unit')} a cycle are shared out; no cycle has been paid yet"
        )
    verdicts = [verdict for scored in results for verdict in scored.verdicts]
    useful = [v for v in verdicts if v.status == cycle_pb2.VERDICT_STATUS_MERGED]
    paid = sum(verdict.reward for verdict in verdicts) / max(len(verdicts), 1)
    found = (
        f"{paid:.0f} units for a submission on average, of {emission} a cycle; {len(useful)} of {len(verdicts)} merged"
    )
    if policy.probation_cycles:
        found += f"; a new key is paid {formats.percent(policy.probation_pay, 0)} until {policy.probation_cycles} were useful"
    return Check(name, True, f"{found} (last {formats.count(len(results), 'cycle')})")
