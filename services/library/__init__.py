"""The library: deposits what a finished run made, and serves what has been deposited."""
