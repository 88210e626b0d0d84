"""A miner's membership of a platform, kept beside its key: commands that get the key need nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from connito.errors import Invalid
from connito.files import write_durably


@dataclass(frozen=True)
class Membership:
    """The bus's address, the roster's path and the invite; empty where nobody told."""

    bus: str = ""
    roster: str = ""
    invite: str = ""

    @classmethod
    def of(cls, key: Path) -> Membership:
        """Return what is kept beside a key file; nothing where nothing is. Raises `Invalid` for a file that is damaged."""
        path = _beside(key)
        try:
            raw = json.loads(path.read_text())
            told = cls(*(str(raw[name]) for name in ("bus", "roster", "invite")))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise Invalid(f"{path} cannot be read ({error!r}); remove it, and join again with the invite") from error
        return cls(told.bus, str(key.parent / told.roster) if told.roster else "", told.invite)

    def keep(self, key: Path) -> None:
        """Write it beside a key file, readable by the owner only. A roster in the same folder may move with it."""
        path = Path(self.roster)
        roster = path.name if path.absolute().parent == key.absolute().parent else str(path.absolute())
        write_durably(_beside(key), json.dumps({**asdict(self), "roster": roster}, indent=2) + "\n", 0o600)


def _beside(key: Path) -> Path:
    return key.with_name(f"{key.name}.json")
