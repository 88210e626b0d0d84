"""The accounts of a broker: who may sign passes into each, and what the broker is told about them, in a folder.

    accounts.json         public keys of the accounts, and of those who sign passes into them; revoked keys
    accounts/operator.nk  the seed that signs accounts: needed to revoke, and to make the accounts; secret
    accounts/<name>.nk    the seed that signs passes into one account: needed to admit; secret

A pass for a miner carries no rights: the account's own claims say once what each key in it may do (`connito.bus.permissions`). So
the broker's configuration does not grow with those who are admitted, and admitting is one signature that it need not hear of.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from nats.aio.client import Client
from nats.errors import Error as NatsError

from connito.bus.permissions import (
    ACCOUNTS,
    PLATFORM,
    SELF,
    SYSTEM,
    Account,
    Permissions,
    accounts_of,
    guarding,
    permissions,
)
from connito.errors import Invalid, Retry
from connito.files import write_durably
from connito.wire import passes
from connito.wire.addresses import broker_addresses
from connito.wire.identity import Identity
from connito.wire.passes import Authority
from connito.wire.tls import PLAIN, Tls

PUSH_SECONDS = 5.0
# Each message is synced before it is acknowledged, which takes most of a millisecond. So many wait for it in a stream; what comes
# on top is refused, or one key's burst would be what everybody else waits for. Who waits for an answer asks again.
JETSTREAM = {"sync_interval": "always", "max_buffered_msgs": 500}

# What a client has not taken is held in memory, for each of its connections: whoever asks and does not read is let go at this
# size or after this time. All streams that a service follows on one connection ask for half of it at once.
SERVER = {"max_payload": 2 << 20, "max_pending": 4 << 20, "write_deadline": "5s"}

_UNLIMITED = {"subs": -1, "data": -1, "payload": -1}
_ANY = _UNLIMITED | {"imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": 0}
_STORAGE = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}


class Accounts:
    """The folder. Every change of what the broker knows is signed anew by the operator's seed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "accounts.json"

    @property
    def exist(self) -> bool:
        """Return whether the folder holds accounts."""
        return self._path.exists()

    def make(self) -> None:
        """Make what is missing; keys that are there stay."""
        state = self._state() if self.exist else {"accounts": self._stored(), "revoked": {}}
        if (stored := self._stored()) and stored[PLATFORM] != state["accounts"][PLATFORM]:
            raise Invalid(
                f"{self._path} is damaged: its platform is not the account {stored[PLATFORM]}, whose log lies here; put back its "
                "copy, or remove the file to have it made again"
            )
        if not self._seed("operator").exists():
            Authority.generate(passes.OPERATOR).save(self._seed("operator"))
        for name in (SYSTEM, PLATFORM, *ACCOUNTS):
            if name not in state["accounts"]:
                Authority.generate(passes.ACCOUNT).save(self._seed(name))
                # Its own seed is never needed: the operator signs the account, the file beside it signs passes.
                state["accounts"][name] = Authority.generate(passes.ACCOUNT).public
        self._write(state)

    def _stored(self) -> dict[str, str]:
        """Return the account of the log that a broker keeps in this folder; nothing else names it when the file is lost."""
        found = [path.name for path in (self.folder / "nats" / "jetstream" / "jetstream").glob("A*")]
        return {PLATFORM: found[0]} if len(found) == 1 else {}

    # Admitting.

    def admit(self, role: str, key: str, issued_at: int | None = None) -> tuple[str, ...]:
        """Return passes for a key, for each account that its role has one in. A revoked key is to be readmitted first.

        `issued_at`: Unix seconds, now by default; a revocation since then voids the passes.
        """
        return tuple(self._pass(name, role, key, issued_at) for name in accounts_of(role))

    def welcome(self, role: str, identity: Identity) -> Identity:
        """Return an identity with its passes."""
        return identity.with_passes(self.admit(role, identity.public))

    def _pass(self, account: str, role: str, key: str, issued_at: int | None = None) -> str:
        public = self._state()["accounts"][account]
        body: dict[str, Any] = {"issuer_account": public}
        if account not in ACCOUNTS:
            granted = permissions(role, key) if account == PLATFORM else guarding(key)
            # Who pushes claims is the operator, with a key of the moment.
            body |= _UNLIMITED | _rights(Permissions((">",), (">",)) if role == SYSTEM else granted)
        return Authority.load(self._seed(account)).sign(
            key, account, "user", body, _now() if issued_at is None else issued_at
        )

    def signers(self, role: str) -> set[str]:
        """Return the public keys that sign passes for a role."""
        return {Authority.load(self._seed(name)).public for name in accounts_of(role)}

    def renew(self, role: str) -> None:
        """Replace the seeds that sign passes for a role: every pass that they have signed is void once the broker is told."""
        for name in accounts_of(role):
            Authority.generate(passes.ACCOUNT).save(self._seed(name))
        self._write(self._state())

    # What the broker knows.

    def server(self, jwt_folder: str) -> dict[str, Any]:
        """Return the part of the server's configuration that says whom it trusts; the same for any number of keys."""
        tokens = self._tokens()
        return {
            "operator": tokens.pop("operator"),
            "system_account": self._state()["accounts"][SYSTEM],
            # Claims that are pushed later lie there; a file of this configuration that is older changes nothing.
            "resolver": {"type": "full", "dir": jwt_folder, "allow_delete": False, "interval": "2m"},
            "resolver_preload": tokens,
        }

    @property
    def platform(self) -> str:
        """Return the public key of the account in which the streams are; the broker names its folder after it."""
        return str(self._state()["accounts"][PLATFORM])

    @property
    def revoked(self) -> list[str]:
        """Return keys whose passes are void."""
        return list(self._state()["revoked"])

    def revoke(self, keys: Iterable[str]) -> None:
        """Void the passes that keys hold until now. The broker closes their connections once it is told (`push`)."""
        state = self._state()
        state["revoked"] |= dict.fromkeys(keys, _now())
        self._write(state)

    def readmit(self, keys: Iterable[str]) -> list[str]:
        """Take revocations back; return the keys that were revoked. The broker has to be told."""
        state = self._state()
        back = [key for key in keys if state["revoked"].pop(key, None) is not None]
        self._write(state)
        return back

    async def push(self, url: str, tls: Tls = PLAIN) -> None:
        """Tell the running broker, and through it every server of its cluster, what has changed. Raises `Retry`."""
        tokens = self._tokens()
        try:
            async with self._system(url, tls) as client:
                # The server's own account last: this very connection is one of it.
                for name in (PLATFORM, *ACCOUNTS, SYSTEM):
                    claims = tokens[self._state()["accounts"][name]].encode()
                    reply = await client.request("$SYS.REQ.CLAIMS.UPDATE", claims, timeout=PUSH_SECONDS)
                    if (refused := json.loads(reply.data).get("error")) is not None:
                        raise Invalid(
                            f"the broker at {url} does not take the account {name}: {refused.get('description')}"
                        )
        except (NatsError, OSError, TimeoutError, ValueError) as error:
            raise Retry(
                f"the files are written, but the broker at {url} cannot be told ({error or type(error).__name__}); it "
                "trusts another operator, or is away: repeat the command once it is there"
            ) from error

    async def write_error(self, url: str) -> str:
        """Return what keeps the broker from writing a stream; empty while nothing does, or while it does not answer.

        A stream that a write once failed in refuses every other one until the broker is started again, room or not.
        """
        with suppress(NatsError, OSError, TimeoutError, ValueError):
            async with self._system(url, PLAIN) as client:
                reply = await client.request("$SYS.REQ.SERVER.PING.HEALTHZ", b"{}", timeout=PUSH_SECONDS)
                problem = str(json.loads(reply.data).get("data", {}).get("error", ""))
                return problem if "write error" in problem else ""
        return ""

    @asynccontextmanager
    async def _system(self, url: str, tls: Tls) -> AsyncIterator[Client]:
        """Yield a connection to the server's own account, with a key of the moment."""
        someone = Identity.generate()
        token = self._pass(SYSTEM, SYSTEM, someone.public)
        client = Client()
        options: dict[str, Any] = {"tls": tls.context()} if tls.own or url.startswith("tls://") else {}
        try:
            await client.connect(
                broker_addresses(url), user_jwt_cb=token.encode, allow_reconnect=False, connect_timeout=2, error_cb=_silent,
                signature_cb=lambda nonce: base64.b64encode(someone.sign_nonce(nonce.encode())), **options,
            )  # fmt: skip
            yield client
        finally:
            await client.close()

    def _tokens(self) -> dict[str, str]:
        """Return the claims of operator and accounts: `operator`, and each account by its public key."""
        state = self._state()
        now = int(state["issued_at"])
        operator = Authority.load(self._seed("operator"))
        keys: dict[str, str] = state["accounts"]
        tokens = {
            "operator": operator.sign(operator.public, "connito", "operator", {"system_account": keys[SYSTEM]}, now)
        }
        for name, public in keys.items():
            body = self._body(name, keys, state["revoked"])
            tokens[public] = operator.sign(public, name, "account", body, now)
        return tokens

    def _body(self, name: str, keys: Mapping[str, str], revoked: Mapping[str, int]) -> dict[str, Any]:
        signer = Authority.load(self._seed(name)).public
        if (account := ACCOUNTS.get(name)) is not None:
            scope = {"kind": "user_scope", "key": signer, "role": account.role, "template": _template(account)}
            imports = [_import(subject, "service", keys[PLATFORM]) for subject in account.services]
            imports += [_import(subject, "stream", keys[PLATFORM]) for subject in account.heard]
            exports = [_export(subject, "stream") for subject in account.told]
            limits = _ANY | {"conn": account.connections}
            return {
                "limits": limits,
                "imports": imports,
                "exports": exports,
                "signing_keys": [scope],
                "revocations": dict(revoked),
            }
        body: dict[str, Any] = {"limits": _ANY, "signing_keys": [signer], "revocations": dict(revoked)}
        if name == PLATFORM:
            imports = [_import(to, "stream", keys[one]) for one, account in ACCOUNTS.items() for to in account.told]
            body |= {"limits": _ANY | _STORAGE, "exports": _exports(), "imports": imports}
        return body

    def _seed(self, name: str) -> Path:
        return self.folder / "accounts" / f"{name}.nk"

    def _state(self) -> dict[str, Any]:
        try:
            state = json.loads(self._path.read_text())
            accounts = {name: state["accounts"][name] for name in (SYSTEM, PLATFORM)}
            if not all(isinstance(key, str) for key in accounts.values()):
                raise ValueError("an account has no key")
            return dict(state)
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise Invalid(
                f"{self._path} cannot be read ({error}); make it with `connito access export {self.folder}`"
            ) from error

    def _write(self, state: dict[str, Any]) -> None:
        # A server keeps the newest claims of what it is told and what it starts with, by whole seconds.
        state["issued_at"] = max(_now(), int(state.get("issued_at", 0)) + 1)
        write_durably(self._path, json.dumps(state, indent=1) + "\n", 0o600)


def _exports() -> list[dict[str, Any]]:
    """Return what strangers' accounts import: each subject once, whoever does."""
    services = dict.fromkeys(subject for account in ACCOUNTS.values() for subject in account.services)
    heard = dict.fromkeys(subject for account in ACCOUNTS.values() for subject in account.heard)
    return [
        *(_export(subject, "service") | {"response_type": "Singleton"} for subject in services),
        *(_export(subject, "stream") for subject in heard),
    ]


def _export(subject: str, kind: str) -> dict[str, str]:
    return {"name": subject, "subject": subject, "type": kind}


def _import(subject: str, kind: str, account: str) -> dict[str, str]:
    return {"name": subject, "subject": subject, "account": account, "type": kind}


def _rights(granted: Permissions) -> dict[str, Any]:
    return {"pub": {"allow": list(granted.publish)}, "sub": {"allow": list(granted.subscribe)}}


def _template(account: Account) -> dict[str, Any]:
    assert any(SELF in subject for subject in account.grants.subscribe), "answers lie under each key's own inbox"
    return _rights(account.grants) | {"subs": account.subscriptions, "data": -1, "payload": account.payload}


def _now() -> int:
    return int(time.time())


async def _silent(_: Exception) -> None:
    """Leave it to the one who waits for the answer."""
