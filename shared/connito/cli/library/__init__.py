"""`connito library`: the experts that runs left behind. Each module holds a group of verbs; all of them print only."""

from __future__ import annotations

from connito.cli.library import compose, export, grow, shelf, shrink
from connito.cli.library.browse import app
from connito.cli.output import told

for _verb in (
    shelf.deposit, shelf.mark, shelf.ledger, export.verify, export.export, export.push, export.pull,
    compose.compose, compose.remove, compose.upgrade, compose.cluster, compose.route,
    grow.grow, grow.join, grow.branches, shrink.prune, shrink.extract, shrink.skip, shrink.steer,
):  # fmt: skip
    app.command(_verb.__name__)(told(_verb))

__all__ = ["app"]
