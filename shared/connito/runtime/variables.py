"""Names of the `CONNITO_…` variables that anything here reads, so that a misspelt one is told instead of ignored."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

PREFIX = "CONNITO_"

# What services read; tests hold it to their settings.
_SETTINGS = """
ADMISSION ADMISSION_BUS ATTENTION BATCH_TOKENS BF16 BF16_PARAMETERS CACHE_DIR CACHE_MAX_BYTES CHECKPOINTING COMPILE
COMPUTE_DIR COMPUTE_SLOTS CONSOLE_HOST CONSOLE_OIDC_CLIENT CONSOLE_OIDC_SCOPES CONSOLE_OIDC_SECRET CONSOLE_PORT
CONSOLE_PROXIES CONSOLE_PUBLIC_LEADERBOARD CONSOLE_SECURE_COOKIE CONSOLE_SERVE_KEY CONSOLE_SERVE_URL CONSOLE_TOKEN
CONSOLE_URL CONSOLE_USER_HEADER DEVICE
DRAIN_SECONDS EVALUATION_SHARE EXAMINE_SLOTS EXPERTS GRPC_ADVERTISE GRPC_HOST GRPC_PORT GRPC_TLS HIDDEN_CACHE_BYTES
HTTP_HOST HTTP_PORT INDEX_PATH INVITE KEY_FILE LABEL LEASE_SECONDS LENT LOG_FORMAT LOG_LEVEL LOSSES_DIR MEMORY_BYTES
MICRO_BATCH NATS_URL OFFLOAD_PREFIX OIDC_AUDIENCE OIDC_CLAIM OIDC_ISSUER OPTIMIZER PATIENCE PRESIGN_SECONDS
REQUESTS_BURST REQUESTS_PER_SECOND RESIDENCY ROSTER RUN S3_ACCESS_KEY S3_BUCKET S3_CREDENTIALS S3_ENDPOINT
S3_PUBLIC_ENDPOINT S3_REGION S3_SECRET_KEY S3_STS_ENDPOINT S3_TOKEN_FILE STATE_DIR TLS_CA TLS_CERT TLS_KEY TOP_K
TORCH_THREADS TRAINER_ADVERSARY TRAINER_SECOND_VICTIM_DIR TRAINER_VICTIM_DIR WORK_DIR
"""
# What commands, Compose files, scripts and tests read.
_ELSEWHERE = """
BIND DATA_DIR FOR_VERSION IMAGE IMAGES_DIR IMAGE_CUDA MINER_KEY PACKAGE PORT_FILE PUBLIC_HOST ROSTER_FILE SCREENSHOTS SECRETS
SERVE_BASE SERVE_BATCH_TOKENS SERVE_CACHE_TOKENS SERVE_DIR SERVE_EXPERTS SERVE_HOST SERVE_KEYS SERVE_NAME SERVE_PORT
SERVE_REQUESTS SERVE_WAITING SHELF TAG TEST_DATA TORCH
"""
SETTINGS = frozenset(PREFIX + name for name in _SETTINGS.split())
KNOWN = SETTINGS | {PREFIX + name for name in _ELSEWHERE.split()}
# Kubernetes and Docker describe a Service called `connito…` to every pod beside it in variables of these forms.
_LINK = re.compile(r"_(SERVICE_HOST|SERVICE_PORT(_\w+)?|PORT_\d+_(TCP|UDP|SCTP)(_\w+)?)")


def is_older(version: str, environment: Mapping[str, str]) -> bool:
    """Return whether `environment` was written for a version after this one, whose variables this one need not know."""
    written_for = environment.get(f"{PREFIX}FOR_VERSION", "")
    return all(re.fullmatch(r"\d+(\.\d+)*", one) for one in (version, written_for)) and (
        [int(part) for part in version.split(".")] < [int(part) for part in written_for.split(".")]
    )


def unknown(environment: Mapping[str, str], own: Iterable[str] = ()) -> Iterator[str]:
    """Yield a sentence about each `CONNITO_…` variable that has a value and that nothing reads; `own` are read all the same."""
    known = KNOWN.union(own)
    for name, value in sorted(environment.items()):
        if not name.startswith(PREFIX) or name in known or not value:
            continue
        if _LINK.search(name) or re.match(r"(tcp|udp|sctp)://", value):
            continue
        from difflib import get_close_matches

        near = get_close_matches(name, sorted(known), 1, 0.75)
        yield f"nothing reads {name}" + (f"; the nearest name is {near[0]}" if near else "; take it out")
