"""End a program with a sentence and an exit code that say what was wrong."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from connito.errors import ConnitoError


@contextmanager
def explained() -> Iterator[None]:
    """Turn our errors, and files that the system withholds, into a message on stderr and the exit code that belongs to them;
    others keep their traceback."""
    try:
        yield
    except ConnitoError as error:
        print(f"connito: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except BrokenPipeError as error:
        raise SystemExit(0) from error
    except OSError as error:
        # With a file's name it is about this machine (rights, a full disk); without one it is a fault of ours.
        if error.filename is None:
            raise
        print(
            f"connito: {error.filename}: {error.strerror}; check its rights and its disk, then try again",
            file=sys.stderr,
        )
        raise SystemExit(5) from error
    except KeyboardInterrupt as error:
        print("connito: interrupted", file=sys.stderr)
        raise SystemExit(130) from error
