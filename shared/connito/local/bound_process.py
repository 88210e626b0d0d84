"""`python -m connito.local.bound_process PARENT MODULE [ARGUMENT…]`: run a module in a process that ends with process PARENT."""

from __future__ import annotations

import sys

from connito.local.fork_server import die_with_parent, run_module

if __name__ == "__main__":
    die_with_parent(int(sys.argv[1]))
    sys.argv = sys.argv[2:]
    raise SystemExit(run_module(sys.argv[0]))
