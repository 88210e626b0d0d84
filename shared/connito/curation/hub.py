"""`connito.library`: push an expert or an exported model to a Hugging Face repository, and pull one from there.

HF_ENDPOINT and HF_TOKEN are honoured, as everywhere in `huggingface_hub`. What was uploaded before an interruption is not
uploaded again.
"""

from __future__ import annotations

import glob
import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from connito.curation.exchange import files_of, verify
from connito.curation.holdings import Agreement, Expert, Holdings
from connito.errors import Invalid, NotFound, Retry, VerificationFailed
from connito.library.artifact import CARD_FILE, EXPERT_FILE, MODEL_FILE, RECORD_FILE, require_new
from connito.library.card import render
from connito.library.governance import governance
from connito.library.record import encode
from connito.library.schema import ExpertRecord, read_record
from connito.render import formats
from connito.runtime.extras import extras_named
from connito.runtime.progress import tell

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
# What exports write: weights without programs, settings, text and pictures.
_SAFE = frozenset(
    ("", ".safetensors", ".gguf", ".json", ".jsonl", ".txt", ".md", ".rst", ".jinja", ".svg", ".model", ".tiktoken")
)
# A record, card, signature or picture is far smaller.
_LARGEST_BESIDE = 16 << 20


@dataclass(frozen=True)
class Pushed:
    """A commit: its address and id, and the repository's files that it names."""

    address: str
    commit: str
    files: list[str]


def push(
    target: str | Path,
    repository: str,
    *,
    revision: str = "",
    public: bool = False,
    agreement: Agreement | None = None,
    library: Holdings | None = None,
) -> Pushed:
    """Upload an expert (id or folder) or an exported model to the repository, which is made if it is not there: a private one,
    except where it is to be `public` and the expert is shown to everybody.

    The licence has to allow passing it on; the card is written in the hub's schema. Raises `Invalid`, `NotFound`, `Retry`.
    """
    library = library or Holdings()
    folder, record = _folder(target, library)
    verify(folder, library=library)
    agreed = replace(agreement or Agreement(), redistribute=True)
    library.permit([(folder, record)], "export", agreed)
    shown = governance(record)["visibility"]
    if public and shown != "public":
        raise Invalid(f"{record['expert_id']} is not shown to everybody: push it without --public")
    with _hub():
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        made = api.create_repo(repository, private=not public, exist_ok=True)
        if shown != "public" and not api.model_info(repository).private:
            what = f"{record['expert_id']} is not public, and {repository} is"
            raise Invalid(f"{what}: make the repository private, or push to another")
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        changed = _carded(folder, str(record.get("license", "")))
        files = sorted({CARD_FILE, *(name for name in files_of(record) if (folder / name).is_file())})
        tell(f"uploading {formats.count(len(files), 'file')} to {repository}")
        done = api.create_commit(
            repository,
            [CommitOperationAdd(name, changed.get(name, str(folder / name))) for name in files],
            commit_message=f"Add {record['expert_id']}",
            revision=revision or None,
        )
    return Pushed(str(made), str(done.oid), files)


def pull(repository: str, out: Path, *, revision: str = "", library: Holdings | None = None) -> list[str]:
    """Download an expert or a model to the new folder `out` and verify it; returns what was checked.

    Only what its record names is taken, in the sizes that the record says. Interrupted, the same call goes on. Raises
    `VerificationFailed`, with the folder left for a look, `NotFound`, `Retry`.
    """
    begun = (out / ".cache" / "huggingface").is_dir()
    if not begun:
        require_new(out)
    with _hub():
        from huggingface_hub import HfApi, hf_hub_download, snapshot_download

        found = HfApi().model_info(repository, revision=revision or None, files_metadata=True)
        sizes = {file.rfilename: file.size for file in found.siblings or ()}
        if RECORD_FILE not in sizes:
            raise NotFound(f"{repository} holds no {RECORD_FILE}, so no expert of a library: `library push` makes one")
        _take(repository, RECORD_FILE, sizes, _LARGEST_BESIDE)
        path = Path(hf_hub_download(repository, RECORD_FILE, revision=found.sha, local_dir=out))
        record = read_record(path.read_bytes(), f"{RECORD_FILE} of {repository}")
        wanted = sorted(files_of(record) & sizes.keys())
        for name in wanted:
            _take(repository, name, sizes, _stated(record, name))
        exactly = [glob.escape(name) for name in wanted]
        snapshot_download(repository, revision=found.sha, local_dir=out, allow_patterns=exactly)
    shutil.rmtree(out / ".cache", ignore_errors=True)
    left = sorted(sizes.keys() - {*wanted, ".gitattributes"})
    beside = f"not taken, as its record does not name it: {', '.join(map(repr, left[:5]))}"
    return [*verify(out, library=library), *([beside + (" and others" if left[5:] else "")] if left else [])]


def _take(repository: str, name: str, sizes: Mapping[str, int | None], most: int) -> None:
    """Raise `VerificationFailed` for a file that no export has: one that can hold a program, or is larger than it should be."""
    if Path(name).suffix not in _SAFE:
        what = f"{name} of {repository} may hold a program, and no export has such a file"
        raise VerificationFailed(f"{what}: nothing of it was taken; ask who published it for an export of `connito`")
    if (size := sizes[name]) is not None and size > most:
        what = f"{name} of {repository} has {formats.size(size)}, where {formats.size(most)} are the most that its record allows"
        raise VerificationFailed(f"{what}: nothing of it was taken; ask who published it to push it again")


def _stated(record: ExpertRecord, name: str) -> int:
    """Return how many bytes a file may have: those of its record where that says so."""
    if name == EXPERT_FILE:
        return record["expert"]["bytes"]
    return record["files"][name]["bytes"] if name in record.get("files", {}) else _LARGEST_BESIDE


def _folder(target: str | Path, library: Holdings) -> Expert:
    folder = Path(target)
    if folder.is_dir() and (folder / RECORD_FILE).is_file():
        return folder, read_record((folder / RECORD_FILE).read_bytes(), folder / RECORD_FILE)
    return library.find(str(target))


def _carded(folder: Path, licence: str) -> dict[str, bytes]:
    """Return card, and the record that names its digest, in the hub's schema."""
    from huggingface_hub import ModelCard

    record = read_record((folder / RECORD_FILE).read_bytes(), folder / RECORD_FILE)
    written = folder / CARD_FILE
    card = ModelCard(written.read_text() if written.is_file() else render(record), ignore_metadata_errors=True)
    said: Any = card.data
    base = said.base_model
    if isinstance(base, str) and not _HUB_ID.fullmatch(base):
        # The hub takes a repository here, and nothing else.
        said.base_model = None
        said.pop("base_model_relation", None)
        said.tags = [*(said.tags or []), f"base:{base}"]
    if said.license == "other":
        said.license_name = licence.lower() or "not-stated"
    if not (folder / EXPERT_FILE).is_file():
        said.library_name = "transformers" if (folder / MODEL_FILE).is_file() else "gguf"
    text = str(card).encode()
    if CARD_FILE not in record.get("files", {}):
        return {CARD_FILE: text}
    record["files"][CARD_FILE] = {"digest": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
    return {CARD_FILE: text, RECORD_FILE: encode(record)}


@contextmanager
def _hub() -> Iterator[None]:
    """Say what the hub refuses in one sentence."""
    with extras_named():
        from huggingface_hub import errors
    import httpx2

    try:
        yield
    # A file that is not here because nobody answered is an EntryNotFoundError too.
    except errors.LocalEntryNotFoundError as error:
        raise _silent(error) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.EntryNotFoundError) as error:
        raise NotFound(
            f"the hub has no such repository or revision, or HF_TOKEN may not see it: {_line(error)}"
        ) from error
    except errors.HFValidationError as error:
        raise Invalid(f"this is no name of a repository: {_line(error)}") from error
    # The library raises RuntimeError where a large file could not be sent.
    except (errors.HfHubHTTPError, httpx2.HTTPError, OSError, RuntimeError) as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status in (401, 403):
            raise Invalid(f"the hub refused: {_line(error)}; set HF_TOKEN to a token that may write there") from error
        raise _silent(error) from error


def _silent(error: BaseException) -> Retry:
    return Retry(f"the hub does not answer as it should: {_line(error)}; try again, what is done already is kept")


def _line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300].rstrip(
        "."
    )
