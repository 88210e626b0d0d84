"""One package for each service."""

from __future__ import annotations

import os

# A merge, and whoever repeats it, reads and multiplies files side by side. Were each product spread over all cores once more, its
# threads would wait for each other for most of their time. The library looks at this when numpy is loaded.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
