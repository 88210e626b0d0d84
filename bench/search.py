"""The library's index at 10,000 records: time to build it, and latency of searches; and how good searching by example is.

Records are synthetic: words with Zipf frequencies, 40 domains, a share that is private, deprecated, yanked or opted out.
Half of the queries are one word, half two; the index lies in a file.

By example: twelve experts of the tiny base, three a domain, trained for 4, 12 and 30 batches. Queries are held-out text of
each domain and of each pair of domains. Every expert is measured on every query; `first_is_best` is how often the
suggestion that stands first is the expert that really saves most, `regret` what the best one saves beyond it, nats
per token, `loss_saved_share` the saving of the first suggestion over the best one's.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from connito.library.governance import Viewer
from connito.library.hits import search
from connito.library.index import Index, LibraryEvent

from bench.example_search import by_example
from bench.harness import Options, Result, by_seed, interval, main

VOCABULARY = 4000
DOMAINS = 40


def run(options: Options) -> Result:
    """Rebuild, then query; --quick runs fewer queries on the same number of records."""
    records, queries = 10_000, 200 if options.quick else 2000
    seeds = min(options.seeds, 1) if options.quick else options.seeds
    every = by_seed(
        options,
        "search",
        lambda seed: [_round(seed, records, queries), *by_example(seed, quick=options.quick)],
        seeds,
    )
    rows, examples = ([row for row in every if ("method" in row) is of] for of in (False, True))
    figures: dict[str, Any] = {key: statistics.fmean(row[key] for row in rows) for key in rows[0] if key != "seed"}
    for method in ("signature", "gradient", "gradient_then_5_measured"):
        of_method = [row for row in examples if row["method"] == method]
        hits = _of_seeds(of_method, lambda row: float(row["first_is_best"]))
        figures[f"{method}_first_is_best"] = [round(x, 4) for x in interval(hits)]
        figures[f"{method}_best_in_first_3"] = statistics.fmean(row["best_in_first_3"] for row in of_method)
        figures[f"{method}_regret"] = [round(x, 4) for x in interval(_of_seeds(of_method, lambda row: row["regret"]))]
        figures[f"{method}_loss_saved_share"] = sum(r["saved"] for r in of_method) / sum(r["best"] for r in of_method)
    return Result(
        {"in_parts": True, "records": records, "queries": queries, "seeds": seeds}, [*rows, *examples], figures
    )


def _of_seeds(rows: list[dict[str, Any]], value: Callable[[dict[str, Any]], float]) -> list[float]:
    seeds = sorted({row["seed"] for row in rows})
    return [statistics.fmean(value(row) for row in rows if row["seed"] == seed) for seed in seeds]


def _round(seed: int, records: int, queries: int) -> dict[str, Any]:
    rng = random.Random(seed)
    words = [f"w{rng.getrandbits(32):x}" for _ in range(VOCABULARY)]
    zipf = [1 / rank for rank in range(1, VOCABULARY + 1)]
    events = list(_events(rng, words, zipf, records))
    with tempfile.TemporaryDirectory() as folder, Index(Path(folder) / "index.sqlite") as index:
        started = time.perf_counter()
        index.apply(events)
        rebuild = time.perf_counter() - started
        latencies, found, busy = [], 0, time.process_time()
        viewer = Viewer("somebody", frozenset({"org-1", "org-2"}))
        for number in range(queries):
            text = " ".join(rng.choices(words, zipf, k=1 + number % 2))
            started = time.perf_counter()
            found += bool(search(index, text, viewer=viewer))
            latencies.append((time.perf_counter() - started) * 1000)
        busy = (time.process_time() - busy) * 1000 / queries
        size = index.path.stat().st_size if index.path else 0
    return {
        "seed": seed,
        "rebuild_seconds": rebuild,
        "search_p50_ms": statistics.median(latencies),
        "search_p99_ms": statistics.quantiles(latencies, n=100)[98],
        "search_cpu_ms": busy,
        "answered_share": found / queries,
        "index_bytes": size,
    }


def _events(rng: random.Random, words: list[str], zipf: list[float], records: int) -> Iterator[LibraryEvent]:
    for number in range(1, records + 1):
        name = f"expert-{number}"
        yield LibraryEvent(number, number, "deposited", name, _record(rng, name, words, zipf))
        if number % 50 == 0:
            kind = "yanked" if number % 100 else "deprecated"
            yield LibraryEvent(records + number, number, kind, name, {"reason": "superseded"})
    for source in range(20):
        yield LibraryEvent(3 * records + source, 0, "opted-out", f"source-{source}", {"reason": "asked"})


def _record(rng: random.Random, name: str, words: list[str], zipf: list[float]) -> dict[str, Any]:
    domain = f"domain{rng.randrange(DOMAINS)}"
    before = rng.uniform(2, 4)
    return {
        "expert_id": name,
        "domain": domain,
        "base": {"name": "base", "manifest": "b" * 64},
        "expert": {"digest": f"{rng.getrandbits(256):064x}", "bytes": 1 << 20, "parameters": 1 << 18},
        "selection": {"method": "esft-token", "layers": {str(layer): [1, 5, 7] for layer in range(6)}},
        "losses": [{"domain": domain, "before": before, "after": before - rng.uniform(0, 0.3), "tokens": 4096}],
        "contributors": [{"miner": f"U{n}", "label": rng.choice(words), "share": 0.5} for n in range(2)],
        "license": rng.choice(["CC-BY-4.0", "Apache-2.0", "CC0-1.0"]),
        "data_statement": " ".join(rng.choices(words, zipf, k=30)),
        "customer": "",
        "governance": {
            "visibility": rng.choices(["public", "organisation", "private"], [8, 1, 1])[0],
            "organisation": f"org-{rng.randrange(10)}",
            "owner": f"owner-{rng.randrange(100)}",
            "sources": [f"source-{rng.randrange(2000)}"],
        },
    }


if __name__ == "__main__":
    main("search", run, doc=__doc__, seeds=5)
