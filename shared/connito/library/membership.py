"""Check whether what a customer made of other experts may stand beside them in a platform's library. Pure.

Nothing of such a record is taken on trust that follows from the parents: base, credit, data sources, visibility, licence and
routing signature are worked out again. The measured effect is the depositor's word, and signed with it.
"""

from __future__ import annotations

from collections.abc import Sequence

from connito.errors import Invalid
from connito.library.artifact import MODEL_FORMAT
from connito.library.derived import joint_contributors, joint_governance
from connito.library.governance import VISIBILITIES, Use, check_use, governance
from connito.library.record import RECORD_FORMAT, expert_id
from connito.library.schema import ExpertRecord
from connito.library.signature import joint_signature
from connito.v1 import reasons_pb2


def claimed(record: ExpertRecord, owner: str) -> ExpertRecord:
    """Return the record of a derived expert with its owner in it: who may speak about it from then on."""
    found: ExpertRecord = {**record, "customer": owner, "governance": {**governance(record), "owner": owner}}
    found.pop("card", None)
    return found


def check_member(record: ExpertRecord, parents: Sequence[ExpertRecord], owner: str) -> None:
    """Check the record of a derived expert or model against its parents', in the order in which it names them.

    Raises `Invalid` naming what does not follow from them.
    """
    derived = record.get("derived")
    if derived is None or record["format"] not in (RECORD_FORMAT, MODEL_FORMAT):
        raise _refused(f"{record['expert_id']} is made of no other expert: a run brings such a one into the library")
    is_model = record["format"] == MODEL_FORMAT
    if not parents and not is_model:
        raise _refused(f"{record['expert_id']} names no parents")
    name = f"{record['domain'] or 'model'}-{derived['verb']}" if is_model else record["domain"]
    named = [(parent["expert_id"], parent["digest"]) for parent in derived["parents"]]
    weighted = [(parent, float(entry["weight"])) for parent, entry in zip(parents, derived["parents"], strict=True)]
    rules = governance(record)
    joint = joint_governance(parents) if parents else governance({})
    follows = {
        "id": record["expert_id"] == expert_id(name, record["expert"]["digest"]),
        "parents": named == [(parent["expert_id"], parent["expert"]["digest"]) for parent in parents],
        "base": all(parent["base"]["manifest"] == record["base"]["manifest"] for parent in parents),
        "owner": rules["owner"] == record["customer"] == owner,
        "visibility": VISIBILITIES.index(rules["visibility"]) >= VISIBILITIES.index(joint["visibility"])
        and (joint["visibility"] != "organisation" or rules["organisation"] == joint["organisation"]),
        "data sources": set(joint["sources"]) <= set(rules["sources"]),
        "contributors": record["contributors"] == joint_contributors(weighted),
        "routing signature": record.get("signature")
        == joint_signature([(parent.get("signature"), weight) for parent, weight in weighted]),
        "licence": not parents or record["license"] == _licence(parents),
        "run": not record["run"] and not record["lineage"],
    }
    if odd := [what for what, holds in follows.items() if not holds]:
        raise _refused(
            f"the record of {record['expert_id']} does not follow from its parents: {', '.join(odd)}; make it again with "
            "`connito library` from this platform's experts"
        )


def _licence(parents: Sequence[ExpertRecord]) -> str:
    """Return the licence that what is made of them carries; whoever made it has accepted theirs."""
    accepted = frozenset(str(parent.get("license", "")) for parent in parents)
    public = [{**parent, "governance": {"visibility": "public"}} for parent in parents]
    return check_use(public, Use("compose", accepted=accepted)).license


def _refused(message: str) -> Invalid:
    return Invalid(message, reason=reasons_pb2.REASON_NOT_PERMITTED)
