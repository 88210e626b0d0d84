"""One connection to the broker: login by nkey, reconnects for ever, and what its errors mean here."""

from __future__ import annotations

import asyncio
import base64
import re
import ssl
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit

from nats.errors import ConnectionClosedError, NoRespondersError, OutboundBufferLimitError
from nats.errors import Error as NatsError
from nats.errors import TimeoutError as NatsTimeoutError
from nats.js import JetStreamContext
from nats.js.errors import NoStreamResponseError, ServiceUnavailableError

from connito.bus.offences import report
from connito.bus.peer import Client
from connito.bus.permissions import ACCOUNTS, ANSWERED, ASKED, SYSTEM
from connito.errors import Fatal, Invalid, Retry, Unusable
from connito.runtime import metrics
from connito.runtime.logs import get_logger
from connito.runtime.tasks import end_tasks
from connito.runtime.waiting import WAITING
from connito.v1 import reasons_pb2 as reasons
from connito.wire.addresses import broker_addresses
from connito.wire.identity import Identity, short_key
from connito.wire.passes import claims_of
from connito.wire.subjects import SECURITY_ROOT, inbox_prefix
from connito.wire.tls import PLAIN, Tls, refusal, required

log = get_logger("bus")

REQUEST_TIMEOUT = 2.0
CLOSE_SECONDS = 1.0
MAX_REFUSALS = 4
_DENIED = re.compile(r'permissions violation for (publish|subscription) to "([^"]+)"')


def speaking(passes: Iterable[str]) -> tuple[str, ...]:
    """Return the passes of accounts in which something is said or read: not a guard's (`connito.bus.guard`)."""
    return tuple(token for token in passes if claims_of(token)["name"] != SYSTEM)


def in_words(subject: str) -> str:
    """Return what a subject of a question about a stream asks for; others are their own name."""
    for asks in (f"{ASKED}.", "$JS.API.DIRECT.GET."):
        if subject.startswith(asks):
            return f"what stream {subject.removeprefix(asks).partition('.')[0]} holds"
    return subject


class Connection:
    """Wraps a NATS client. Subjects of one identity's replies lie under its inbox prefix, so that a broker which
    grants each user its own inbox keeps replies private. `token` is one of the identity's passes, `client` what speaks
    to the network."""

    def __init__(
        self,
        url: str,
        identity: Identity | None,
        name: str,
        tls: Tls = PLAIN,
        token: str = "",
        client: Client | None = None,
    ) -> None:
        self.url, self.identity, self.name, self.tls, self._token = url, identity, name, tls, token
        self._addresses = broker_addresses(url)
        # What each broker of the list answered that could not be used, while the first one is sought.
        self._tried: list[Exception] = []
        # In an account of strangers, which has nothing but what it imports.
        self.account = str(claims_of(token)["name"]) if token else ""
        self.stranger = self.account in ACCOUNTS
        # Whoever reads there asks the desk (`connito.bus.desk`), and is answered from another account.
        self._by_desk = self.stranger and bool(ACCOUNTS[self.account].told)
        self._context: ssl.SSLContext | None = None
        self._files: tuple[bytes | None, ...] = ()
        self._refused_certificate: Invalid | None = None
        self.nc = client if client is not None else Client()
        self.js: JetStreamContext = self.nc.jetstream(timeout=REQUEST_TIMEOUT)
        self.on_reconnect: list[Callable[[], None]] = []
        # Requests under way by subject: answered here when the broker denies one, or when the connection breaks.
        self._underway: list[tuple[str, asyncio.Future[Exception]]] = []
        self._starting, self._closing = True, False
        self._lost_at = 0.0
        self._refusals = 0

    async def open(self) -> None:
        """Log in. Raises `Retry` when the broker is away, `Invalid` when it refuses the key."""
        options: dict[str, Any] = {}
        if self.identity is not None:
            # The client library's own nkey login signs any nonce; ours refuses one that is crafted to be a signature.
            if self._token:
                options["user_jwt_cb"] = self._token.encode
            else:
                self.nc._public_nkey = self.identity.public
            options |= {"signature_cb": self._sign, "inbox_prefix": self._inbox(self.identity.public)}
        if self.tls.own or self._addresses[0].startswith("tls://"):
            self._files, self._context = self.tls.files(), self.tls.context()
            options["tls"] = self._context
        try:
            await self.nc.connect(
                servers=self._addresses,
                name=self.name,
                ping_interval=5,
                max_outstanding_pings=2,
                max_reconnect_attempts=-1,
                reconnect_time_wait=0.25,
                connect_timeout=2,
                # Nothing waits in a buffer for a broker that may come back much later: the caller decides again.
                pending_size=0,
                error_cb=self._on_error,
                disconnected_cb=self._on_disconnected,
                reconnected_cb=self._on_reconnected,
                closed_cb=self._on_closed,
                **options,
            )
        except BaseException as error:
            await self._hang_up()
            if isinstance(error, Retry) and self._context is not None and (why := await self._why_hung_up()):
                self._report_certificate(why)
                raise why from error
            raise
        self._starting = False
        metrics.BUS_CONNECTED.set(1)

    async def _why_hung_up(self) -> Invalid | None:
        """Repeat the handshake by hand: a broker that requires a certificate may close before its alert is read."""
        asks, split = False, urlsplit(self._addresses[0])
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT):
                reader, writer = await asyncio.open_connection(split.hostname, split.port or 4222)
                try:
                    asks = b'"tls_verify":true' in await reader.readline()
                    await writer.start_tls(self._context, server_hostname=split.hostname)  # type: ignore[arg-type]
                    # One that is content waits for us to speak.
                    return required(f"the broker at {self.url}") if asks and not await reader.read(1) else None
                finally:
                    writer.transport.abort()
        except ConnectionResetError:
            return required(f"the broker at {self.url}") if asks else None
        except (OSError, TimeoutError) as error:
            return refusal(error, f"the broker at {self.url}")

    def _inbox(self, key: str) -> str:
        """Return where answers come to."""
        return f"{ANSWERED}.{key}" if self._by_desk else inbox_prefix(key)

    def stored_in(self, stream: str) -> str:
        """Return where this side asks for what a stream holds: the broker, or the desk of strangers."""
        if self._by_desk and self.identity is not None:
            return f"{ASKED}.{stream}.{self.identity.public}"
        return f"$JS.API.DIRECT.GET.{stream}"

    def _sign(self, nonce: str) -> bytes:
        assert self.identity is not None
        return base64.b64encode(self.identity.sign_nonce(nonce.encode()))

    async def close(self) -> None:
        """Send what is pending and close."""
        self._closing = True
        with suppress(NatsError, OSError, asyncio.TimeoutError):
            if self.nc.is_connected:
                await self.nc.flush(timeout=1)
        await self._hang_up()
        metrics.BUS_CONNECTED.set(0)

    async def _hang_up(self) -> None:
        with suppress(Exception):
            # After a failed handshake, the first or one that was to reconnect, the library waits for a goodbye that never comes.
            async with asyncio.timeout(CLOSE_SECONDS):
                await self.nc.close()

    @property
    def connected(self) -> bool:
        """Return whether the connection stands right now."""
        return bool(self.nc.is_connected)

    def require(self) -> None:
        """Raise `Retry` while the broker is away, `Fatal` once the connection is closed for good."""
        if self.nc.is_closed:
            last = self.nc.last_error
            refused = self._refusals or "revoked" in str(last)
            why = self._refused() if refused else last or "closed by this side"
            raise Fatal(f"no connection to the broker any more: {why}")
        if not self.nc.is_connected:
            raise Retry(f"the broker at {self.url} is away; reconnecting", after=0.5, dependency="broker")

    async def request(self, subject: str, data: bytes, headers: dict[str, str] | None = None) -> Any:
        """Send and wait for the reply (a `Msg`). Raises `Retry` when none comes, `Invalid` when the key may not."""
        self.require()
        reply = asyncio.ensure_future(self.nc.request(subject, data, timeout=REQUEST_TIMEOUT, headers=headers))
        try:
            with self.failure_of(subject) as failed:
                await asyncio.wait((reply, failed), return_when=asyncio.FIRST_COMPLETED)
                if failed.done() and not reply.done():
                    raise failed.result()
                return reply.result()
        except (TimeoutError, NatsError, OSError) as error:
            raise self.explain(error, subject) from error
        finally:
            await end_tasks([reply])

    @contextmanager
    def failure_of(self, subject: str) -> Iterator[asyncio.Future[Exception]]:
        """Yield a future that gets the reason when the broker denies a message to `subject`, or the connection breaks."""
        failed: asyncio.Future[Exception] = asyncio.get_running_loop().create_future()
        entry = (subject, failed)
        self._underway.append(entry)
        try:
            yield failed
        finally:
            self._underway.remove(entry)
            failed.cancel()

    def not_permitted(self, subject: str) -> Invalid:
        """Return the error for a subject that this key may not use."""
        who = short_key(self.identity.public) if self.identity else "this connection"
        return Unusable(
            f"the broker does not let {who} use {in_words(subject)}; a key's pass opens only what its role may do",
            dependency="credentials",
            reason=reasons.REASON_NOT_PERMITTED,
        )

    def explain(self, error: BaseException, what: str) -> Exception:
        """Translate an error of the client library."""
        if isinstance(error, ConnectionClosedError):
            return Fatal(f"the connection to the broker at {self.url} is closed ({what})")
        if isinstance(error, (NoRespondersError, NoStreamResponseError, ServiceUnavailableError)):
            return self.silent(what, "if this stays, run `connito streams ensure`")
        if isinstance(error, (NatsTimeoutError, asyncio.TimeoutError, OutboundBufferLimitError, OSError)):
            return self.silent(what)
        return Fatal(f"unexpected error of the broker for {what}: {error}")

    def silent(self, what: str, otherwise: str = "") -> Retry:
        """Return the error for what gets no answer, with what `otherwise` is to be done than to wait for a committer."""
        after = "the committer hands on what strangers ask, and may be away" if self._by_desk else otherwise
        text = f"the broker at {self.url} did not answer for {in_words(what)} in time" + (f"; {after}" if after else "")
        return Retry(text, after=0.5, dependency="broker")

    async def _on_error(self, error: Exception) -> None:
        text = str(error)
        if not self.nc.is_connected and self._changed():
            self._renew()
        refused = any(word in text.lower() for word in ("authorization violation", "authentication revoked"))
        if (certificate := refusal(error, f"the broker at {self.url}")) is not None:
            self._report_certificate(certificate)
        if self._starting:
            self._give_up(
                certificate
                or (Invalid(self._refused(), reason=reasons.REASON_NOT_PERMITTED) if refused else None)
                or Retry(f"no broker at {self.url} ({text or type(error).__name__})", dependency="broker")
            )
            return
        if refused:
            # A broker that is just being reconfigured may refuse once; one that keeps doing so means it.
            self._refusals += 1
            if self._refusals == MAX_REFUSALS:
                log.error(self._refused(), security=True)
                self._closer = asyncio.create_task(self.nc.close())
        elif match := _DENIED.search(text.lower()):
            log.error("the broker denied a subject", security=True, action=match[1], subject=match[2])
            who = self.identity.public if self.identity else ""
            # A report that is denied must not be the cause of the next one.
            if not match[2].startswith(SECURITY_ROOT):
                report("denied", key=who, subject=match[2], reason=reasons.REASON_NOT_PERMITTED, detail=match[1])
            self._fail(lambda subject: self.not_permitted(subject) if subject.lower() == match[2] else None)
        else:
            log.debug("broker connection error", error=text or repr(error))

    def _give_up(self, problem: Exception) -> None:
        """Raise once every broker of the list was tried: what one of them refuses rather than that one is away."""
        self._tried.append(problem)
        if len(self._tried) >= len(self._addresses):
            raise next((tried for tried in self._tried if isinstance(tried, Invalid)), problem)

    def _report_certificate(self, refused: Invalid) -> None:
        """Report a certificate problem once; attempts go on, since a certificate may be renewed."""
        if self._refused_certificate is None or self._refused_certificate.reason != refused.reason:
            log.error(str(refused), security=True)
            report("certificate", reason=refused.reason, detail=str(refused))
        self._refused_certificate = refused

    def _refused(self) -> str:
        key = self.identity.public if self.identity else "a connection without a key"
        return f"the broker at {self.url} refuses {key}; the operator has to admit that key, start again then"

    async def _on_disconnected(self) -> None:
        metrics.BUS_CONNECTED.set(0)
        self._renew()
        if not self._closing and not self._starting:
            log.warning("lost the broker, reconnecting", url=self.url)
            self._lost_at = time.monotonic()
            self._fail(
                lambda subject: Retry(
                    f"lost the broker at {self.url} on the way to {in_words(subject)}", after=0.2, dependency="broker"
                )
            )

    def _renew(self) -> None:
        """Read authorities and our own certificate again, for the next handshake; what is half written, at the next attempt."""
        if self._context is not None:
            with suppress(Fatal):
                self._files = self.tls.files()
                self._context = self.nc.options["tls"] = self.tls.context()

    def _changed(self) -> bool:
        with suppress(Fatal):
            return self._context is not None and self.tls.files() != self._files
        return False

    def _fail(self, reason: Callable[[str], Exception | None]) -> None:
        for subject, failed in list(self._underway):
            error = reason(subject)
            if error is not None and not failed.done():
                failed.set_result(error)

    async def _on_reconnected(self) -> None:
        metrics.BUS_CONNECTED.set(1)
        metrics.BUS_RECONNECTS.inc()
        self._refusals, self._refused_certificate = 0, None
        log.info("broker is back", url=self.url, away_seconds=round(time.monotonic() - self._lost_at, 3))
        for callback in list(self.on_reconnect):
            callback()
        WAITING.answered("broker")

    async def _on_closed(self) -> None:
        if not self._closing and not self._starting:
            log.error("the broker closed the connection for good", url=self.url, error=str(self.nc.last_error))
            for callback in list(self.on_reconnect):
                callback()
