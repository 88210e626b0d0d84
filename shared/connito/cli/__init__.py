"""The command line. Each verb's file imports what it needs when it runs, so that `connito --help` stays instant."""

from __future__ import annotations


def main() -> None:
    """Run the `connito` program. Exit codes: 0 done, 2 usage, 3 invalid input, 4 not found, 5 unavailable,
    6 verification failed (in an audit: the operator is to blame; 7 validators, 8 miners), 1 anything else."""
    import os
    import sys

    from connito.cli.app import app
    from connito.runtime.exits import explained
    from connito.runtime.printing import print_anything
    from connito.runtime.variables import unknown

    print_anything()
    for sentence in unknown(os.environ):
        print(f"connito: warning: {sentence}", file=sys.stderr)
    with explained():
        app()
