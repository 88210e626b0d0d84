"""Reach an installation: its data directory or address, its keys, its broker and its store."""
