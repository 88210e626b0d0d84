"""Replace the pods of validators, and of trainers, one after the other, each when the one before is ready again.

Runs as a Job of the chart after an upgrade. A pod is evicted, not deleted, so that disruption budgets hold, and it has its
whole grace period to drain. A pod that was already unready is replaced all the same: the new version may be its cure.
"""

from __future__ import annotations

import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

ACCOUNT = Path(os.environ.get("ACCOUNT_DIR", "/var/run/secrets/kubernetes.io/serviceaccount"))
HOST = f"{os.environ.get('KUBERNETES_SERVICE_HOST', '')}:{os.environ.get('KUBERNETES_SERVICE_PORT', '443')}"
SERVER = os.environ.get("API_SERVER", f"https://{HOST}")
TIMEOUT = float(os.environ.get("TIMEOUT_SECONDS", "900"))
PAUSE = float(os.environ.get("PAUSE_SECONDS", "2"))


def ask(path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """GET, or POST of `body`. Raises `HTTPError`."""
    request = urllib.request.Request(f"{SERVER}{path}", json.dumps(body).encode() if body else None)
    request.add_header("Authorization", f"Bearer {(ACCOUNT / 'token').read_text().strip()}")
    request.add_header("Content-Type", "application/json")
    trusted = ACCOUNT / "ca.crt"
    context = ssl.create_default_context(cafile=str(trusted)) if trusted.exists() else None
    with urllib.request.urlopen(request, timeout=30, context=context) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def ready(pod: dict[str, Any]) -> bool:
    """Whether it takes part."""
    conditions = {item["type"]: item["status"] for item in pod.get("status", {}).get("conditions", [])}
    return conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"]


class Rollout:
    """The StatefulSets of one release in one namespace."""

    def __init__(self, namespace: str, selector: str) -> None:
        self.pods = f"/api/v1/namespaces/{namespace}/pods"
        self.sets = f"/apis/apps/v1/namespaces/{namespace}/statefulsets"
        self.query = f"?labelSelector={urllib.parse.quote(selector, safe='')}"
        self.namespace = namespace

    def run(self) -> None:
        """Validators first: they judge what the new trainers send."""
        items = ask(self.sets + self.query)["items"]
        for component in ("validator", "trainer"):
            for item in items:
                if item["metadata"]["labels"].get("app.kubernetes.io/component") == component:
                    self.replace(item["metadata"]["name"])

    def replace(self, name: str) -> None:
        """Bring one StatefulSet's pod to its newest template and wait for it."""
        give_up = time.monotonic() + TIMEOUT
        evicted = ""
        while time.monotonic() < give_up:
            found = ask(f"{self.sets}/{name}")
            current = found.get("status", {}).get("observedGeneration", 0) >= found["metadata"].get("generation", 0)
            revision = found.get("status", {}).get("updateRevision")
            pod = self.pod(f"{name}-0")
            if current and pod is not None and pod["metadata"]["labels"].get("controller-revision-hash") == revision:
                if ready(pod):
                    print(f"{name}: ready at {revision}", flush=True)
                    return
            elif current and pod is not None and pod["metadata"]["uid"] != evicted and self.evict(f"{name}-0"):
                evicted = pod["metadata"]["uid"]
                print(f"{name}: draining", flush=True)
            time.sleep(PAUSE)
        sys.exit(
            f"{name} is not ready after {TIMEOUT:.0f} s: see `kubectl describe pod {name}-0`; the others were left alone"
        )

    def pod(self, name: str) -> dict[str, Any] | None:
        """The pod, unless there is none now."""
        try:
            return ask(f"{self.pods}/{name}")
        except urllib.error.HTTPError as error:
            if error.code == 404:
                return None
            raise

    def evict(self, name: str) -> bool:
        """Ask it to go; False while a disruption budget says no."""
        body = {
            "apiVersion": "policy/v1",
            "kind": "Eviction",
            "metadata": {"name": name, "namespace": self.namespace},
        }
        try:
            ask(f"{self.pods}/{name}/eviction", body)
        except urllib.error.HTTPError as error:
            if error.code in (404, 429):
                return error.code == 404
            raise
        return True


if __name__ == "__main__":
    try:
        Rollout((ACCOUNT / "namespace").read_text().strip(), os.environ["SELECTOR"]).run()
    except OSError as error:
        sys.exit(
            f"Kubernetes' API at {SERVER} does not do what is asked: {error}. The rollout goes on when it is tried again"
        )
