"""TLS for the bus and the APIs: an authority of one's own, client certificates, and what a refusal means.

Files are read again when a broker is lost and whenever they have changed while it is away, at every handshake of an API, and
before a call of one: neither a renewed certificate nor another authority needs a restart.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self, cast

from connito.errors import Fatal, Invalid
from connito.v1 import reasons_pb2 as reasons

if TYPE_CHECKING:
    import grpc

Mode = Literal["off", "tls", "mtls"]
# X.509 verification results: not yet valid, expired.
_OUT_OF_TIME = (9, 10)


@dataclass(frozen=True)
class Tls:
    """`ca`: whom to trust, None: this machine's authorities. `certificate` and `key`: who we are, where one is asked.

    `api` is how gRPC is spoken: in clear, with a server's certificate, or with one on both sides.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None
    api: Mode = "off"

    def __post_init__(self) -> None:
        if (self.certificate is None) != (self.key is None):
            raise Invalid("a certificate needs its key: set both CONNITO_TLS_CERT and CONNITO_TLS_KEY, or neither")

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """Read the TLS settings of a command from the variables that services use. Raises `Invalid`."""
        ca, certificate, key = (
            Path(path) if (path := environment.get(f"CONNITO_TLS_{name}", "")) else None
            for name in ("CA", "CERT", "KEY")
        )
        mode = environment.get("CONNITO_GRPC_TLS", "") or "off"
        if mode not in ("off", "tls", "mtls"):
            raise Invalid(f"CONNITO_GRPC_TLS is {mode!r}; it is off, tls or mtls")
        return cls(ca, certificate, key, cast(Mode, mode))

    @property
    def own(self) -> bool:
        """Return whether anything differs from what the machine does by itself."""
        return self.ca is not None or self.certificate is not None

    def context(self) -> ssl.SSLContext:
        """Return a client's context. Raises `Fatal` naming the file that cannot be read."""
        try:
            context = ssl.create_default_context(cafile=None if self.ca is None else str(self.ca))
            context.minimum_version = ssl.TLSVersion.TLSv1_2
        except (OSError, ssl.SSLError) as error:
            raise Fatal(f"cannot read the authorities in {self.ca}: {error}; see CONNITO_TLS_CA") from error
        if self.certificate is None or self.key is None:
            return context
        try:
            context.load_cert_chain(self.certificate, self.key)
        except (OSError, ssl.SSLError) as error:
            raise Fatal(
                f"cannot read {self.certificate} with {self.key}: {error}; see CONNITO_TLS_CERT and CONNITO_TLS_KEY"
            ) from error
        return context

    def files(self) -> tuple[bytes | None, ...]:
        """Return what the files hold now, for who has used them to see whether they have changed. Raises `Fatal`."""
        return tuple(map(_read, (self.ca, self.certificate, self.key)))

    def server_credentials(self) -> grpc.ServerCredentials:
        """Return the server credentials of an API. Raises `Fatal` without a certificate, or for mTLS without an authority."""
        if self.certificate is None:
            raise Fatal("CONNITO_GRPC_TLS asks for a certificate: set CONNITO_TLS_CERT and CONNITO_TLS_KEY")
        if self.api == "mtls" and self.ca is None:
            raise Fatal("CONNITO_GRPC_TLS=mtls asks clients for certificates: say of which authority, CONNITO_TLS_CA")
        import grpc

        return grpc.dynamic_ssl_server_credentials(
            self._configuration(), self._configuration, require_client_authentication=self.api == "mtls"
        )

    def _configuration(self) -> grpc.ServerCertificateConfiguration:
        import grpc

        assert self.key is not None
        assert self.certificate is not None
        pair = (_read(self.key) or b"", _read(self.certificate) or b"")
        roots = _read(self.ca) if self.api == "mtls" else None
        return grpc.ssl_server_certificate_configuration([pair], roots)

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """Return the client credentials of an API. Raises `Fatal` naming the file that cannot be read."""
        import grpc

        ca, certificate, key = self.files()
        return grpc.ssl_channel_credentials(ca, key, certificate)

    def diagnose(self, address: str, timeout_s: float = 3.0) -> Invalid | None:
        """Make a handshake with an API at `host:port` to learn why calls fail: gRPC itself only says that it is unavailable.

        Blocking. None when certificates are not the reason.
        """
        if self.api == "off":
            return None
        host, _, port = address.rpartition(":")
        context = self.context()
        context.set_alpn_protocols(["h2"])
        try:
            with (
                socket.create_connection((host, int(port)), timeout_s) as plain,
                context.wrap_socket(plain, server_hostname=host) as wrapped,
            ):
                return None if _greeted(wrapped) else required(f"the API at {address}")
        except (OSError, ValueError) as error:
            return refusal(error, f"the API at {address}")


PLAIN = Tls()


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as error:
        raise Fatal(f"cannot read {path}: {error.strerror}; see CONNITO_TLS_CA, _CERT and _KEY") from error


def refusal(error: BaseException | str, who: str, trust: str = "CONNITO_TLS_CA") -> Invalid | None:
    """Return the refusal behind a failed handshake with `who`; None when the failure is not about certificates. `trust`: the
    variable that names the authorities."""
    text = str(error).lower()
    code = error.verify_code if isinstance(error, ssl.SSLCertVerificationError) else 0
    if code in _OUT_OF_TIME or "has expired" in text or "not yet valid" in text or "certificate expired" in text:
        return Invalid(
            f"a certificate between here and {who} has expired or is not valid yet ({_short(text)}); renew it, and check "
            "the clocks",
            reason=reasons.REASON_CERTIFICATE_EXPIRED,
        )
    if any(alert in text for alert in ("certificate required", "bad certificate", "alert unknown ca")):
        return required(who)
    if code or "certificate_verify_failed" in text or "certificate verify failed" in text:
        return Invalid(
            f"the certificate of {who} is not to be trusted here ({_short(text)}); set {trust} to the authority "
            "that signed it, and use the name that it was made for",
            reason=reasons.REASON_CERTIFICATE_UNTRUSTED,
        )
    return None


def required(who: str) -> Invalid:
    """Return the refusal of a server that closed after the handshake: it requires a certificate that it can check."""
    return Invalid(
        f"{who} asks for a client certificate that its authority has signed and that is valid now; set CONNITO_TLS_CERT "
        "and CONNITO_TLS_KEY, or renew them",
        reason=reasons.REASON_CERTIFICATE_REQUIRED,
    )


def _greeted(wrapped: ssl.SSLSocket) -> bool:
    """Wait for the server's first bytes: with TLS 1.3 it checks the client's certificate after the handshake."""
    try:
        return bool(wrapped.recv(1))
    except ConnectionResetError:
        return False


def _short(text: str) -> str:
    return text.rpartition("certificate verify failed: ")[2].partition(" (_ssl")[0][-160:]
