"""What a release would run, without running it."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[3]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/release.yaml").read_text())
TARGETS = set(
    re.findall(r"^FROM (?:control|model|model-cuda) AS (\S+)$", (ROOT / "deploy/Dockerfile").read_text(), re.M)
)


def publish(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What `scripts/publish` prints that it would do."""
    return subprocess.run(
        [ROOT / "scripts/publish", *arguments],
        check=False,
        capture_output=True,
        text=True,
        env=os.environ | {"PRINT": "1"},
    )


def test_every_image_is_built_for_both_architectures_and_signed() -> None:
    lines = publish("1.2.3", "registry.example.com/connito").stdout.splitlines()
    built = [line for line in lines if line.startswith("docker buildx build")]
    assert {re.search(r"--target (\S+)", line)[1] for line in built} == TARGETS  # type: ignore[index]
    assert all("linux/amd64" in line and "linux/arm64" in line and "--provenance mode=max" in line for line in built)
    assert len([line for line in lines if line.startswith("cosign sign ")]) == len(TARGETS)
    assert all("@sha256:" in line for line in lines if line.startswith("cosign"))
    attested = [line for line in lines if line.startswith("cosign attest") and "--type cyclonedx" in line]
    assert len(attested) == len(TARGETS)


def test_the_chart_is_pushed_and_signed() -> None:
    lines = publish("--chart", "1.2.3", "registry.example.com/connito").stdout.splitlines()
    assert "oci://registry.example.com/connito/charts" in lines[1]
    assert lines[2].startswith("cosign sign --yes registry.example.com/connito/charts/connito@sha256:")


def test_what_is_no_image_or_version_is_refused() -> None:
    assert "has no image traner" in publish("1.2.3", "r", "traner").stderr
    assert publish("v1", "r").returncode == publish().returncode == 2


def test_the_workflow_publishes_every_image_with_pinned_actions() -> None:
    assert set(WORKFLOW["jobs"]["images"]["strategy"]["matrix"]["target"]) == TARGETS
    for job in WORKFLOW["jobs"].values():
        assert job["permissions"]["id-token"] == "write"
        for step in job["steps"]:
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", step.get("uses", f"a/b@{'0' * 40}"))


def test_the_base_is_pinned_by_digest() -> None:
    assert re.search(r"^ARG BASE=\S+@sha256:[0-9a-f]{64}$", (ROOT / "deploy/Dockerfile").read_text(), re.M)
