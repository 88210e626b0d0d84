"""Real processes, started, killed, restarted and stopped."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Self

import pytest
from connito.errors import Fatal, Invalid, Retry
from connito.local import supervisor as supervising
from connito.local.fork_server import check_fork_safe
from connito.local.processes import ForkLauncher, Launcher, PlainLauncher, Process, Program
from connito.local.supervisor import Supervisor
from connito.platform.datadir import DataDir, is_running
from connito.platform.servers import Server, free_ports

from tests.support.waiting import PATIENCE, until, until_logged

ENDLESS = "import time; print('up', flush=True)\nwhile True: time.sleep(60)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n{ENDLESS}"


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    return DataDir.open(tmp_path / "data")


@pytest.fixture
def program(tmp_path: Path) -> Callable[..., Program]:
    def make(name: str, source: str, *arguments: str) -> Program:
        (tmp_path / f"probe_{name}.py").write_text(textwrap.dedent(source))
        env = {**os.environ, "PYTHONPATH": str(tmp_path)}
        return Program(name, f"probe_{name}", env, tmp_path / f"{name}.log", tmp_path, arguments)

    return make


@pytest.fixture(params=["plain", "fork-server"])
async def launcher(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Launcher]:
    if request.param == "plain":
        yield PlainLauncher()
        return
    fork_server = await ForkLauncher.open(
        tmp_path / "fork-server.log", {**os.environ, "PYTHONPATH": str(tmp_path)}, ["json"]
    )
    yield fork_server
    await fork_server.close()


async def gone(pid: int) -> None:
    await until(lambda: not is_running(pid))


async def test_a_program_gets_its_environment_arguments_and_log(
    launcher: Launcher, program: Callable[..., Program]
) -> None:
    said = "print(sys.argv[1:], os.getcwd(), 'HOME' in os.environ, flush=True)"
    source = f"import os, sys; {said}; sys.stderr.write('err\\n'); sys.exit(7)"
    wanted = program("argv", source, "a", "b c")
    process = await launcher.start(wanted)
    assert await process.exited == 7
    assert wanted.log.read_text().splitlines() == [f"['a', 'b c'] {wanted.cwd} True", "err"]


async def test_an_unhandled_exception_is_in_the_log_and_the_exit_code(
    launcher: Launcher, program: Callable[..., Program]
) -> None:
    wanted = program("raises", "raise ValueError('broken on purpose')")
    assert await (await launcher.start(wanted)).exited == 1
    assert "broken on purpose" in wanted.log.read_text()


async def test_stop_kills_what_does_not_listen(launcher: Launcher, program: Callable[..., Program]) -> None:
    wanted = program("stubborn", STUBBORN)
    process = await launcher.start(wanted)
    await until_logged(wanted.log, "up")
    assert await process.stop(0.2) == -signal.SIGKILL
    assert await process.stop(0.2) == -signal.SIGKILL  # Again, and nothing happens.


async def test_a_killed_service_is_started_again_and_stopped_for_good(
    data: DataDir, launcher: Launcher, program: Callable[..., Program]
) -> None:
    lines: list[str] = []
    supervisor = Supervisor(data, lines.append)
    wanted = program("endless", ENDLESS)
    await supervisor.start(wanted, launcher)
    await until_logged(wanted.log, "up")
    first = data.read_pids()["endless"]["pid"]
    os.kill(first, signal.SIGKILL)
    await until_logged(wanted.log, "up", times=2)
    # The new process may speak before the list of processes has been written again.
    await until(lambda: data.read_pids()["endless"]["pid"] != first)
    second = data.read_pids()["endless"]
    assert second["restarts"] == 1
    assert supervisor.restarts == {"endless": 1}
    assert lines == ["endless ended (signal 9) and is started again"]
    await supervisor.stop()
    await gone(second["pid"])
    assert not data.pids.exists()


async def test_a_service_that_cannot_live_fails_with_the_end_of_its_log(
    data: DataDir, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_FIRST_DELAY", 0.01)
    monkeypatch.setattr(supervising, "GIVE_UP_AFTER", 3)
    supervisor = Supervisor(data, lambda _: None)
    await supervisor.start(program("doomed", "import sys; sys.exit('the disk is on fire')"), PlainLauncher())
    with pytest.raises(Fatal, match=r"doomed ended 3 times(.|\n)*the disk is on fire"):
        await asyncio.wait_for(supervisor.failed, PATIENCE)
    await supervisor.stop()


async def test_one_of_several_that_cannot_live_is_set_aside_and_tried_again(
    data: DataDir, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_FIRST_DELAY", 0.01)
    monkeypatch.setattr(supervising, "_ASIDE_SECONDS", 0.05)
    monkeypatch.setattr(supervising, "GIVE_UP_AFTER", 3)
    said, listed = list[str](), list[set[str]]()

    def announce(line: str) -> None:
        if "is set aside" in line:
            said.append(line)
            listed.append(set(data.read_pids()))

    supervisor = Supervisor(data, announce)
    good, bad = program("good", ENDLESS), program("bad", "import sys; sys.exit(9)")
    for one in (good, bad):
        await supervisor.start(one, PlainLauncher(), spare=True)
    await until(lambda: len(said) >= 2)
    assert said[0].startswith("bad keeps ending (exit code 9) and is set aside for")
    assert "; the others go on." in said[0]
    assert str(bad.log) in said[0]
    assert listed[:2] == [{"good"}, {"good"}]
    assert not supervisor.failed.done()
    # The last one that lives ends everything when it cannot.
    for _ in range(3):
        await until(lambda: supervisor.failed.done() or is_running(data.read_pids()["good"]["pid"]))
        if not supervisor.failed.done():
            os.kill(data.read_pids()["good"]["pid"], signal.SIGKILL)
            await gone(data.read_pids()["good"]["pid"])
    with pytest.raises(Fatal, match="good ended 3 times"):
        await asyncio.wait_for(supervisor.failed, PATIENCE)
    await supervisor.stop()


async def test_too_few_that_live_are_told_after_one_more_try(
    data: DataDir, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody waits for ever for a run that cannot go on."""
    for name, value in (("_FIRST_DELAY", 0.01), ("_ASIDE_SECONDS", 0.05), ("GIVE_UP_AFTER", 2)):
        monkeypatch.setattr(supervising, name, value)
    said: list[str] = []
    supervisor = Supervisor(data, said.append)
    supervisor.needed = 2
    for one in (program("good", ENDLESS), program("bad", "import sys; sys.exit('no such device')")):
        await supervisor.start(one, PlainLauncher(), spare=True)
    with pytest.raises(Fatal) as error:
        await asyncio.wait_for(supervisor.failed, PATIENCE)
    await supervisor.stop()
    (aside,) = [line for line in said if "is set aside" in line]
    assert "the run needs 2 miners (windows.min_miners): if it ends again then, `connito up` ends" in aside
    assert str(error.value).startswith(
        "bad keeps ending (exit code 1), and the run needs 2 miners (windows.min_miners), of which 1 live. The run stays "
        "as it is: mend this and go on with `connito up`"
    )
    assert str(error.value).endswith("no such device")


async def test_one_that_was_set_aside_and_lives_again_is_one_of_those_that_live(
    data: DataDir, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Else the death of another one would end everything, and each of its own would cost a minute, for ever."""
    for name, value in (("_FIRST_DELAY", 0.01), ("_ASIDE_SECONDS", 0.05), ("GIVE_UP_AFTER", 2)):
        monkeypatch.setattr(supervising, name, value)
    said, healed = list[str](), tmp_path / "healed"
    source = f"import pathlib, sys\nif not pathlib.Path({str(healed)!r}).exists(): sys.exit(9)\n{ENDLESS}"

    def announce(line: str) -> None:
        if "is set aside" in line:
            said.append(line)

    supervisor = Supervisor(data, announce)
    for one in (program("first", ENDLESS), program("second", source)):
        await supervisor.start(one, PlainLauncher(), spare=True)
    await until(lambda: len(said) >= 1)
    healed.touch()
    await until(lambda: "second" in data.read_pids() and is_running(data.read_pids()["second"]["pid"]))
    # From now on it has lived for long enough.
    monkeypatch.setattr(supervising, "GIVE_UP_WITHIN", 0.0)
    second, before = data.read_pids()["second"]["pid"], len(said)
    os.kill(second, signal.SIGKILL)
    await until(lambda: data.read_pids().get("second", {}).get("pid") not in (None, second))
    assert len(said) == before, "it died once, and is started again at once"
    monkeypatch.setattr(supervising, "GIVE_UP_AFTER", 1)
    os.kill(data.read_pids()["first"]["pid"], signal.SIGKILL)
    await until(lambda: len(said) > before or supervisor.failed.done())
    assert not supervisor.failed.done()
    assert said[-1].startswith("first keeps ending")
    await supervisor.stop()


async def test_what_dies_for_want_of_room_is_never_given_up(
    data: DataDir, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(supervising, "_FULL_BYTES", 1 << 62)
    said: list[str] = []
    supervisor = Supervisor(data, said.append)
    starts = data.root / "starts"
    source = f"""
        from pathlib import Path
        import sys, time
        starts = Path({str(starts)!r})
        starts.write_text(starts.read_text() + "." if starts.exists() else ".")
        time.sleep(60 if len(starts.read_text()) > 2 else 0)
        sys.exit(5)
    """
    await supervisor.start(program("full", source), PlainLauncher())
    await until(lambda: bool(said))
    assert "waits: the disk of" in said[0]
    await asyncio.sleep(0.05)
    assert (starts.read_text(), supervisor.failed.done()) == (".", False)
    monkeypatch.setattr(supervising, "_FULL_BYTES", 0)
    await until(lambda: len(starts.read_text()) > 2)
    assert not supervisor.failed.done()
    await supervisor.stop()


async def test_a_start_for_which_there_is_no_room_is_tried_again(
    data: DataDir, program: Callable[..., Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(supervising, "_LAST_DELAY", 0.01)

    class Full(PlainLauncher):
        """A launcher whose log cannot be made for some time."""

        failures = -1

        async def start(self, program: Program, *, stdout: int | None = None) -> Process:
            self.failures += 1
            if 1 <= self.failures <= 10:
                raise OSError(errno.ENOSPC, "No space left on device")
            return await super().start(program, stdout=stdout)

    said: list[str] = []
    supervisor, launcher = Supervisor(data, said.append), Full()
    await supervisor.start(program("again", ENDLESS), launcher)
    os.kill(data.read_pids()["again"]["pid"], signal.SIGKILL)
    await until(lambda: launcher.failures == 11)
    assert [line for line in said if line.startswith("again waits") and "No space left" in line]
    assert not supervisor.failed.done()
    await supervisor.stop()


class Short(Server):
    """A server that does not come up: its port is taken, or its process ends."""

    program = "short"

    def __init__(self, data_dir: Path, error: Exception, *, began: bool) -> None:
        super().__init__(data_dir)
        self.error, self.began = error, began

    def start(self, progress: object = None) -> Self:
        if self.began:
            self.begin_and_end()
        raise self.error

    def begin_and_end(self) -> None:
        self.process = subprocess.Popen(["false"])
        self.process.wait()


@pytest.mark.parametrize("again", [False, True], ids=["the first time", "again"])
@pytest.mark.parametrize("error", [Invalid("its port is taken"), Retry("not now")])
async def test_a_server_that_did_not_begin_keeps_its_cause_on_a_full_disk(
    error: Exception, again: bool, data: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_FULL_BYTES", 1 << 62)
    server = Short(data.root, error, began=False)
    if again:
        server.begin_and_end()
    with pytest.raises(type(error)) as raised:
        async with asyncio.timeout(PATIENCE):
            await Supervisor(data, lambda _: None).serve(server)
    assert raised.value is error


class Listening(Server):
    """A server that holds its port for as long as it lives."""

    program = "listening"

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        (self.port,), self.asked, self.taken = free_ports(1), 0, False

    def check_ports(self) -> None:
        self.asked += 1
        if self.taken:
            raise Invalid("it is being taken")
        super().check_ports()

    def _prepare(self) -> list[str]:
        return [
            sys.executable,
            "-c",
            f"import socket; s = socket.create_server(('127.0.0.1', {self.port})); s.accept()",
        ]

    def _ports(self) -> dict[str, int]:
        return {"clients": self.port}

    def _not_ready(self) -> str:
        try:
            self.check_ports()
        except Invalid:
            return ""
        return "it does not listen yet"


async def test_a_server_whose_port_another_took_while_it_was_down_waits_for_it(data: DataDir) -> None:
    said: list[str] = []
    supervisor, server = Supervisor(data, said.append), Listening(data.root)
    await supervisor.serve(server)
    first, squatter = server.pid, socket.socket()
    squatter.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    server.taken = True
    server.kill()
    squatter.bind(("127.0.0.1", server.port))
    squatter.listen()
    server.taken, before = False, server.asked
    # As often as a server may die, and more.
    await until(lambda: server.asked > before + 8 or supervisor.failed.done())
    assert not supervisor.failed.done()
    squatter.close()
    await until(lambda: server.pid != first)
    (told,) = [line for line in said if "waits" in line]
    assert "taken" in told or "another program has it" in told
    assert supervisor.restarts == {"listening": 1}
    await supervisor.stop()


async def test_a_server_that_ends_on_a_full_disk_waits_and_the_cause_is_kept(
    data: DataDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervising, "_FULL_BYTES", 1 << 62)
    error = Invalid("it ended with code 1")
    supervisor = Supervisor(data, lambda _: None)
    with pytest.raises(OSError, match="No space left") as raised:
        await supervisor._start_server(Short(data.root, error, began=True))
    assert raised.value.__cause__ is error


async def test_forked_services_end_with_the_preloaded_process(tmp_path: Path, program: Callable[..., Program]) -> None:
    fork_server = await ForkLauncher.open(
        tmp_path / "fork-server.log", {**os.environ, "PYTHONPATH": str(tmp_path)}, ["json"]
    )
    wanted = program("child", ENDLESS)
    process = await fork_server.start(wanted)
    await until_logged(wanted.log, "up")
    os.kill(fork_server.pid, signal.SIGKILL)
    assert await process.exited == -signal.SIGKILL
    await gone(process.pid)
    await fork_server.close()


async def test_a_preloaded_process_that_was_killed_is_replaced(
    tmp_path: Path, data: DataDir, program: Callable[..., Program]
) -> None:
    begun: list[int] = []
    fork_server = await ForkLauncher.open(
        tmp_path / "fork-server.log", {**os.environ, "PYTHONPATH": str(tmp_path)}, ["json"], begun=begun.append
    )
    supervisor = Supervisor(data, lambda _: None)
    await supervisor.start(program("child", ENDLESS), fork_server)
    for losses in (1, 2):
        before = data.read_pids()["child"]["pid"]
        os.kill(fork_server.pid, signal.SIGKILL)
        await until(lambda before=before: data.read_pids()["child"]["pid"] != before)  # type: ignore[misc]
        assert (fork_server.losses, supervisor.restarts) == (losses, {"child": losses})
    assert len(set(begun)) == 3
    assert is_running(data.read_pids()["child"]["pid"])
    await supervisor.stop()
    await fork_server.close()
    await gone(fork_server.pid)


async def test_a_preloaded_process_that_was_killed_while_it_imported_is_replaced(
    tmp_path: Path, program: Callable[..., Program]
) -> None:
    begun: list[int] = []
    (tmp_path / "first_never_ends.py").write_text(
        "import time\nfrom pathlib import Path\nseen = Path(__file__).with_suffix('.seen')\n"
        "if not seen.exists():\n    seen.touch()\n    time.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    fork_server = await ForkLauncher.open(tmp_path / "log", environment, ["first_never_ends"], begun=begun.append)
    starting = asyncio.create_task(fork_server.start(wanted := program("child", ENDLESS)))
    await until((tmp_path / "first_never_ends.seen").exists)
    os.kill(fork_server.pid, signal.SIGKILL)
    process = await starting
    await until_logged(wanted.log, "up")
    assert len(set(begun)) == 2
    await fork_server.close()
    await gone(process.pid)


async def test_an_import_that_fails_is_reported_with_its_log(tmp_path: Path, program: Callable[..., Program]) -> None:
    fork_server = await ForkLauncher.open(tmp_path / "fork-server.log", dict(os.environ), ["no_such_module_here"])
    with pytest.raises(Fatal, match=r"fork-server\.log"):
        await fork_server.start(program("never", ENDLESS))
    assert "no_such_module_here" in (tmp_path / "fork-server.log").read_text()
    await fork_server.close()


async def test_everything_dies_with_a_supervisor_that_is_killed(
    tmp_path: Path, program: Callable[..., Program]
) -> None:
    """SIGKILL leaves no chance to clean up: the kernel has to do it."""
    wanted = program("orphan", ENDLESS)
    boss = f"""
        import asyncio, os
        from pathlib import Path
        from connito.local.processes import PlainLauncher, Program, ForkLauncher
        async def main():
            env = {{**os.environ, "PYTHONPATH": {str(tmp_path)!r}}}
            forker = await ForkLauncher.open(Path("fork-server.log"), env, ["json"])
            for name, launcher in (("plain", PlainLauncher()), ("forked", forker)):
                program = Program(name, {wanted.module!r}, env, Path({str(tmp_path)!r}) / f"{{name}}.log", Path.cwd())
                process = await launcher.start(program)
                print(process.pid, flush=True)
            print(forker.pid, flush=True)
            await asyncio.Event().wait()
        asyncio.run(main())
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", textwrap.dedent(boss), stdout=asyncio.subprocess.PIPE, cwd=tmp_path
    )
    assert process.stdout is not None
    pids = [int(await asyncio.wait_for(process.stdout.readline(), PATIENCE)) for _ in range(3)]
    process.kill()
    await process.wait()
    for pid in pids:
        await gone(pid)


def test_a_process_with_threads_refuses_to_fork(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    check_fork_safe(tmp_path)
    (tmp_path / "2").mkdir()
    with pytest.raises(Fatal, match="2 threads"):
        check_fork_safe(tmp_path)
