"""Every document that one party makes and another reads: it is taken, or refused in a sentence, and nothing else happens."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from connito.base.pretrained import check_config, parse_config
from connito.cli.audit import _chain_of
from connito.cli.miner import _experts
from connito.data.checkpoint_files import find_checkpoint, read_json
from connito.data.corpus import Corpus
from connito.data.manifest import Manifest
from connito.errors import Invalid
from connito.jobs.spec import parse_job, read_yaml
from connito.library.artifact import EXPERT_FILE, read_header
from connito.library.attestation import ATTESTATION_FILE, check_attestation
from connito.library.schema import read_record
from connito.wire.roster import Roster
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st


def in_file(read: Callable[[Path], Any]) -> Callable[[bytes, Path], Any]:
    def write(data: bytes, folder: Path) -> Any:
        (folder / "document").write_bytes(data)
        return read(folder / "document")

    return write


def checkpoint(data: bytes, folder: Path) -> Any:
    (folder / "config.json").write_bytes(b"{}")
    (folder / "model.safetensors.index.json").write_bytes(data)
    return find_checkpoint(folder)


def expert(data: bytes, folder: Path) -> Any:
    (folder / EXPERT_FILE).write_bytes(len(data).to_bytes(8, "little") + data)
    return read_header(folder / EXPERT_FILE)


def attestation(data: bytes, folder: Path) -> Any:
    (folder / ATTESTATION_FILE).write_bytes(data)
    return check_attestation(folder)


def job(data: bytes, folder: Path) -> Any:
    return parse_job(in_file(read_yaml)(data, folder))


READERS: dict[str, Callable[[bytes, Path], Any]] = {
    "manifest": lambda data, _: Manifest.from_bytes(data),
    "corpus": lambda data, _: Corpus.load(data),
    "record": lambda data, _: read_record(data, "it"),
    "config": lambda data, _: check_config(data),
    "side file": in_file(lambda path: read_json(path, "it")),
    "index": checkpoint,
    "expert": expert,
    "attestation": attestation,
    "selection": in_file(_experts),
    "chain": in_file(_chain_of),
    "roster": in_file(Roster.load),
    "job": job,
}
BYTES = [
    b"", b"{}", b"[]", b"5", b"null", b'"x"', b"\xff\xfe", b"\x00" * 64, "{}".encode("utf-16"), b"[" * 200_000,
    b'{"a":' * 100_000,
    b'{"version":1,"files":' + b"[" * 100_000, b"9" * 5000, b'{"a":' + b"9" * 5000 + b"}", b"1e999", b"NaN", b'{"a":1,"a":2}',
    b'{"__metadata__":' + b"[" * 100_000, b'{"layers":{"1":[' + b"9" * 5000 + b"]}}", b'{"weight_map":{"a":"../../x"}}',
    b'{"weight_map":{"a":["x"]}}', b'{"keys":{"coordinator":[["x"]]}}', b'{"chain":{"windows":[1]}}', b"a: &a [*a]",
    b"? [1]\n: 2",
    b"a: !!python/object/apply:os.system [x]", b"\xef\xbb\xbf{}", "\ud800".encode("utf-8", "surrogatepass"),
]  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("data", BYTES, ids=range(len(BYTES)))
def test_what_is_no_document_is_refused_in_a_sentence(reader: str, data: bytes, tmp_path: Path) -> None:
    said = "read, and that is well"
    try:
        READERS[reader](data, tmp_path)
    except Invalid as error:
        said = str(error)
    assert 10 < len(said) < 2000
    assert "Traceback" not in said
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]


WORDS = st.sampled_from([
    "version", "name", "files", "tensors", "extra", "digest", "size", "media_type", "shape", "rows", "start", "dtype", "layers",
    "expert", "weight_map", "metadata", "__metadata__", "keys", "stakes", "retired", "chain", "windows", "domain", "data", "base",
    "training", "num_hidden_layers", "num_experts", "model_type", "aggregator", "library", "envelope", "subject",
    "losses", "path",
])  # fmt: skip
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | WORDS
DOCUMENTS = st.dictionaries(
    WORDS | st.text(max_size=4),
    st.recursive(
        LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=4), max_leaves=12
    ),
    max_size=6,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(READERS)), DOCUMENTS)
def test_any_document_is_read_or_refused(tmp_path: Path, reader: str, document: dict[str, Any]) -> None:
    with suppress(Invalid):
        READERS[reader](json.dumps(document).encode(), tmp_path)


MODEL: dict[str, Any] = {"model_type": "qwen3_moe", "hidden_size": 32, "num_hidden_layers": 2, "num_experts": 4}
BOMBS: list[dict[str, Any]] = [
    *({key: 10**9} for key in ("num_hidden_layers", "num_layers", "n_layer", "encoder_layers", "num_experts", "num_labels")),
    *({key: 10**15} for key in ("hidden_size", "vocab_size", "max_position_embeddings")),
    {"text_config": {"num_hidden_layers": 10**7}}, {"vision_config": {"depth": 10**7}},
    {"layer_types": ["full_attention"] * 10**5},
    {"id2label": {str(n): "x" * 40 for n in range(10**5)}}, {"vocab_size": 10**400},
]  # fmt: skip


@pytest.mark.parametrize("bomb", BOMBS, ids=lambda bomb: next(iter(bomb)))
def test_a_configuration_that_asks_for_a_giant_costs_nothing(bomb: dict[str, Any]) -> None:
    data = (
        json.dumps({**MODEL, **bomb}).encode()
        if "vocab_size" not in bomb
        else json.dumps(MODEL).encode()[:-1] + (b', "vocab_size": ' + b"9" * len(str(bomb["vocab_size"])) + b"}")
    )
    began = time.process_time()
    with pytest.raises(Invalid, match=r"config\.json cannot be read"):
        parse_config(data)
    assert time.process_time() - began < 5.0


def test_sizes_of_real_models_pass() -> None:
    real = {"num_hidden_layers": 126, "vocab_size_per_layer_input": 262_144, "num_experts": 512, "max_position_embeddings": 10**7,
            "time_step_limit": [0.0, float("inf")], "rope_theta": 5e8, "layer_types": ["full_attention"] * 126}  # fmt: skip
    check_config(json.dumps({**MODEL, **real}).encode())
