"""The Python side of the command line: `Client`, whose verbs are those of `connito job`, `connito library` and others."""

from __future__ import annotations

from connito.client.client import Client

__all__ = ["Client"]
