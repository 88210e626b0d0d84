"""`python -m connito.cli`."""

from __future__ import annotations

from connito.cli import main

if __name__ == "__main__":
    main()
