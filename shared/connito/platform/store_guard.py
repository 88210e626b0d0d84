"""Credentials between the parts of the object store, so that no port of it but S3 serves anybody who has none.

SeaweedFS is a master, a volume server, a filer and a gateway. Each listens, and as they come they trust whoever reaches them:
a filer lists, returns and deletes what the gateway asks signatures for. Made anew at each start; nobody else has them.
"""

from __future__ import annotations

import datetime
import secrets
from pathlib import Path

import grpc

from connito.errors import Fatal
from connito.files import write_durably

NAME = "connito-store"
_CERTIFICATE, _KEY = "parts.pem", "parts.key"
_PARTS = ("master", "volume", "filer", "s3", "client", "msg_broker", "admin", "worker", "mq")
_SIGNED = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")


def write(folder: Path, seen_at: str = "") -> None:
    """Write `security.toml`, which the server finds in its folder, and the certificate that its parts know each other by.

    seen_at: where the server finds the folder; empty: where it is.
    Raises `Fatal` when the package that makes certificates is not installed.
    """
    for name, content in zip((_CERTIFICATE, _KEY), _certificate(), strict=True):
        write_durably(folder / name, content, 0o600)
    certificate, key = (f"{seen_at or folder.absolute()}/{name}" for name in (_CERTIFICATE, _KEY))
    # Of a busy machine: what was allowed is asked for a little later.
    lines = [f'[{name}]\nkey = "{secrets.token_hex(32)}"\nexpires_after_seconds = 60' for name in _SIGNED]
    lines += ["[filer.expose_directory_metadata]\nenabled = false", f'[grpc]\nca = "{certificate}"']
    lines += [f'[grpc.{part}]\ncert = "{certificate}"\nkey = "{key}"' for part in _PARTS]
    write_durably(folder / "security.toml", "\n".join(lines) + "\n", 0o600)


def channel(folder: Path, port: int) -> grpc.Channel:
    """Connect to one part of the store that was started in `folder`."""
    certificate, key = (folder / _CERTIFICATE).read_bytes(), (folder / _KEY).read_bytes()
    credentials = grpc.ssl_channel_credentials(certificate, key, certificate)
    options = [("grpc.ssl_target_name_override", NAME)]
    return grpc.secure_channel(f"127.0.0.1:{port}", credentials, options)


def _certificate() -> tuple[bytes, bytes]:
    """Return a self-signed certificate and its key, as PEM. It is its own authority: only its holder is let in."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric import ec
        from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
    except ImportError as error:
        raise Fatal("cryptography is not installed; `pip install 'connito[demo]'` brings it") from error
    from cryptography.hazmat.primitives.hashes import SHA256

    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, NAME)])
    uses = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(uses, critical=False)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(NAME)]), critical=False)
        .sign(key, SHA256())
    )
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    return built.public_bytes(encoding), key.private_bytes(encoding, form, serialization.NoEncryption())
