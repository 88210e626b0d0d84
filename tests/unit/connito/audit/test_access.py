"""What an auditor fetches, and opens on its own machine, at the word of a log."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
from connito.audit.access import Access
from connito.audit.artifacts import gather
from connito.bus import Bus
from connito.errors import Invalid
from connito.protocol.findings import PROTOCOL_VERSION
from connito.runtime.progress import silent
from connito.store import ArtifactStore
from connito.store.named import key_of, ref_of_file
from connito.v1 import run_pb2
from connito.v1.artifacts_pb2 import ArtifactRef

from .world import ROSTER, World


class Empty:
    """A store that holds nothing."""

    async def stat(self, ref: ArtifactRef) -> None:
        key_of(ref)


def access(cache: Path) -> Access:
    return Access(cast(Bus, None), cast(ArtifactStore, Empty()), ROSTER, cache)


@pytest.mark.parametrize("digest", ["", "../private", "{}/private", "A" * 64])
async def test_a_digest_that_is_none_leads_to_no_file(tmp_path: Path, digest: str) -> None:
    (tmp_path / "private").write_text("not for others")
    (tmp_path / "cache" / "sha256").mkdir(parents=True)
    named = digest.format(tmp_path)
    base = run_pb2.BaseRef(name="tiny", manifest=ArtifactRef(digest=named))
    evidence = World().created(base=base).evidence()

    found = await access(tmp_path / "cache").artifacts(evidence, lambda entry: entry.what == "base manifest", silent)

    assert named in found.damaged
    assert found.copies == {}


async def test_nothing_is_fetched_for_a_run_under_newer_rules(tmp_path: Path) -> None:
    evidence = World().created(protocol_version=PROTOCOL_VERSION + 1).evidence()
    with pytest.raises(Invalid, match="upgrade"):
        await access(tmp_path).artifacts(evidence, lambda _: True, silent)


async def test_a_damaged_copy_in_a_cache_is_nobodys_fault(tmp_path: Path) -> None:
    """It lies on the auditor's machine; log and store are what they were."""
    whole, cache = tmp_path / "whole", tmp_path / "cache"
    whole.write_text("{}")
    named = ref_of_file(whole, "", run_pb2.CorpusRef().artifact)
    copy = cache / "sha256" / named.digest[:2] / named.digest
    copy.parent.mkdir(parents=True)
    copy.write_text("[]")

    async def fetch(_: ArtifactRef) -> Path:
        return whole

    source = SimpleNamespace(fetch=fetch)
    evidence = World().created(probe=run_pb2.CorpusRef(domain="code", artifact=named)).evidence()
    found = await gather(
        evidence, source, wanted=lambda entry: entry.ref.digest == named.digest, copy_of=lambda _: copy
    )
    assert [(one.by, str(copy) in one.what) for one in found.step().differences] == [("nobody", True)]
