"""Whatever happened to a file of a data folder, whoever starts there is told in a sentence, or goes on without it."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from connito.bus.permissions import PLATFORM
from connito.client.waiting import waits
from connito.errors import ConnitoError, Invalid
from connito.local import begun
from connito.local.defaults import UpOptions, profile
from connito.local.display import PlainDisplay
from connito.local.identities import participants
from connito.local.installation import Installation
from connito.platform.accounts import Accounts
from connito.platform.datadir import DataDir, Platform
from connito.platform.session import Session

# Keys of which another one stands for all.
ALIKE = {
    f"{name}.nk" for name in ("aggregator", "committer", "coordinator", "library", "selector", "validator-1", "system")
}
ALIKE |= {f"{name}.nk" for name in ("customers", "miners-read", "platform", "validators-read", "validators-say")}
DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "zeros": lambda content: bytes(len(content)),
    "first bit": lambda content: bytes([content[0] ^ 0x80]) + content[1:],
    "a bit within": lambda content: content[:20] + bytes([content[20] ^ 1]) + content[21:] if len(content) > 20 else b"x",
    "list": lambda content: b"[1, 2]",
    "null": lambda content: b"null",
    "other objects": lambda content: b'{"accounts": [], "a": {"pid": "x"}, "run": {}}',
    "no text": lambda content: bytes(range(128, 192)),
}  # fmt: skip


def installed(root: Path) -> Installation:
    data, options = DataDir.open(root), UpOptions(base="tiny", miners=1, validators=1, seed=3, data_dir=root)
    machine, display = profile(options).machine(2), PlainDisplay(io.StringIO())
    return Installation(data, participants(1, 1, ()), machine, 3, display)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("whole")
    made = installed(root)
    made._store_secret()
    made.data.keep_threads(1)
    made.data.write_platform(Platform(1, "nats://127.0.0.1:1", "http://127.0.0.1:2", "a", "b"))
    made.data.write_pids({"miner-1": {"pid": 1, "module": "services.trainer", "restarts": 0, "started": 1}})
    begun.note(made.data, "r", UpOptions(base="tiny"))
    (root / "ports").mkdir()
    (root / "ports" / "miner-1.json").write_text('{"http": 1}')
    return root


def attempt(root: Path) -> str | None:
    """Read what `connito up` and other commands read before anything runs in a folder; return why that cannot be."""
    data = DataDir.open(root)
    try:
        begun.find(data)
        installed(root)._store_secret()
        assert data.threads >= 0
        data.read_platform()
        Session.open(root, role="customer")
    except ConnitoError as error:
        return str(error)
    return None


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_file_is_named_or_made_anew(kind: str, whole: Path, tmp_path: Path) -> None:
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file() and path.name not in ALIKE]
    assert {"accounts.json", "begun.json", "pids.json", "roster.json", "keys/store.secret"} <= set(map(str, files))
    for file in files:
        root = tmp_path / str(file).replace("/", "-")
        shutil.copytree(whole, root)
        path = root / file
        path.write_bytes(DAMAGE[kind](path.read_bytes()))
        DataDir(root).end_leftovers()
        assert waits(DataDir(root)) == []
        said = attempt(root)
        assert said is None or (len(said) > 30 and "\n" not in said), (file, said)


def test_a_seed_that_is_damaged_is_named(whole: Path, tmp_path: Path) -> None:
    root = tmp_path / "data"
    shutil.copytree(whole, root)
    (root / "accounts" / "miners-say.nk").write_bytes(b"\x92\xff")
    with pytest.raises(Invalid, match=r"miners-say\.nk is damaged"):
        installed(root)


def test_the_log_is_found_again_by_the_account_that_it_lies_under(tmp_path: Path) -> None:
    """Another account's key would show an empty platform beside the log that is there."""
    accounts = Accounts(tmp_path)
    accounts.make()
    platform = accounts.platform
    (tmp_path / "nats" / "jetstream" / "jetstream" / platform).mkdir(parents=True)
    state = json.loads((tmp_path / "accounts.json").read_text())
    (tmp_path / "accounts.json").write_text(json.dumps(state | {"accounts": state["accounts"] | {PLATFORM: "A" * 56}}))
    with pytest.raises(Invalid, match="whose log lies here"):
        Accounts(tmp_path).make()
    (tmp_path / "accounts.json").unlink()
    again = Accounts(tmp_path)
    again.make()
    assert again.platform == platform
