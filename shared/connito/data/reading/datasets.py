"""Choose what to read of a folder: the files of a published data set as its card says, else the data among the rest."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from connito.data.reading.kinds import COMPRESSED, OF_FOLDERS, TEXT
from connito.data.reading.rows import Account, unreadable
from connito.errors import NotFound

Read = Callable[[str], bytes]

_SYSTEM = {"__macosx", "node_modules", "__pycache__", "thumbs.db", "desktop.ini", "site-packages", "$recycle.bin"}
_OF_DATA_SETS = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json", "_success", "_metadata"}
_ABOUT = re.compile(
    r"(?:readme|licen[cs]e|notice|citation|changelog|contributing|authors|code_of_conduct|security)(?:[._-].*)?",
    re.IGNORECASE,
)
_SPLITS = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "testing": "test", "eval": "test", "evaluation": "test",
}  # fmt: skip
_WORD = re.compile(r"[a-z]+")


def hidden(name: str) -> bool:
    """Tell whether a relative path is hidden or belongs to a system or a tool."""
    return any(part.startswith(".") or part.lower() in _SYSTEM for part in name.split("/"))


def about(name: str) -> bool:
    """Tell whether a file says something about the files beside it."""
    return bool(_ABOUT.fullmatch(name.rpartition("/")[2]))


def suffix_of(name: str) -> str:
    """Return the suffix that says what a file is, behind that of a compression; "" where there is none."""
    if "://" in name:
        name = name.partition("?")[0]
    path = PurePosixPath(name.rpartition("/")[2])
    if path.suffix.lower() in COMPRESSED:
        path = path.with_suffix("")
    suffix = path.suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9_]{0,11}", suffix) else ""


def choose(names: Iterable[str], read: Read, where: str, account: Account, config: str, split: str) -> list[str]:
    """Return which files of a folder to read, in order. Raises `Invalid` where only its owner can say, `NotFound` for none."""
    seen = []
    for name in sorted(names):
        if hidden(name):
            account.skipped["hidden or of the system"] += 1
        else:
            seen.append(name)
    saved = _saved(seen, read, where, account, split)
    if saved:
        return saved
    declared = _declared(seen, read, where, account, config, split)
    found = declared if declared is not None else _data(seen, account)
    if declared is None:
        found = _one_split(found, where, account, split)
    if all(map(about, found)):
        raise NotFound(_nothing(seen, where, account))
    return found


def _nothing(seen: Sequence[str], where: str, account: Account) -> str:
    if any(name.endswith(".py") for name in seen) and any(name.lower() == "readme.md" for name in seen):
        return f"{where} has no data: they come from a loading script, which is never run; give the files it fetches"
    kinds = ", ".join(f"{count} {reason}" for reason, count in sorted(account.skipped.items()))
    what = f" ({kinds})" if kinds else ""
    return f"the folder {where} holds no text to read{what}; name other files by themselves, or by a glob"


def _data(seen: Sequence[str], account: Account) -> list[str]:
    """Return the files that may be data, without those that only describe others."""
    found = []
    for name in seen:
        suffix = suffix_of(name)
        if name.rpartition("/")[2].lower() in _OF_DATA_SETS:
            account.skipped["about a data set"] += 1
        elif suffix in OF_FOLDERS:
            found.append(name)
        else:
            account.skipped[f"{suffix} files"] += 1
    if any(suffix_of(name) not in {*TEXT, ""} for name in found):
        described = [name for name in found if about(name)]
        account.skipped["about the files beside it"] += len(described)
        found = [name for name in found if name not in described]
    account.skipped += type(account.skipped)()  # Drops reasons that are 0.
    return found


def _one_split(found: list[str], where: str, account: Account, split: str) -> list[str]:
    """Keep one split where the names of data files tell several apart."""
    named = {name: split_of(name) for name in found if suffix_of(name) not in TEXT}
    splits = {name for name in named.values() if name}
    if split:
        if split not in splits:
            raise unreadable(f"{where} has no split {split!r}; it has {', '.join(sorted(splits)) or 'none'}")
    elif len(splits) < 2 or "train" not in splits:
        return found
    wanted = split or "train"
    kept = [name for name in found if named.get(name, wanted) in (wanted, "")]
    if len(kept) < len(found):
        account.skipped["of another split"] += len(found) - len(kept)
        account.note(f"of {where}, the split {wanted} was read")
    return kept


def split_of(name: str) -> str:
    """Return the split that a file's name or folder states: train, validation, test or ""."""
    for part in reversed(name.lower().split("/")):
        for word in _WORD.findall(part):
            if word in _SPLITS:
                return _SPLITS[word]
    return ""


def _saved(seen: Sequence[str], read: Read, where: str, account: Account, split: str) -> list[str]:
    """Return the files of what `save_to_disk` of the library datasets wrote, in its order; none if it is not that."""
    folder = ""
    if "dataset_dict.json" in seen:
        splits = _json(read, "dataset_dict.json", where).get("splits", [])
        folder = f"{_pick(splits, split, where, account)}/"
    state = f"{folder}state.json"
    if state not in seen:
        return []
    files = _json(read, state, where).get("_data_files", [])
    found = [
        f"{folder}{row['filename']}" for row in files if isinstance(row, dict) and isinstance(row.get("filename"), str)
    ]
    lost = [name for name in found if name not in seen]
    if lost:
        raise NotFound(f"{where} lacks {lost[0]}, which its {state} names; copy the whole folder")
    return found


def _json(read: Read, name: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(read(name))
    except (ValueError, RecursionError) as error:
        raise unreadable(f"{where}/{name} is not JSON; copy the folder again") from error
    return value if isinstance(value, dict) else {}


def _pick(splits: Sequence[Any], wanted: str, where: str, account: Account) -> str:
    names = [str(name) for name in splits]
    if wanted and wanted not in names:
        raise unreadable(f"{where} has no split {wanted!r}; it has {', '.join(names)}")
    chosen = wanted or ("train" if "train" in names else names[0] if len(names) == 1 else "")
    if not chosen:
        raise unreadable(
            f"{where} has the splits {', '.join(names)} and no train: say which, for example "
            f"`split: {names[0] if names else ''}`, or name the files of one"
        )
    if len(names) > 1:
        account.note(f"of {where}, the split {chosen} was read (others: {', '.join(n for n in names if n != chosen)})")
    return chosen


def _declared(
    seen: Sequence[str], read: Read, where: str, account: Account, config: str, split: str
) -> list[str] | None:
    """Return the files of a configuration in the front matter of a README; None where it states none."""
    card = next((name for name in seen if name.lower() == "readme.md"), "")
    configs = _configs(read(card)) if card else []
    if not configs:
        if config:
            raise unreadable(f"{where} has no configuration {config!r}: its README names none")
        return None
    by_split = _files_by_split(_one_config(configs, where, account, config))
    chosen = _pick(list(by_split), split, where, account)
    found = [name for name in seen if any(_matches(name, pattern) for pattern in by_split[chosen])]
    if not found:
        raise NotFound(
            f"{where} lacks the files {', '.join(by_split[chosen])} that its README names; run `git lfs pull`"
        )
    account.skipped["not of what was chosen"] += len(seen) - len(found)
    return found


def _configs(card: bytes) -> list[Mapping[str, Any]]:
    import yaml

    text = card.decode("utf-8", "replace").replace("\r\n", "\n")
    if not text.startswith("---\n"):
        return []
    try:
        front = yaml.safe_load(text[4:].partition("\n---")[0])
    except (yaml.YAMLError, ValueError, RecursionError):
        return []
    rows = front.get("configs", []) if isinstance(front, dict) else []
    return [row for row in rows if isinstance(row, dict) and row.get("data_files")] if isinstance(rows, list) else []


def _one_config(configs: Sequence[Mapping[str, Any]], where: str, account: Account, wanted: str) -> Mapping[str, Any]:
    named = {str(row.get("config_name", "default")): row for row in configs}
    if wanted and wanted not in named:
        raise unreadable(f"{where} has no configuration {wanted!r}; it has {', '.join(named)}")
    marked = [name for name, row in named.items() if row.get("default") is True or name == "default"]
    name = wanted or (marked[0] if marked else next(iter(named)) if len(named) == 1 else "")
    if not name:
        raise unreadable(
            f"{where} has several configurations: say which, `config: NAME`, of {', '.join(named)}; or name the files of one"
        )
    if len(named) > 1:
        account.note(f"of {where}, the configuration {name} was read")
    return named[name]


def _files_by_split(config: Mapping[str, Any]) -> dict[str, list[str]]:
    files, folder = config["data_files"], str(config.get("data_dir", "") or "")
    rows = files if isinstance(files, list) else [files]
    if isinstance(files, dict):
        rows = [{"split": split, "path": path} for split, path in files.items()]
    found: dict[str, list[str]] = {}
    for row in rows:
        path = row.get("path", "") if isinstance(row, dict) else row
        split = str(row.get("split", "train")) if isinstance(row, dict) else "train"
        for pattern in path if isinstance(path, list) else [path]:
            found.setdefault(split, []).append(str(PurePosixPath(folder, str(pattern))))
    return found


_GLOB = re.compile(r"\*\*/|\*\*|\*|\?|\[[^\]/]+\]")
_MEANS = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def _matches(name: str, pattern: str) -> bool:
    """Tell whether a path matches a pattern, where `**` stands for any folders, or lies in the folder it names."""
    expression, at = "", 0
    for found in _GLOB.finditer(pattern):
        expression += re.escape(pattern[at : found.start()]) + _MEANS.get(found[0], found[0].replace("[!", "[^"))
        at = found.end()
    return bool(re.fullmatch(expression + re.escape(pattern[at:]), name)) or name.startswith(f"{pattern}/")
