"""A round of four workers with payloads of 1, 10 and 50 MB, here and by Flower and NVFlare, in one run on one machine.

Nobody trains: a Flower or NVFlare client hands back the numbers that it was sent, and the server averages them. Here a
cycle of `connito up` is a round: one local step of a model whose target experts are as large, commitment, reveal, one
validator's scoring, merge, gate; with uploads raw, and in the code that is the default. The first round is left out.

Peers run in environments of their own, made in the output folder, as their documentation starts them: Flower's SuperLink
and SuperNodes without TLS, NVFlare's proof of concept with processes of its own for server and clients. Both wait between
polls for work; *tuned* is with those sleeps cut to 20 ms, from outside, since not all of them can be set.

seconds     a round, median
cpu         seconds of all processes, by round
memory      of all processes together at one time, the most (PSS: a page that processes share is counted once), looked at
            once a second: it takes a tenth of a second of a core, in which none of them can map a page
loopback    bytes over the loopback interface by round; whatever else the machine sends there counts
"""

from __future__ import annotations

import itertools
import os
import shutil
import statistics
import subprocess
import threading
import time
import uuid
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.harness import Options, Result, main, note
from bench.platform import run_up

WORKERS, ROUNDS, SIZES, POLL = 4, 6, (1, 10, 50), 0.02
# Files of peers that sleep between two looks at whether there is something to do.
POLLING = {
    "nvflare": "client_runner.py,in_process/api.py,in_process_backend.py,wf_comm_server.py,workflows/fedavg.py",
    "flwr": "http_grid.py,start_client_internal.py,run_superexec.py",
}
PROGRAMS = Path(__file__).parent / "peer_programs"
MARK = "PEERS_BENCH_MARK"
PEERS = (
    ("NVFlare", "nvflare", "nvflare_job.py", "site-1.times"),
    ("Flower", "flwr", "flower_job.py", "server.times"),
)
# What the peers are compared at; a later version is another measurement.
VERSIONS = {"flwr": "1.42.0", "nvflare": "2.9.0"}


Measure = Callable[[Path, int], dict[str, Any]]


def run(options: Options) -> Result:
    """Run everybody with every payload; a quick run takes 1 MB and what is here alone."""
    rows: list[dict[str, Any]] = []
    kinds: Mapping[str, Measure] = {
        "here, raw": lambda folder, size: _here(folder, size, "rows"),
        "here, coded": lambda folder, size: _here(folder, size, ""),
    }
    if not options.quick:
        kinds = {
            **kinds,
            **{
                f"{peer}, {how}": _peer(options.out, name, program, times, how == "tuned")
                for peer, name, program, times in PEERS
                for how in ("stock", "tuned")
            },
        }
    words = options.only.split()
    for size, (name, measure) in itertools.product(SIZES[:1] if options.quick else SIZES, kinds.items()):
        if words and not any(word in f"{name} {size}MB".replace(", ", "-").replace(" ", "-") for word in words):
            continue
        note(f"{size} MB: {name}")
        folder = options.out / f"peers-run-{len(rows)}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        rows.append({"who": name, "megabytes": size, **measure(folder.resolve(), size << 20)})
        note(f"  {rows[-1]}")
        shutil.rmtree(folder)
    figures = {f"{row['who']}, {row['megabytes']} MB": row["seconds"] for row in rows}
    return Result({"workers": WORKERS, "rounds": ROUNDS, "poll_seconds": POLL, "versions": VERSIONS}, rows, figures)


@dataclass
class Watch:
    """Looks at all processes that carry a mark in their environment, whoever started them, and keeps what it saw when:
    (time, CPU seconds, of those that have ended as well, bytes of memory, bytes over the loopback interface).
    """

    mark: str = field(default_factory=lambda: uuid.uuid4().hex)
    seen: list[tuple[float, float, int, int]] = field(default_factory=list)
    _cpu: dict[int, float] = field(default_factory=dict)
    _memory: dict[int, int] = field(default_factory=dict)
    _strangers: set[int] = field(default_factory=set)
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def environment(self) -> dict[str, str]:
        """Return the environment of what is to be watched."""
        return {**os.environ, MARK: self.mark, "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> Watch:
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()

    def row(self, ends: Sequence[float], upload: int) -> dict[str, Any]:
        """Return the figures of rounds that ended at `ends`, in seconds since the epoch, all but the first one's."""
        rounds = [later - earlier for earlier, later in itertools.pairwise(ends)]
        within = [entry for entry in self.seen if ends[0] <= entry[0] <= ends[-1]]
        return {
            "seconds": round(statistics.median(rounds), 3),
            "slowest": round(max(rounds), 3),
            "cpu": round((within[-1][1] - within[0][1]) / len(rounds), 2),
            "memory": max(memory for _, _, memory, _ in self.seen),
            "loopback": round((within[-1][3] - within[0][3]) / len(rounds)),
            "upload": upload,
        }

    def _look(self) -> None:
        for look in itertools.count():
            if self._done.wait(0.1):
                break
            if look % 10 == 0:
                self._memory.clear()
            for path in Path("/proc").iterdir():
                if path.name.isdigit():
                    self._process(int(path.name), memory=look % 10 == 0)
            self.seen.append((time.time(), sum(self._cpu.values()), sum(self._memory.values()), _loopback()))

    def _process(self, process: int, *, memory: bool) -> None:
        """Note a process's CPU seconds and, if asked, its memory, unless it does not carry the mark."""
        if process in self._strangers:
            return
        folder = Path(f"/proc/{process}")
        try:
            if self.mark.encode() not in (folder / "environ").read_bytes():
                self._strangers.add(process)
                return
            times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
            rollup = (folder / "smaps_rollup").read_text() if memory else ""
        except OSError:
            # It has ended.
            return
        self._cpu[process] = sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        if memory:
            pages = (int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))
            self._memory[process] = sum(pages) * 1024


def _loopback() -> int:
    line = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(line.split(":")[1].split()[0])


def _here(folder: Path, size: int, codec: str) -> dict[str, Any]:
    base = _base(folder / "base", size)
    chosen = {
        "training.local_steps": 1,
        "training.batch_sequences": 1,
        "training.sequence_length": 64,
        "selection.max_experts": 8,
        # Judging is not what is compared: as few sequences as the rules work with.
        **dict.fromkeys(
            ("scoring.target_sequences", "merging.gate_target_sequences", "merging.report_target_sequences"), 2
        ),
        **dict.fromkeys(
            ("scoring.general_sequences", "merging.gate_general_sequences", "merging.report_general_sequences"), 1
        ),
        **({"training.codec": codec} if codec else {}),
    }
    settings = itertools.chain.from_iterable(("--set", f"{name}={value}") for name, value in chosen.items())
    crew = ("--cycles", str(ROUNDS), "--miners", str(WORKERS), "--validators", "1")
    from connito.client.runs import book_of

    with Watch() as watch:
        report = run_up(folder / "data", "--base", str(base), *crew, *settings, environment=watch.environment)
    facts, _, _ = book_of(report["run"], None, folder / "data")
    closed = [facts.window("merge", cycle["cycle"]).closed_fact for cycle in report["cycles"]]
    ends = [fact.time_unix_ms / 1000 for fact in closed if fact is not None]
    return watch.row(ends, report["totals"]["upload_bytes_per_miner_and_cycle"])


def _base(folder: Path, size: int) -> Path:
    """Return a base of two layers of eight experts, of which eight are `size` bytes as float32."""
    import torch
    from connito.base.checkpoint import save_checkpoint
    from connito.base.smollm import Gguf, gguf_file
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    words, hidden = Gguf(gguf_file()).tokenizer(), 128
    config = Qwen2MoeConfig(
        vocab_size=len(words),
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=round(size / (8 * 3 * hidden * 4)),
        shared_expert_intermediate_size=8,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_experts=8,
        num_experts_per_tok=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return save_checkpoint(Qwen2MoeForCausalLM(config), folder, words)


def _peer(out: Path, name: str, program: str, times: str, tuned: bool) -> Measure:
    def measure(folder: Path, size: int) -> dict[str, Any]:
        python = _environment(out.resolve(), name)
        more = {"NVFLARE_POC_WORKSPACE": str(folder / "poc")}
        if tuned:
            more |= {
                "PYTHONPATH": str(PROGRAMS / "short_sleeps"),
                "SHORT_SLEEP": str(POLL),
                "SHORT_SLEEP_IN": POLLING[name],
            }
        arguments = (str(folder), str(size // 4), str(WORKERS), str(ROUNDS))
        with Watch() as watch:
            _run((str(python), str(PROGRAMS / program), *arguments), {**watch.environment, **more}, folder)
        ends = [float(line) for line in (folder / times).read_text().split()]
        return watch.row(ends[1:], size)

    return measure


def _run(command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
    log = folder / "log"
    with log.open("w") as out:
        done = subprocess.run(
            command, env=dict(environment), cwd=folder, stdout=out, stderr=out, timeout=900, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(f"{command[1]} ended with {done.returncode}: {log.read_text()[-3000:]}")


def _environment(out: Path, name: str) -> Path:
    """Return the interpreter of an environment with a peer, made where it is not there."""
    folder = out / f"peer-{name}-{VERSIONS[name]}"
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        note(f"installing {name} {VERSIONS[name]} into {folder}")
        venv.create(folder, with_pip=True, clear=True)
        subprocess.run((python, "-m", "pip", "install", "--quiet", f"{name}=={VERSIONS[name]}"), check=True)
        (folder / "ready").touch()
    return python


if __name__ == "__main__":
    main("peers", run, doc=__doc__)
