"""The verbs of `connito job`: `client.job.submit("job.yaml")`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from connito.client.connection import Connection
from connito.errors import Invalid, NotFound
from connito.render import formats
from connito.runtime.extras import extras_named
from connito.runtime.progress import Progress, below_the_cell
from connito.v1 import services_pb2
from connito.v1.run_pb2 import RunSpec
from connito.v1.services_pb2 import RunStatus
from connito.views.notebook import Report, Rows
from connito.wire.identity import is_public_key

if TYPE_CHECKING:
    from connito.jobs.check import Checked
    from connito.jobs.quote import Quote
    from connito.jobs.submit import Submitted


class Jobs:
    """A customer's runs. Every verb raises as `Client` says; without `progress`, a notebook shows a bar below the cell."""

    def __init__(self, connection: Connection, data_dir: Path | None) -> None:
        """Take `data_dir`, the folder of the local platform whose base and store a job.yaml may use."""
        self._connection, self._data_dir = connection, data_dir

    @extras_named()
    def check(self, file: Path | str, *, profile: str = "", progress: Progress | None = None) -> Checked:
        """Check a job.yaml before anything is spent; `.ok`, `.findings`. `profile` replaces the file's."""
        from connito.jobs.check import check_file

        return check_file(Path(file), self._data_dir, progress or below_the_cell(), profile=profile)

    @extras_named()
    def quote(
        self, file: Path | str, *, profile: str = "", pilot: bool = True, progress: Progress | None = None
    ) -> Quote:
        """Return what a job.yaml will take. Raises `Invalid` for one that cannot be submitted. Imports torch."""
        from connito.jobs.quote import quote

        tell = progress or below_the_cell()
        return quote(self.check(file, profile=profile, progress=tell), pilot=pilot, progress=tell)

    @extras_named()
    def submit(
        self, job: Path | str | Checked | RunSpec, *, profile: str = "", progress: Progress | None = None
    ) -> Submitted:
        """Create a run; `.run` is its id. `job`: a job.yaml or what its check found, whose corpora are uploaded; or a
        RunSpec, also as a YAML file. Raises `Invalid` naming the field that cannot be."""
        from connito.jobs.submit import Submitted, prepare, submit, with_secret

        tell = progress or below_the_cell()
        if isinstance(job, (Path, str)):
            job = prepare(Path(job), self._data_dir, tell, profile=profile)
        if isinstance(job, RunSpec):
            spec = with_secret(job, self._data_dir)
            return Submitted(self._create(spec), spec)
        return submit(job, self._create, tell)

    def list(self) -> Sequence[RunStatus]:
        """Return where every run stands that is shown to this key."""
        request = services_pb2.ListRunsRequest(**self._connection.reader())
        return Rows(self._connection.call("coordinator", "ListRuns", request).runs)

    def show(self, run: str) -> RunStatus:
        """Return where a run stands. Raises `NotFound` for an unknown one."""
        request = services_pb2.GetRunRequest(run=run, **self._connection.reader())
        status: RunStatus = self._connection.call("coordinator", "GetRun", request).status
        return status

    def watch(self, run: str) -> Iterator[RunStatus]:
        """Yield the run's status whenever it changes, until it has ended."""
        request = services_pb2.WatchRunRequest(run=run, **self._connection.reader())
        for answer in self._connection.stream("coordinator", "WatchRun", request):
            yield answer.status

    def cancel(self, run: str, why: str = "cancelled by the customer") -> None:
        """End a run early. What it has published stays."""
        sealed = self._connection.seal("rpc.CancelRun", services_pb2.CancelRunCommand(run=run, detail=why))
        self._connection.call("coordinator", "CancelRun", services_pb2.CancelRunRequest(envelope=sealed))

    @extras_named()
    def report(
        self,
        run: str,
        out: Path | str | None = None,
        *,
        with_base: bool = False,
        measure: bool = True,
        progress: Progress | None = None,
    ) -> Report:
        """Return the delivery report of a run that has ended; with `out`, write it there with plot and expert too."""
        from connito.jobs.delivery import deliver
        from connito.platform.session import Session

        session, folder = Session.open(self._data_dir, role="customer", wake=True), None if out is None else Path(out)
        tell = progress or below_the_cell()
        found = deliver(session, run, folder, with_base=with_base, measure=measure, progress=tell)
        return Report(found.document)

    def miner(self, key: str) -> str:
        """Return the one miner of all runs whose public key begins so. Raises `NotFound` for none, `Invalid` for several."""
        if is_public_key(key):
            return key
        found = sorted({miner for status in self.list() for miner in status.miners if miner.startswith(key)})
        if not found:
            raise NotFound(f"no miner's key begins with {key!r}; `connito job show RUN` lists them")
        if len(found) > 1:
            raise Invalid(f"the keys of {formats.count(len(found), 'miner')} begin with {key!r}; give more of it")
        return found[0]

    def _create(self, spec: RunSpec) -> str:
        request = services_pb2.CreateRunRequest(envelope=self._connection.seal("rpc.CreateRun", spec))
        return str(self._connection.call("coordinator", "CreateRun", request).run)


class RestingJobs(Jobs):
    """The runs of a platform at rest, as its log tells them. What starts or ends one raises `NotFound`."""

    def list(self) -> Sequence[RunStatus]:
        """Return where every run stands."""
        from connito.client.runs import statuses

        return Rows(statuses(self._data_dir))

    def show(self, run: str) -> RunStatus:
        """Return where a run stands. Raises `NotFound` for an unknown one."""
        from connito.client.runs import statuses

        (found,) = statuses(self._data_dir, run)
        return found

    def watch(self, run: str) -> Iterator[RunStatus]:
        """Yield where the run stands: nothing changes while the platform rests."""
        yield self.show(run)
