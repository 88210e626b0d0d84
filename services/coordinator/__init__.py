"""The coordinator opens and closes windows, draws the seed of each cycle, and ends runs."""
