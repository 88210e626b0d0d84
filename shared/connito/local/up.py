"""`connito up`: one adaptation job on one machine, from nothing to a deposited expert and a report."""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import IO, TYPE_CHECKING, Any, TypeVar

from connito.errors import ConnitoError, Retry
from connito.local import begun
from connito.local.defaults import Profile, UpOptions, profile
from connito.local.display import Display, choose_display
from connito.local.footprint import tidy
from connito.local.machine_limits import check_limits
from connito.local.outcome import check_outcome
from connito.platform.datadir import DataDir, is_running
from connito.render import formats
from connito.runtime import scratch
from connito.runtime.compute import usable_cores
from connito.runtime.logs import keep_log
from connito.runtime.tasks import blocking, end_tasks

if TYPE_CHECKING:
    from pydantic import TypeAdapter

    from connito.client import Client
    from connito.local.installation import Installation
    from connito.local.materials import Materials
    from connito.local.memory import PeakMemory
    from connito.v1.run_pb2 import RunSpec
    from connito.wire.fact import Fact
    from connito.wire.facts import RunFacts

T = TypeVar("T")

START_SECONDS = 900.0
COLLECT_SECONDS = 60.0


def run_here(options: UpOptions, *, as_json: bool) -> dict[str, Any]:
    """Run in this process until the run has ended and everything is stopped again; returns the report.

    Raises `Retry` when another `up` holds the folder, `Invalid` for what cannot be, `Fatal` when a service cannot be
    kept alive or the run fails.
    """
    data = DataDir.open(options.data_dir)
    check_limits(data.root)
    with data.lock(), scratch.own(data.cache, "up"), choose_display(as_json=as_json) as display:
        return blocking(_interruptible(_Up(options, data, display).run))


def run_detached(options: UpOptions, *, as_json: bool) -> dict[str, Any]:
    """Run in a process of its own and return when the first cycle is open: `{"run", "data_dir", "pid"}`."""
    data = DataDir.open(options.data_dir)
    check_limits(data.root)
    with data.lock():
        pass  # Says now, and here, that another one runs.
    data.platform_file.unlink(missing_ok=True)
    passed = _form().dump_json(replace(options, data_dir=data.root)).decode()
    (data.logs / "up.log").unlink(missing_ok=True)
    with (data.logs / "up.log").open("ab") as log:
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "connito.local.up", passed],
            stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip
    _wait_until_ready(data, child, sys.stderr if as_json else sys.stdout)
    platform = data.running()
    return {"run": platform.run, "data_dir": str(data.root), "pid": child.pid}


def stop(data: DataDir, seconds: float = 30.0) -> int | None:
    """End the `up` that holds the folder and all that it runs; returns its process id, None if nothing runs."""
    pid = data.owner()
    if pid is None:
        data.end_leftovers()
        return None
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    give_up = time.monotonic() + seconds
    while data.owner() is not None or is_running(pid):
        if time.monotonic() > give_up:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)  # What it started is tied to it and ends with it.
            give_up += 5
        time.sleep(0.05)
    return pid


async def _interruptible(work: Callable[[], Awaitable[T]]) -> T:
    """Run `work`; SIGINT, SIGTERM and SIGHUP cancel it, so that everything is stopped in order."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work())
    received: list[int] = []

    def interrupt(number: int) -> None:
        if not received:
            received.append(number)
            # Once: what comes after is the stopping itself, which a second one would break off.
            task.cancel()

    # In the thread of a notebook's cell there are none to take; interrupting the cell cancels this.
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, interrupt, number)
    try:
        return await task
    except asyncio.CancelledError:
        if received:
            raise SystemExit(128 + received[0]) from None
        raise


class _Up:
    """State of one `connito up`."""

    def __init__(self, options: UpOptions, data: DataDir, display: Display, *, stay: bool = False) -> None:
        self.begun: begun.Begun | None = None
        self.options, self.data, self.display, self.stay = options, data, display, stay
        self.resumed = False
        self.seconds: dict[str, float] = {}
        self.began = time.monotonic()

    async def run(self) -> dict[str, Any]:
        """Run the whole job and return its report; with `stay`, go on serving after the run has ended."""
        from connito.local.identities import participants
        from connito.local.installation import Installation
        from connito.local.memory import PeakMemory

        keep_log("cli", (self.data.logs / "up.jsonl").open("a"))  # As long as the process.
        for name in self.data.end_leftovers():
            self.display.say(f"ended {name}, left over from a run that was killed")
        options, self.begun = await begun.resume(self.options, self.data)
        self.options, chosen = options, profile(options)
        members = participants(options.miners, options.validators, options.adversaries)
        memory = PeakMemory()
        sampling = asyncio.create_task(memory.run())
        machine = chosen.machine(usable_cores())
        if self.begun is not None:
            # Sums come out to the bit only with as many threads as before.
            machine = replace(machine, alone=self.data.threads or machine.alone)
        installation = Installation(self.data, members, machine, options.seed, self.display)
        try:
            self.display.say(f"starting the broker and the store in {self.data.root}")
            async with installation:
                self._lap("servers")
                work = asyncio.ensure_future(self._run_job(installation, chosen, memory))
                failed: asyncio.Future[Any] = installation.supervisor.failed
                try:
                    await asyncio.wait([work, failed], return_when=asyncio.FIRST_COMPLETED)
                    if not work.done():
                        failed.result()  # Raises what could not be kept alive.
                    report = await work
                finally:
                    await end_tasks([work])
            freed = tidy(self.data).bytes
            if freed:
                self.display.say(
                    f"freed {formats.size(freed)}: copies of what the store has, and work that is handed in"
                )
            return report
        finally:
            await end_tasks([sampling])

    async def _run_job(self, installation: Installation, chosen: Profile, memory: PeakMemory) -> dict[str, Any]:
        from connito.local.materials import prepare, upload
        from connito.local.patience import SERVERS, patiently

        display = self.display
        await installation.start(installation.services())
        preparing = partial(prepare, installation, self.options, chosen, display)
        materials = await patiently("preparing the run", preparing, display.say)
        self._lap("materials")
        # The supervisor starts a server that has ended again, or says that it cannot.
        choosing = partial(self._choose_run, installation)
        run = await patiently("reading the log", choosing, display.say, SERVERS)
        uploading = partial(upload, installation, materials, chosen, run, display)
        spec = await patiently("putting the base into the store", uploading, display.say, SERVERS)
        self._lap("upload")
        installation.supervisor.needed = spec.windows.min_miners
        await installation.start([*installation.validators(), *installation.miners()])
        if not self.resumed:
            # Noted first: what is created and not noted would be nobody's.
            await installation.note(partial(begun.note, self.data, run, self.options))
            await self._create(installation, spec)
            display.say(f"run {run}: adapting {materials.name} to {spec.domain}, {formats.count(spec.cycles, 'cycle')}")
        await installation.publish(run=run)
        collecting = asyncio.create_task(self._collect(installation, spec))
        try:
            facts = await self._follow(installation, spec)
        finally:
            await end_tasks([collecting])
        self._lap("run")
        reporting = partial(self._report, installation, facts, materials, memory)
        report = await patiently("the report of the run", reporting, display.say, SERVERS)
        await self._shelve(report)
        await installation.note(partial(begun.forget, self.data))
        await installation.publish(finished=True)
        if self.stay:
            display.say("the run has ended; services stay up until `connito down`")
            await asyncio.Event().wait()
        check_outcome(report, self.data.logs)
        return report

    async def _collect(self, installation: Installation, spec: RunSpec) -> None:
        """Collect now and then what a run that keeps its last cycles only has left, and its copies in this machine's caches."""
        from connito.client.cleaning import collect
        from connito.store.eviction import drop

        gone: set[str] = set()
        while spec.retention.cycles:
            await asyncio.sleep(COLLECT_SECONDS)
            with suppress(ConnitoError, OSError):
                found = await collect(installation.bus, installation.store, installation.roster, remove=True)
                gone = (gone | {one.digest for one in found.stale}) - {one.digest for one in found.kept}
                left = [await asyncio.to_thread(drop, one, gone) for one in (self.data.cache, installation.miner_cache)]
                gone = set[str]().union(*left)

    async def _choose_run(self, installation: Installation) -> str:
        """Return the run that an earlier `up` left unfinished, or the id of a new one; with `--new`, cancel the unfinished."""
        from connito.platform.log import read_log

        known = (await read_log(installation.bus, installation.roster)).runs
        unfinished = [run for run, facts in known.items() if facts.spec is not None and facts.ended is None]
        if self.begun is not None and (found := known.get(self.begun.run)) is not None and found.spec is not None:
            self.resumed = True
            where = "reporting on" if found.ended is not None else "going on with"
            self.display.say(
                f"{where} run {found.run}, cycle {found.cycle} of {found.spec.cycles}, which an earlier `connito up` left "
                "unfinished; `connito up --new` starts another one instead"
            )
            return found.run
        if self.options.new:
            for run in unfinished:
                self.display.say(f"cancelling {run}, which an earlier `connito up` left unfinished")
                await self._with_client(installation, partial(_cancel, run))
        elif unfinished:
            self.display.say(f"going on beside: {', '.join(unfinished)}")
        return self._new_id(known)

    def _new_id(self, known: Collection[str]) -> str:
        """Return an id of domain and seed, or time; numbered where the log already holds a run of that name."""
        stamp = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
        name = f"{self.options.target}-{stamp if self.options.seed is None else f's{self.options.seed}'}"
        return next(run for run in (name, *(f"{name}-{n}" for n in range(2, 10_000))) if run not in known)

    async def _create(self, installation: Installation, spec: RunSpec) -> None:
        await self._with_client(installation, lambda client: client.job.submit(spec))

    async def _with_client(self, installation: Installation, call: Callable[[Client], T]) -> T:
        """Call the coordinator as the customer; it may still be starting."""
        from connito.client import Client

        give_up = time.monotonic() + 60
        while True:
            address = await installation.bus.find_endpoint("coordinator", timeout=60.0)
            client = Client(address, identity=installation.members["customer"].identity)
            try:
                return await asyncio.to_thread(call, client)
            except Retry as error:
                if time.monotonic() > give_up:
                    raise
                await asyncio.sleep(error.after)
            finally:
                client.close()

    async def _follow(self, installation: Installation, spec: RunSpec) -> RunFacts:
        from connito.local.healing import Healer
        from connito.local.hindered import Hindered, watch
        from connito.local.log import deposit_refused, follow_run
        from connito.store.cache import Cache
        from connito.v1.run_pb2 import RUN_OUTCOME_COMPLETED

        run = spec.run
        hindered = Hindered(run, installation.groups(spec))
        healer = Healer(installation.store, (Cache(self.data.cache), Cache(installation.miner_cache)))
        opened = asyncio.Event()

        def noticed(fact: Fact, facts: RunFacts) -> None:
            hindered.moved = time.monotonic()
            healer.facts = facts
            if fact.key.section == "train" and fact.key.cycle == 1 and fact.key.kind == "opened":
                self._lap("assembling")
                opened.set()

        async def tell() -> None:
            await opened.wait()
            await installation.publish(ready=True)

        def over(facts: RunFacts) -> bool:
            if facts.ended is None:
                return False
            deposits = facts.ended.outcome == RUN_OUTCOME_COMPLETED and facts.ended.final_version > 0
            return not deposits or bool(facts.deposits)

        following = asyncio.create_task(
            follow_run(installation.bus, installation.roster, run, installation.names, self.display, over, noticed)
        )
        refused = asyncio.create_task(deposit_refused(installation.bus, run))
        watching = asyncio.create_task(watch(self.data, hindered, self.display, healer.heal))
        tasks, telling = (following, refused, watching), asyncio.create_task(tell())
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            return await next(task for task in tasks if task.done())
        finally:
            await end_tasks([*tasks, telling])

    async def _report(
        self, installation: Installation, facts: RunFacts, materials: Materials, memory: PeakMemory
    ) -> dict[str, Any]:
        from connito.local.outcome import measure_proof, write_report

        proof = await measure_proof(installation, facts, materials)
        await asyncio.to_thread(memory.sample)
        self._lap("report")
        totals = {
            "seconds": {**self.seconds, "total": round(time.monotonic() - self.began, 2)},
            "peak_memory_bytes": memory.peak_bytes,
            "restarts": installation.supervisor.restarts,
            "cores": usable_cores(),
            "seed": self.options.seed,
            "adversaries": list(self.options.adversaries),
            "resumed": self.resumed,
        }
        return write_report(self.data, self.options, facts, proof, materials, totals)

    async def _shelve(self, report: dict[str, Any]) -> None:
        """Put the expert on the shelf of this folder, where it can be taken from when nothing runs here any more."""
        from connito.curation.holdings import Holdings

        if report["library"] is not None:
            # Whoever reads this folder later fills its shelf from the log where that is still to do.
            with suppress(ConnitoError, OSError):
                await asyncio.to_thread(Holdings(data_dir=self.data.root).find, report["library"]["expert_id"])

    def _lap(self, phase: str) -> None:
        """Record the seconds since the last phase as those of `phase`."""
        self.seconds[phase] = round(time.monotonic() - self.began - sum(self.seconds.values()), 2)


def _cancel(run: str, client: Client) -> None:
    client.job.cancel(run, "another run was started instead of it")


def _wait_until_ready(data: DataDir, child: subprocess.Popen[bytes], shown: IO[str]) -> None:
    """Show the log of the detached process until it is ready. Raises what it died of."""
    give_up = time.monotonic() + START_SECONDS
    with (data.logs / "up.log").open() as log:
        while time.monotonic() < give_up:
            platform = data.read_platform()
            for line in log:  # Afterwards: what it said before it was ready is there by now.
                print(line, end="", file=shown, flush=True)
            if platform is not None and platform.pid == child.pid and (platform.ready or platform.finished):
                return
            if child.poll() is not None:
                raise _DetachedError(
                    child.returncode, log.read() or f"`connito up` ended; its log is {data.logs / 'up.log'}"
                )
            time.sleep(0.1)
    stop(data)
    raise Retry(f"the first cycle did not open within {START_SECONDS:.0f} s; see {data.logs}")


class _DetachedError(ConnitoError):
    """The detached process ended before it was ready; its message and exit code are passed on."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = code


def _form() -> TypeAdapter[UpOptions]:
    """Return how options are passed to the detached process."""
    from pydantic import TypeAdapter

    return TypeAdapter(UpOptions)


def main() -> None:
    """Run the detached process of `--no-wait`."""
    from connito.local.display import PlainDisplay
    from connito.runtime.exits import explained

    with explained():
        options = _form().validate_json(sys.argv[1])
        data = DataDir.open(options.data_dir)
        with data.lock(), scratch.own(data.cache, "up"), PlainDisplay() as display:
            asyncio.run(_interruptible(_Up(options, data, display, stay=True).run))


if __name__ == "__main__":
    main()
