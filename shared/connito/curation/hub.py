"""`connito.library`: push an expert or an exported model to a Hugging Face repository, and pull one from there.

HF_ENDPOINT and HF_TOKEN are honoured, as everywhere in `huggingface_hub`. What was uploaded before an interruption is not
uploaded again.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from connito.curation.exchange import verify
from connito.curation.holdings import Agreement, Expert, Holdings
from connito.errors import Invalid, NotFound, Retry
from connito.library.artifact import CARD_FILE, EXPERT_FILE, MODEL_FILE, RECORD_FILE, require_new
from connito.library.card import render
from connito.library.governance import governance
from connito.library.record import encode
from connito.library.schema import read_record
from connito.render import formats
from connito.runtime.extras import extras_named
from connito.runtime.progress import tell

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    private: bool = False,
    agreement: Agreement | None = None,
    library: Holdings | None = None,
) -> Pushed:
    """Upload an expert (id or folder) or an exported model to the repository, which is made if it is not there: a private one
    for what is not public.

    The licence has to allow passing it on; the card is written in the hub's schema. Raises `Invalid`, `NotFound`, `Retry`.
    """
    library = library or Holdings()
    folder, record = _folder(target, library)
    verify(folder, library=library)
    agreed = replace(agreement or Agreement(), redistribute=True)
    library.permit([(folder, record)], "export", agreed)
    with _hub():
        from huggingface_hub import CommitOperationAdd, HfApi

        api = HfApi()
        shown = governance(record)["visibility"]
        made = api.create_repo(repository, private=private or shown != "public", exist_ok=True)
        if shown != "public" and not api.model_info(repository).private:
            what = f"{record['expert_id']} is not public, and {repository} is"
            raise Invalid(f"{what}: make the repository private, or push to another")
        if revision:
            api.create_branch(repository, branch=revision, exist_ok=True)
        changed = _carded(folder, str(record.get("license", "")))
        files = sorted({CARD_FILE, *(path.name for path in folder.iterdir() if path.is_file())})
        tell(f"uploading {formats.count(len(files), 'file')} to {repository}")
        done = api.create_commit(
            repository,
            [CommitOperationAdd(name, changed.get(name, str(folder / name))) for name in files],
            commit_message=f"Add {record['expert_id']}",
            revision=revision or None,
        )
    return Pushed(str(made), str(done.oid), files)


def pull(repository: str, out: Path, *, revision: str = "", library: Holdings | None = None) -> list[str]:
    """Download a repository to the new folder `out` and verify it; returns what was checked.

    Interrupted, the same call goes on. Raises `VerificationFailed`, with the folder left for a look, `NotFound`, `Retry`.
    """
    begun = (out / ".cache" / "huggingface").is_dir()
    if not begun:
        require_new(out)
    with _hub():
        from huggingface_hub import snapshot_download

        snapshot_download(repository, revision=revision or None, local_dir=out)
    shutil.rmtree(out / ".cache", ignore_errors=True)
    # Every repository is given one by the hub.
    (out / ".gitattributes").unlink(missing_ok=True)
    return verify(out, library=library)


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
