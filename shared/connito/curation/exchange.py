"""`connito.library`: export an expert, and verify one that came from elsewhere. Needs torch with a base."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from connito.curation.holdings import Agreement, Expert, Holdings, read_folder
from connito.errors import Invalid
from connito.library.artifact import CARD_FILE, EXPERT_FILE, MODEL_FILE, RECORD_FILE, require_new
from connito.library.attestation import ATTESTATION_FILE, check_attestation
from connito.library.derived import base_of
from connito.library.governance import Permission
from connito.library.plots import EXPERTS, LOSSES
from connito.library.schema import ExpertRecord
from connito.library.shelf import check_expert
from connito.render import formats
from connito.wire.roster import Roster

FORMATS = ("delta", "hf", "hf-hub", "gguf")


@dataclass(frozen=True)
class Exported:
    """The files of an export, as `connito library export --json` prints them, and the obligations of the licence."""

    document: dict[str, Any]
    permission: Permission


def export(
    expert: str | Path,
    out: Path,
    base: Path | None = None,
    agreement: Agreement | None = None,
    library: Holdings | None = None,
    layout: str = "",
) -> Exported:
    """Copy an expert's file, record and card to the new folder `out`; with `base`, write the whole model with it in.

    layout: `delta` for the expert alone; `hf`, `hf-hub` or `gguf` for the whole model, which needs its `base`.
    """
    library = library or Holdings()
    layout = layout or ("delta" if base is None else "hf")
    if layout not in FORMATS:
        raise Invalid(f"no format is called {layout!r}: use {', '.join(FORMATS)}")
    if layout != "delta" and base is None:
        raise Invalid(f"--format {layout} writes a whole model: add --base FOLDER")
    found = library.find(str(expert))
    permission = library.permit([found], "export", agreement or Agreement())
    delta = base is None or layout == "delta"
    written: Mapping[str, object] = _copy(found, out) if delta or base is None else _whole(found, base, out, layout)
    library.meter([found[1]], "export")
    document = {**written, "license": permission.license, "attribution": permission.attribution}
    return Exported(document, permission)


def verify(
    target: str | Path, base: Path | None = None, roster: Path | None = None, library: Holdings | None = None
) -> list[str]:
    """Check an expert or an exported model offline, and return what was checked: digests, signatures; with `base`, a
    composition is recomputed. Raises `VerificationFailed`."""
    library = library or Holdings()
    folder = Path(target) if Path(target).is_dir() else library.find(str(target))[0]
    if not (folder / EXPERT_FILE).is_file():
        return [*_verify_model(folder, base, library), *_signatures(folder, roster)]
    _, record = read_folder(folder)
    check_expert(folder / EXPERT_FILE, record)
    done = ["the file is the one its record describes: digest, base, domain, rows"]
    if base is not None:
        done.append(_verify_on((folder, record), base, library))
    signed = _signatures(folder, roster)
    if not signed and not record.get("derived"):
        done.append("nobody's signature came with it: it was not exported from a platform's library")
    return [*done, *signed]


def files_of(record: ExpertRecord) -> set[str]:
    """Return the files that belong to an expert or a model; whatever else lies in its folder is its owner's."""
    named = record.get("files", (EXPERT_FILE, CARD_FILE, LOSSES, EXPERTS))
    return {RECORD_FILE, ATTESTATION_FILE, *named}


def _signatures(folder: Path, roster: Path | None) -> list[str]:
    if not (folder / ATTESTATION_FILE).is_file():
        return []
    return check_attestation(folder, None if roster is None else Roster.load(roster))


def _verify_model(folder: Path, base: Path | None, library: Holdings) -> list[str]:
    from connito.experts.export import verify_export, verify_insertion

    record = verify_export(folder, base)
    done = [f"recorded digests hold for {formats.count(len(record['files']), 'file')}"]
    if base is not None and not (folder / MODEL_FILE).is_file():
        raise Invalid("a GGUF file is not compared with a base: verify the same expert exported with --format hf")
    if base is not None and record["verb"] == "export" and "derived" in record:
        names = [parent["expert_id"] for parent in record["derived"]["parents"]]
        verify_insertion(folder, base, [library.find(name)[0] for name in names])
        return [*done, f"every tensor is the base's own, or that of {', '.join(names)}"]
    return [*done, "every tensor is the base's own"] if base is not None and not record["parents"] else done


def _verify_on(expert: Expert, base: Path, library: Holdings) -> str:
    from connito.base.loading import load_full
    from connito.experts.assemble import verify_composition
    from connito.experts.load import load_expert

    folder, record = expert
    model, parents = load_full(base), record.get("derived", {}).get("parents", [])
    if parents:
        verify_composition(model, folder, [library.find(parent["expert_id"]) for parent in parents])
        return f"recomputed from its {formats.count(len(parents), 'parent')}, bit for bit"
    loaded = load_expert(model, folder)
    loaded.remove()
    return (
        f"in the base it changes {formats.count(len(loaded.changed), 'row')} "
        f"and nothing else, and leaves no trace when removed"
    )


def _whole(expert: Expert, base: Path, out: Path, layout: str) -> ExpertRecord:
    from connito.base.description import build_manifest
    from connito.base.loading import load_full, load_tokenizer
    from connito.experts.export import ModelSource, export_model
    from connito.experts.load import load_expert

    folder, record = expert
    model, manifest = load_full(base), build_manifest(base)
    load_expert(model, folder)
    source = ModelSource(
        "export", base_of(manifest, [record]), parents=[record],
        license=str(record.get("license", "")), domain=str(record["domain"]), losses=record.get("losses", []),
        created=str(record["created"]),
    )  # fmt: skip
    return export_model(model, out, load_tokenizer(base), source, layout=layout, beside=base)


def _copy(expert: Expert, out: Path) -> Mapping[str, object]:
    folder, record = expert
    require_new(out)
    if (folder / EXPERT_FILE).is_file():
        check_expert(folder / EXPERT_FILE, record)
    out.mkdir(parents=True, exist_ok=True)
    for name in sorted(files_of(record)):
        if (folder / name).is_file():
            shutil.copyfile(folder / name, out / name)
    return {"expert_id": record["expert_id"], "digest": record["expert"]["digest"], "folder": str(out)}
