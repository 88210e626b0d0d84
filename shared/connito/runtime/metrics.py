"""The catalogue of every metric: name, meaning, and what to do when it is bad. Nothing is measured outside of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

from prometheus_client import Counter, Gauge, Histogram

K = TypeVar("K", Counter, Gauge, Histogram)

SECONDS = (0.001, 0.005, 0.01, 0.05, 0.1, 0.5, 1, 2, 5, 10, 30, 60, 300, 900)


@dataclass(frozen=True)
class Metric:
    """One line of the catalogue."""

    name: str
    kind: str
    help: str
    labels: tuple[str, ...]
    when_bad: str


CATALOGUE: dict[str, Metric] = {}


def declare(kind: type[K], name: str, help_: str, labels: tuple[str, ...] = (), *, when_bad: str) -> K:
    """Register `connito_<name>`. `when_bad` tells the operator what a bad value means and what to do."""
    full = f"connito_{name}"
    assert full not in CATALOGUE, f"{full} is declared twice"
    CATALOGUE[full] = Metric(full, kind.__name__.lower(), help_, labels, when_bad)
    options: dict[str, Any] = {"buckets": SECONDS} if kind is Histogram else {}
    return kind(full, help_, labels, **options)


# The bus.
BUS_CONNECTED = declare(
    Gauge, "bus_connected", "1 while the broker connection stands", when_bad="0: check the broker and the network to it"
)
BUS_RECONNECTS = declare(
    Counter,
    "bus_reconnects_total",
    "Connections that were re-established",
    when_bad="rising: the broker restarts, stalls, or the network drops; see its log",
)
EVENTS_PUBLISHED = declare(
    Counter,
    "events_published_total",
    "Messages written to the log",
    ("kind", "outcome"),
    when_bad="outcome=retry rising: the broker does not acknowledge; outcome=denied: the key lacks a permission",
)
PUBLISH_SECONDS = declare(
    Histogram,
    "publish_seconds",
    "From publish to the broker's acknowledgement",
    when_bad="above 0.1 s: the broker's disk is slow; every acknowledged message is synced",
)
EVENTS_RECEIVED = declare(
    Counter,
    "events_received_total",
    "Messages read from the log",
    ("stream",),
    when_bad="flat while the stream grows: the follower is stuck; restart the service and report it",
)
EVENT_LAG_SECONDS = declare(
    Gauge,
    "event_lag_seconds",
    "Age of the last live message when it was read",
    ("stream",),
    when_bad="above a few seconds: the process is starved of CPU, or clocks differ",
)
EVENTS_REJECTED = declare(
    Counter,
    "events_rejected_total",
    "Messages that failed verification and were ignored",
    ("reason",),
    when_bad="any: someone writes what they may not; see `security` lines in the log for the signer",
)
SECURITY_EVENTS = declare(
    Counter,
    "security_events_total",
    "Things that only happen under attack or misconfiguration",
    ("kind",),
    when_bad="any: read the `security` lines in the log",
)
MESSAGES_HANDLED = declare(
    Counter,
    "messages_handled_total",
    "Messages of work queues, by outcome",
    ("durable", "outcome"),
    when_bad="outcome=retry rising: a dependency is away; outcome=dead_letter: `connito dlq ls`",
)
HANDLER_SECONDS = declare(
    Histogram,
    "handler_seconds",
    "Time to handle one message of a work queue",
    ("durable",),
    when_bad="above the expectation for the service: look at its dependency metrics",
)

# Deciding and acting.
DECIDE_SECONDS = declare(
    Histogram,
    "decide_seconds",
    "Time of one decision over a run's facts",
    when_bad="above 0.1 s: the run has grown too large for one process; end it and start a new one",
)
ACTIONS = declare(
    Counter,
    "actions_total",
    "Actions performed, by outcome",
    ("action", "outcome"),
    when_bad="outcome=retry rising: a dependency is away; outcome=invalid: the log line says which input is wrong",
)
ACTIONS_RUNNING = declare(
    Gauge,
    "actions_running",
    "Actions that are being performed now",
    when_bad="stuck above 0: an action hangs; its name is in the last `action started` line",
)
LEADER = declare(
    Gauge,
    "leader",
    "1 while this replica holds the lease",
    ("lease",),
    when_bad="sum over replicas 0 for longer than the lease: no replica can reach the broker",
)
LEASE_LOST = declare(
    Counter,
    "lease_lost_total",
    "Leases lost while held",
    ("lease",),
    when_bad="rising: the process stalls for longer than the lease, or the broker does",
)

# The store.
STORE_SECONDS = declare(
    Histogram,
    "store_seconds",
    "Time of one store operation",
    ("operation",),
    when_bad="rising: the store is slow or far; compare with its own metrics",
)
STORE_BYTES = declare(
    Counter,
    "store_bytes_total",
    "Bytes moved to and from the store",
    ("direction",),
    when_bad="more than a few times the model per cycle: the cache is lost between starts; check CONNITO_CACHE_DIR",
)
STORE_ERRORS = declare(
    Counter,
    "store_errors_total",
    "Store operations that failed",
    ("operation", "error"),
    when_bad="error=Retry: the store is away; error=VerificationFailed: it returned wrong bytes, take it out of use",
)
CACHE = declare(
    Counter,
    "cache_total",
    "Lookups in the local artifact cache",
    ("outcome",),
    when_bad="outcome=corrupt: the disk under CONNITO_CACHE_DIR changes files; replace it",
)
UPLOAD_BYTES = declare(
    Counter,
    "upload_bytes_total",
    "Bytes of submissions uploaded",
    when_bad="far above the size of the target experts: the wrong tensors are exported",
)

# The cycle.
WINDOW_SECONDS = declare(
    Histogram,
    "window_seconds",
    "Length of a closed window",
    ("window", "cause"),
    when_bad="cause=deadline often: someone expected does not act; `connito status` names them",
)
SUBMISSIONS = declare(
    Counter,
    "submissions_total",
    "Submissions by outcome",
    ("outcome", "reason"),
    when_bad="outcome=refused rising: see the reason; copies and norm-exceeded point at attackers",
)
REFUSALS = declare(
    Counter,
    "refusals_total",
    "Commitments, reveals and uploads refused",
    ("reason",),
    when_bad="late-reveal often: miners' uplinks are slower than the submit window",
)
TRAIN_STEP_SECONDS = declare(
    Histogram,
    "train_step_seconds",
    "Time of one local training step",
    when_bad="many times the usual: the machine is oversubscribed; check the compute budget",
)
TRAIN_TOKENS = declare(
    Counter, "train_tokens_total", "Tokens trained on", when_bad="flat in an open train window: the trainer is stuck"
)
TRAIN_EVALUATION_LOSS = declare(
    Gauge,
    "train_evaluation_loss",
    "Loss in nats per token of the text that a miner holds back from its training",
    when_bad="rising while the training loss falls: the miner overfits; fewer local steps, or more text",
)
SCORE_SECONDS = declare(
    Histogram,
    "score_seconds",
    "Time to score one submission",
    when_bad="times submissions above the validate window: add validators or shorten the held-out draw",
)
GATE_DECISIONS = declare(
    Counter,
    "gate_decisions_total",
    "What the gate decided about the merged version",
    ("decision",),
    when_bad="kept_incumbent most of the time: see connito_kept_incumbent_cycles, which names the run",
)
TARGET_LOSS = declare(
    Gauge,
    "target_loss",
    "Held-out loss of the current version on the target domain, nats per token",
    ("run",),
    when_bad="rising over many cycles: the gate allows a margin above the lowest, on its own text; audit the run",
)
GENERAL_LOSS = declare(
    Gauge,
    "general_loss",
    "Mean held-out loss on the general domains, nats per token",
    ("run",),
    when_bad="rising: the model forgets; lower scoring.retention_margin or the learning rate",
)
SELECTION_SECONDS = declare(
    Histogram,
    "selection_seconds",
    "Time to select a run's experts",
    when_bad="minutes: the probe corpus is larger than it needs to be",
)
EXPERTS_DEPOSITED = declare(
    Counter,
    "experts_deposited_total",
    "Experts deposited in the library",
    when_bad="flat while runs complete: look at the library's log and at `connito dlq ls`",
)
COMPUTE_WAIT_SECONDS = declare(
    Histogram,
    "compute_wait_seconds",
    "Time waited for a slot of the machine's compute budget",
    ("purpose",),
    when_bad="above the time of the work itself: the machine runs more services than it has cores for",
)

# What alerts look at: the state of the platform now, not what it did.
WINDOW_OPENED = declare(
    Gauge,
    "window_opened_timestamp_seconds",
    "When the oldest window that is open now was opened; 0 with none",
    ("window",),
    when_bad="long ago for its window: `connito status` names who has not acted",
)
WINDOW_DEADLINE = declare(
    Gauge,
    "window_deadline_timestamp_seconds",
    "When the oldest open window must be closed; 0 with none or no deadline",
    ("window",),
    when_bad="in the past: the coordinator does not close what is due; look for its leader and its log",
)
WAITING = declare(
    Gauge,
    "waiting",
    "Actions and messages that wait for something here and now, by what it is and for which run",
    ("dependency", "run"),
    when_bad="above 0 for minutes: mend what `dependency` names, the log and `connito status` say what is wrong; nothing has "
    "to be restarted: what fails by itself (`repair`) is tried again every ten minutes, or at once when its service is restarted",
)
RUN_PAUSED = declare(
    Gauge,
    "run_paused",
    "1 while a run waits for more miners or validators than are there, or a window for anybody",
    ("run",),
    when_bad="1: `connito status` says which it is; start or admit more, look why those who are there are not heard, or cancel "
    "the run",
)
UNAUDITED_CYCLES = declare(
    Gauge,
    "unaudited_cycles",
    "Cycles of a run whose signed head no validator has cosigned yet; one cosignature stands for all before it",
    ("run",),
    when_bad="above 1: validators do not read the log, or object to it; `connito audit RUN` says whether it is right",
)
KEPT_INCUMBENT_CYCLES = declare(
    Gauge,
    "kept_incumbent_cycles",
    "Merged versions of a run in a row that the gate refused, up to the newest",
    ("run",),
    when_bad="3 or more: nothing improves any more, or what is merged is hostile; end the run or look at the data",
)
CONSUMER_PENDING = declare(
    Gauge,
    "consumer_pending_messages",
    "Messages that wait in a work queue, seen at the last fetch",
    ("durable",),
    when_bad="growing: the service cannot keep up or retries without success; scale it out or see its dependencies",
)
VALIDATOR_DISAGREEMENT = declare(
    Gauge,
    "validator_disagreement_ratio",
    "Largest distance of a validator from consensus in the last merge, relative to the best agreed utility",
    when_bad="above 0.3: a validator lies, or scores another model; `connito explain` names whose receipt differs",
)
VALIDATOR_TRUST = declare(
    Gauge,
    "validator_trust_ratio",
    "Moving average of a validator's agreement with consensus after the last merge, 0 to 1",
    ("run", "validator"),
    when_bad="falling: the validator deviates or leaves duties; `merge.scored` names the reason, `connito explain` shows it",
)
CERTIFICATE_EXPIRY = declare(
    Gauge,
    "certificate_expiry_timestamp_seconds",
    "End of validity of a TLS certificate that this process was shown",
    ("endpoint",),
    when_bad="less than two weeks ahead: renew the certificate of that endpoint",
)
# Serving (`connito serve`).
SERVE_REQUESTS = declare(
    Counter,
    "serve_requests_total",
    "Requests to the server, by HTTP status",
    ("status",),
    when_bad="5xx rising: see its log; 429: too many wait, start another replica; 403: an expert was yanked",
)
SERVE_TOKENS = declare(
    Counter,
    "serve_tokens_total",
    "Tokens of prompts read and of answers written",
    ("kind",),
    when_bad="flat while requests come: the model's thread stands; /healthz says so, restart the server",
)
SERVE_FIRST_TOKEN = declare(
    Histogram,
    "serve_first_token_seconds",
    "From a request to the first token of its answer",
    when_bad="rising: requests wait for a place in the batch or for cache; start another replica",
)
SERVE_LOADED = declare(
    Gauge,
    "serve_loaded_experts",
    "Experts and compositions that are in memory beside the base",
    when_bad="at the limit (--experts) while requests are refused with 503: raise it",
)
SERVE_ROW_BYTES = declare(
    Gauge,
    "serve_row_bytes",
    "Memory that their rows take",
    when_bad="near the machine's memory: lower --experts",
)

# A counter with labels has no series before it is first counted, and nothing rises from nothing to one: what alerts look at
# is there from the start. Whatever else is counted under other labels, they catch by its appearance.
for _operation in ("fetch", "get", "list", "put", "range", "remove", "stat"):
    for _error in ("Retry", "ObjectMissing", "ObjectDamaged", "VerificationFailed"):
        STORE_ERRORS.labels(_operation, _error)
for _kind in (
    "bad_signature",
    "not_permitted",
    "banned_key",
    "quota",
    "malformed",
    "denied",
    "certificate",
    "unreported",
):
    SECURITY_EVENTS.labels(_kind)
for _durable in ("committer", "selector", "library"):
    for _outcome in ("ok", "retry", "dead_letter"):
        MESSAGES_HANDLED.labels(_durable, _outcome)
for _outcome in ("hit", "miss", "corrupt", "evicted"):
    CACHE.labels(_outcome)
for _outcome in ("accepted", "refused"):
    SUBMISSIONS.labels(_outcome, "")
for _lease in ("coordinator", "aggregator", "committer"):
    LEASE_LOST.labels(_lease)
