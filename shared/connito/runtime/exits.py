"""End a program with a sentence and an exit code that say what was wrong."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from connito.errors import ConnitoError, Invalid
from connito.runtime.extras import sentence

_REMEDIES = {
    errno.ENOSPC: "free space on its disk",
    errno.EDQUOT: "free space within the quota",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "give this user the right to it, or become the user that it belongs to",
    errno.EMFILE: "allow more open files (`ulimit -n 4096`)",
    errno.ENFILE: "close other programs: the whole machine has no file handles left",
    errno.EAGAIN: "allow more processes and threads (`ulimit -u`)",
    errno.ENOMEM: "close other programs, or choose a smaller base",
    errno.EIO: "look at the disk's health",
}


@contextmanager
def explained() -> Iterator[None]:
    """Turn our errors, and files that the system withholds, into a message on stderr and the exit code that belongs to them;
    others keep their traceback."""
    try:
        yield
    except ConnitoError as error:
        print(f"connito: {error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from error
    except ModuleNotFoundError as error:
        if not (said := sentence(error)):
            raise
        print(f"connito: {said}", file=sys.stderr)
        raise SystemExit(Invalid.exit_code) from error
    except BrokenPipeError as error:
        raise SystemExit(0) from error
    except SystemExit as ended:
        # What parses the command line ends with 1 there: the reader of our output has left, as `head` does.
        if isinstance(ended.__context__, BrokenPipeError):
            raise SystemExit(0) from ended
        raise
    except OSError as error:
        # About this machine, by the file's name (rights, a full disk) or by the kind; else it is a fault of ours.
        if error.filename is None and error.errno not in _REMEDIES:
            raise
        where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
        remedy = _REMEDIES.get(error.errno or 0, "check its rights and its disk")
        print(f"connito: {where}{error.strerror}; {remedy}, then try again", file=sys.stderr)
        raise SystemExit(5) from error
    except MemoryError as error:
        print(f"connito: not enough memory; {_REMEDIES[errno.ENOMEM]}, then try again", file=sys.stderr)
        raise SystemExit(5) from error
    except RuntimeError as error:
        if "can't start new thread" not in str(error):
            raise
        print(f"connito: {error}; {_REMEDIES[errno.EAGAIN]}, then try again", file=sys.stderr)
        raise SystemExit(5) from error
    except KeyboardInterrupt as error:
        print("connito: interrupted", file=sys.stderr)
        raise SystemExit(130) from error
