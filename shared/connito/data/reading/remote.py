"""Files behind an address: hf://, https://, s3:// and what else fsspec knows. Read here, with the reader's own credentials."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO, cast

from connito.data.reading.datasets import choose
from connito.data.reading.rows import Account, Place, Wanted, unreadable
from connito.errors import ConnitoError, NotFound, Retry

# What gives access, by protocol: said where access is refused.
_ACCESS = {
    "s3": "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE (AWS_ENDPOINT_URL for another server)",
    "hf": "log in with `hf auth login`, or set HF_TOKEN, and accept the data set's terms on its page",
}
_WHOLE = {"s3": "write s3://BUCKET/FOLDER", "hf": "write hf://datasets/OWNER/NAME"}
_NEEDS = "reading addresses takes what pip install 'connito[data]' brings"


def find_remote(location: str, wanted: Wanted, account: Account) -> list[Place]:
    """Return the files behind an address: a file, a folder or a glob. Raises `NotFound`, `Invalid`, or `Retry` when the
    server cannot be reached."""
    scheme, _, name = location.partition("://")
    if not name.strip("/ ") or (scheme == "hf" and name.strip("/ ") == "datasets"):
        raise unreadable(f"{location} names nothing: {_WHOLE.get(scheme, f'write {scheme}://HOST/PATH')}")
    with _sentences(location):
        import fsspec

        # Access may have changed since an earlier reading.
        system, path = fsspec.core.url_to_fs(location, skip_instance_cache=True)

        def place(name: str, chosen: bool = False) -> Place:
            return Place(system.unstrip_protocol(name), lambda: _open(system, name, location), chosen)

        if scheme in ("http", "https"):
            return [Place(location, lambda: _open(system, path, location), chosen=True)]
        if any(mark in path for mark in "*?[") and not system.exists(path):
            names = sorted(name for name in system.glob(path) if not system.isdir(name))
            if not names:
                raise NotFound(f"nothing matches {location}; check the address")
            return [place(name) for name in names]
        if system.isfile(path):
            return [place(path, chosen=True)]
        found = {str(PurePosixPath(name).relative_to(path)): name for name in system.find(path)}
        if not found:
            raise NotFound(f"there is nothing at {location}; check the address")
        read = choose(
            found,
            lambda name: cast(bytes, system.cat_file(found[name])),
            location,
            account,
            wanted.config,
            wanted.split,
        )
        return [place(found[name]) for name in read]


def _open(system: Any, path: str, location: str) -> BinaryIO:
    with _sentences(location):
        return cast(BinaryIO, _Spoken(system.open(path, "rb"), location))


class _Spoken:
    """A file whose errors while reading are sentences."""

    def __init__(self, file: Any, location: str) -> None:
        self._file, self._location = file, location

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes."""
        with _sentences(self._location):
            return cast(bytes, self._file.read(size))

    def seekable(self) -> bool:
        """Return whether the server gives parts of the file."""
        return bool(getattr(self._file, "size", None)) and bool(self._file.seekable())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __enter__(self) -> _Spoken:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


@contextmanager
def _sentences(location: str) -> Iterator[None]:
    """Turn what fsspec and its implementations raise into one sentence. Their errors have no class in common."""
    try:
        yield
    except ConnitoError:
        raise
    except ImportError as error:
        raise unreadable(f"{location}: {_NEEDS} ({error})") from error
    except Exception as error:
        raise _verdict(location, error) from error


def _verdict(location: str, error: Exception) -> ConnitoError:
    chain = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None and isinstance(earlier, Exception):
        chain.append(earlier)
    scheme = location.partition("://")[0]
    said = (str(chain[-1]) or str(error) or type(error).__name__).splitlines()[0][:200]
    statuses = [code for each in chain if isinstance(code := _status(each), int)]
    refused = any(isinstance(each, PermissionError) or type(each).__name__ == "NoCredentialsError" for each in chain)
    if refused or {401, 403} & set(statuses):
        return unreadable(f"{location} may not be read ({said}); {_ACCESS.get(scheme, 'check your access to it')}")
    unanswered = any(isinstance(each, (ConnectionError, TimeoutError)) for each in chain)
    if {404, 410} & set(statuses) or (isinstance(error, FileNotFoundError) and not statuses and not unanswered):
        access = ", and your access" if scheme == "hf" else ""
        return NotFound(f"there is nothing at {location} ({said}); check the address{access}")
    if isinstance(error, ValueError) and "protocol" in said.lower():
        return unreadable(f"{location}: {said}; use hf://, https:// or s3://")
    return Retry(f"{location} cannot be reached: {said}; try again, or copy the files here")


def _status(error: Exception) -> object:
    """Return the status of an answer that an error carries, in whichever of its ways."""
    return getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
