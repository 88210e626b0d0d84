"""The command line. Each verb's file imports what it needs when it runs, so that `connito --help` stays instant."""

from __future__ import annotations

import os

# As for services; whoever imports the library from Python has numpy as they like it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")


def main() -> None:
    """Run the `connito` program. Exit codes: 0 done, 2 usage, 3 invalid input, 4 not found, 5 unavailable,
    6 verification failed (in an audit: the operator is to blame; 7 validators, 8 miners), 1 anything else."""
    import sys

    from connito.cli.app import app
    from connito.runtime.exits import explained
    from connito.runtime.printing import print_anything
    from connito.runtime.variables import unknown

    _with_utf8()
    print_anything()
    for sentence in unknown(os.environ):
        print(f"connito: warning: {sentence}", file=sys.stderr)
    with explained():
        app()


def _with_utf8() -> None:
    """Start again with files and their names in UTF-8 where the locale says otherwise; what is printed stays in its encoding."""
    import locale
    import sys

    if locale.getpreferredencoding(do_setlocale=False).lower().replace("-", "") == "utf8":
        return
    if os.environ.get("PYTHONUTF8") == "1":
        return  # Options of the interpreter say otherwise: what was started again would start again for ever.
    os.environ.update(PYTHONUTF8="1", PYTHONIOENCODING=f"{sys.stdout.encoding}:backslashreplace")
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])  # noqa: S606 - this very program
