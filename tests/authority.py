"""A certificate authority for tests, by openssl: certificates that are good, that have run out, or are of a stranger."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from connito.wire.tls import Tls


@dataclass(frozen=True)
class Authority:
    """`issue` makes a key and a certificate for `localhost` and 127.0.0.1."""

    folder: Path
    name: str = "ca"

    @classmethod
    def make(cls, folder: Path, name: str = "ca") -> Authority:
        folder.mkdir(parents=True, exist_ok=True)
        authority = cls(folder, name)
        _openssl(
            "req", "-x509", *_KEY, "-days", "10", "-subj", f"/CN={name}",
            "-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign",
            "-keyout", authority.key, "-out", authority.certificate,
        )  # fmt: skip
        return authority

    @property
    def certificate(self) -> Path:
        return self.folder / f"{self.name}.pem"

    @property
    def key(self) -> Path:
        return self.folder / f"{self.name}.key"

    def issue(self, name: str, days: int = 10) -> Tls:
        """A negative number of days: one that has run out."""
        key, request, certificate = (self.folder / f"{name}.{end}" for end in ("key", "csr", "pem"))
        _openssl("req", "-new", *_KEY, "-subj", f"/CN={name}", "-keyout", key, "-out", request)
        extensions = self.folder / f"{name}.ext"
        extensions.write_text("subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
        _openssl(
            "x509", "-req", "-in", request, "-CA", self.certificate, "-CAkey", self.key, "-CAcreateserial",
            "-days", str(days), "-extfile", extensions, "-out", certificate,
        )  # fmt: skip
        return Tls(ca=self.certificate, certificate=certificate, key=key)


_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


def _openssl(*arguments: str | Path) -> None:
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)
