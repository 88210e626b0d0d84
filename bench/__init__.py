"""Published figures: one runnable file each, `python -m bench.<name> [--quick] [--seeds N] [--json]`."""
