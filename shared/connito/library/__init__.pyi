"""Types of the verbs of `connito.library`, which `__init__.py` imports when they are first used."""

from connito.curation.catalogue import SearchOptions, ledger, mark, search, show
from connito.curation.catalogue import list_ as list  # noqa: A004 - the verb's name
from connito.curation.composing import (
    ComposeOptions,
    RouteOptions,
    UpgradeOptions,
    cluster,
    compose,
    remove,
    route,
    upgrade,
)
from connito.curation.evaluating import EvaluateOptions, evaluate
from connito.curation.exchange import export, verify
from connito.curation.growing import BranchOptions, GrowOptions, branches, grow, join
from connito.curation.holdings import Agreement, Holdings
from connito.curation.hub import pull, push
from connito.curation.joining import Deposited, deposit
from connito.curation.need import demand
from connito.curation.shrinking import ExtractOptions, PruneOptions, ShrinkSource, extract, prune, skip, steer

__all__ = [
    "Agreement", "BranchOptions", "ComposeOptions", "Deposited", "EvaluateOptions", "ExtractOptions", "GrowOptions", "Holdings",
    "PruneOptions", "RouteOptions",
    "SearchOptions", "ShrinkSource", "UpgradeOptions", "branches", "cluster", "compose", "demand", "deposit",
    "evaluate", "export", "extract", "grow", "join", "ledger", "list", "mark", "prune", "pull", "push",
    "remove", "route", "search", "show", "skip", "steer", "upgrade", "verify",
]  # fmt: skip
