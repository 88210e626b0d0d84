"""The same tokens in one place and with several miners, on the demo base: real text and 274 million parameters.

As `bench.decentralised` does it on the tiny base, with the default alone, by AdamW and by Muon: four miners, a hundred steps
each, IID and one domain each. Training text is drawn from one half of each domain, the probe too, what is reported from
the other. Wants a GPU: on two cores of a processor a cell takes hours.
"""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bench.decentralised import Bench, Setting, central_of, kept_of
from bench.decentralised_cells import BATCH, BY_MUON, DATA, HELD, SEEDS, STEPS, Cell
from bench.harness import Options, Result, gpu_name, main, note
from bench.tiny_rig import HELD_OFFSET, LENGTH, PROBE_OFFSET, TRAIN_OFFSET, Rig, Tokens

if TYPE_CHECKING:
    from torch import nn

CHARACTERS, MINERS = 400_000, 4
# The demo's own rate of AdamW, and of Muon the best of a sweep on medical text; where every step is merged a quarter,
# as on the tiny base. Central may fall by a cosine, from a higher rate too.
SETTING = Setting(
    ("medical", "legal", "speeches", "code"),
    2,
    {1: 1e-4, 5: 4e-4, 20: 4e-4, 50: 4e-4},
    {
        "steps": ((4e-4, 1.0), (8e-4, 0.1), (1.6e-3, 0.1)),
        BY_MUON: ((3.2e-3, 1.0), (6.4e-3, 0.1)),
    },
)


def cells(seeds: Sequence[int]) -> Iterator[Cell]:
    """Yield all cells, the most telling ones first."""
    for seed in seeds:
        yield Cell(seed, "central", MINERS, 0, "steps")
    for steps in (20, 50, 5, 1):
        for seed in seeds:
            yield from (Cell(seed, data, MINERS, steps, "default") for data in DATA)
        for seed in seeds if steps > 1 else ():
            yield Cell(seed, "central", MINERS, 0, BY_MUON)
            yield from (Cell(seed, data, MINERS, steps, "default, Muon") for data in DATA)


@dataclass(frozen=True)
class DemoRig(Rig):
    """A seed's text of the demo base."""

    def model(self) -> nn.Module:
        """Return a fresh full model, frozen, on the GPU where there is one, with the family's own loop over experts."""
        model: nn.Module = copy.deepcopy(_whole(self.source))
        return model

    def train(self, domain: str, count: int) -> Tokens:
        """Return training sequences [count, LENGTH + 1]."""
        return self._rows(domain, count, TRAIN_OFFSET)

    def held(self, domain: str, count: int) -> Tokens:
        """Return held-out sequences, of text that nothing else is drawn from."""
        return self._rows(domain, count, HELD_OFFSET)

    def probe(self, domains: Sequence[str], count: int) -> Tokens:
        """Return the probe of a selection: `count` sequences of each domain."""
        return np.concatenate([self._rows(domain, count, PROBE_OFFSET) for domain in domains])

    def _rows(self, domain: str, count: int, offset: int) -> Tokens:
        ids = _ids(self.source, domain)
        half, rng = len(ids) // 2, np.random.default_rng([self.seed, offset, SETTING.domains.index(domain)])
        starts = rng.integers(half - LENGTH - 1, size=count) + half * (offset == HELD_OFFSET)
        rows: Tokens = ids[starts[:, None] + np.arange(LENGTH + 1)]
        return rows


@cache
def _whole(source: Path) -> Any:
    from connito.base.loading import load_full
    from connito.moe.device import device_of

    return load_full(source).to(device_of())


@cache
def _ids(source: Path, domain: str) -> Tokens:
    from connito.base.loading import load_tokenizer
    from connito.data.domains import load_domain

    text = "\n".join(load_domain(domain, CHARACTERS))
    return np.asarray(load_tokenizer(source)(text)["input_ids"], np.int32)


def run(options: Options) -> Result:
    """Measure the cells that are not there yet, of those named by `only`, and gather all that are."""
    seeds = SEEDS[:1] if options.quick else SEEDS[: options.seeds]
    folder = options.out / "decentralised-demo-cells"
    folder.mkdir(parents=True, exist_ok=True)
    wanted, words = list(dict.fromkeys(cells(seeds))), options.only.split()
    benches = _Benches()
    for cell in wanted:
        path = folder / f"{cell.name}.json"
        if path.exists() or (words and not any(cell.name.startswith((word, f"{word}-")) for word in words)):
            continue
        begun = time.monotonic()
        row = {**asdict(cell), **benches.of(cell.seed).measure(cell)}
        row["gpu"] = gpu_name()
        row["seconds"] = round(time.monotonic() - begun, 1)
        note(f"{cell.name}: gain {row['gain']:.4f} in {row['seconds']} s")
        path.write_text(json.dumps(row, indent=2) + "\n")
    rows = [json.loads(path.read_text()) for cell in wanted if (path := folder / f"{cell.name}.json").exists()]
    settings = {
        "only": " ".join(Cell(**{key: row[key] for key in Cell.__annotations__ if key in row}).name for row in rows),
        "steps": STEPS,
        "batch_sequences": BATCH,
        "sequence_length": LENGTH,
        "setting": {**vars(SETTING), "rates": {str(steps): rate for steps, rate in SETTING.rates.items()}},
        "held_out_sequences": HELD * len(SETTING.domains) // 2,
        "seeds_named": SEEDS,
    }
    return Result(settings, rows, kept_of(rows, central_of(rows)))


class _Benches:
    """The bench of the seed that is measured; one at a time is held."""

    def __init__(self) -> None:
        self._of: tuple[int, Bench] | None = None

    @cached_property
    def _source(self) -> Path:
        from connito.base.recipes import build_cached

        return build_cached("demo", lambda *_: None) / "model"

    def of(self, seed: int) -> Bench:
        """Return the bench of a seed."""
        if self._of is None or self._of[0] != seed:
            self._of = seed, Bench(DemoRig(seed, self._source), SETTING)
        return self._of[1]


if __name__ == "__main__":
    main("decentralised_demo", run, doc=__doc__, seeds=len(SEEDS))
