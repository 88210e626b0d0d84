"""Settings that a service reads from `CONNITO_<NAME>` variables: declared once, checked at start, listed by `--help`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic_core import PydanticUndefined
from pydantic_settings import BaseSettings, SettingsConfigDict

from connito.errors import Fatal, Invalid
from connito.runtime.variables import PREFIX, is_older, unknown
from connito.wire.addresses import broker_addresses
from connito.wire.subjects import check_token
from connito.wire.tls import Tls


def default_cache_dir() -> Path:
    """Return `$XDG_CACHE_HOME/connito`, or `~/.cache/connito`. Raises `Invalid` for a user without a home."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "connito"
    except RuntimeError as error:
        raise Invalid("this user has no home folder for a cache; set HOME or CONNITO_CACHE_DIR") from error


class ServiceSettings(BaseSettings):
    """Settings that every service has; a service subclasses it to add its own."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", frozen=True)

    nats_url: str = Field("nats://127.0.0.1:4222", description="address of the broker; several separated by commas")
    key_file: Path = Field(description="file with this service's nkey seed")
    roster: Path | None = Field(None, description="the operator's roster: which keys speak for which role")
    s3_endpoint: str = Field("http://127.0.0.1:8333", description="address of the artifact store")
    s3_public_endpoint: str = Field("", description="its address as miners see it; empty: the same")
    s3_access_key: str = Field("", description="store access key; empty for who has no bucket credentials")
    s3_secret_key: SecretStr = Field(SecretStr(""), description="store secret key")
    s3_credentials: Literal["keys", "iam", "web-identity"] = Field(
        "keys",
        description="the two keys above; what AWS gives the pod or machine; or a token file, for an STS of your own",
    )
    s3_sts_endpoint: str = Field("", description="with web-identity: the STS that takes the token, MinIO's for example")
    s3_token_file: Path = Field(
        Path("/var/run/secrets/connito/token"), description="with web-identity: the file that the token is in"
    )
    s3_bucket: str = Field("connito", description="bucket that holds the artifacts")
    s3_region: str = Field("us-east-1", description="region that requests are signed for")
    cache_dir: Path = Field(default_factory=default_cache_dir, description="where fetched artifacts are kept")
    cache_max_bytes: int = Field(
        default=0, ge=0, description="the most of it, hand-ins going first; 0 leaves a twentieth of the disk free"
    )
    state_dir: Path | None = Field(
        None,
        description="where it keeps what it has read of the log, and so starts in seconds; empty: it reads all of it again",
    )
    lent: Path | None = Field(
        None,
        description="file of `connito access lend`: opens what was sealed before this key was admitted",
    )
    http_host: str = Field("127.0.0.1", description="address that /metrics, /waiting, /healthz and /readyz listen on")
    http_port: int = Field(0, ge=0, le=65535, description="their port; 0 takes a free one")
    grpc_host: str = Field("127.0.0.1", description="address that the API listens on, where there is one")
    grpc_port: int = Field(0, ge=0, le=65535, description="its port; 0 takes a free one")
    grpc_advertise: str = Field("", description="host:port that others reach the API at; empty: where it listens")
    tls_ca: Path | None = Field(
        None, description="authorities that bus and APIs are trusted by; empty: the machine's own"
    )
    tls_cert: Path | None = Field(None, description="certificate of this process, for the bus and for APIs")
    tls_key: Path | None = Field(None, description="its key")
    grpc_tls: Literal["off", "tls", "mtls"] = Field(
        "off",
        description="how APIs are served and called: in clear, with a server's certificate, with one on both sides",
    )
    oidc_issuer: str = Field(
        "", description="identity provider whose tokens let people read at APIs and console; empty: none do"
    )
    oidc_audience: str = Field("", description="the audience that such a token has to be for")
    oidc_claim: str = Field(
        "groups", description="its claim that lists ORGANISATION:owner, :submitter or :reader, or operator"
    )
    log_format: Literal["json", "console"] = Field("json", description="json lines, or coloured text")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least that is logged")
    compute_dir: Path | None = Field(None, description="folder of the machine-wide compute budget; empty: no budget")
    compute_slots: int = Field(1, ge=1, description="heavy computations that may run on this machine at once")
    torch_threads: int = Field(0, ge=0, description="threads per computation; 0: one per core that it may use")
    run: str = Field("", description="take part in this run only; empty: in every run")
    drain_seconds: float = Field(10.0, ge=0, description="time to finish what was started after SIGTERM")

    @field_validator("run")
    @classmethod
    def _names_a_run(cls, run: str) -> str:
        try:
            return check_token(run, "the run") if run else run
        except Invalid as error:
            raise ValueError(str(error)) from error

    @field_validator("nats_url")
    @classmethod
    def _names_brokers(cls, url: str) -> str:
        try:
            return ",".join(broker_addresses(url))
        except Invalid as error:
            raise ValueError(str(error)) from error

    @property
    def tls(self) -> Tls:
        """Return the TLS settings. Raises `Invalid` for a certificate without its key."""
        return Tls(self.tls_ca, self.tls_cert, self.tls_key, self.grpc_tls)

    @classmethod
    def load(cls) -> Self:
        """Read the environment. Raises `Fatal` naming each variable that is missing or wrong, or that nothing reads."""
        own = (PREFIX + name.upper() for name in cls.model_fields)
        if strange := "; ".join(unknown(os.environ, own)):
            version: str = sys.modules["connito"].__version__
            if not is_older(version, os.environ):
                raise Fatal(f"bad settings: {strange}. `--help` lists the variables of this service")
            print(f"warning: {strange}; they were written for a version after {version}", file=sys.stderr)
        try:
            return cls()  # type: ignore[call-arg]  # the environment fills them in
        except ValidationError as error:
            problems = "; ".join(
                f"{PREFIX}{'.'.join(map(str, detail['loc'])).upper()}: {_plain(detail['type'], detail['msg'])}"
                for detail in error.errors(include_url=False)
            )
            raise Fatal(f"bad settings: {problems}. Set these variables; `--help` lists all of them") from error

    @classmethod
    def describe(cls) -> list[tuple[str, str, str]]:
        """Return (variable, default, description) of every setting, in the order of declaration."""
        rows = []
        for name, field in cls.model_fields.items():
            default = field.get_default(call_default_factory=True, validated_data={})
            shown = "required" if default is PydanticUndefined else "" if default is None else str(default)
            rows.append((PREFIX + name.upper(), shown, field.description or ""))
        return rows


class ModelSettings(ServiceSettings):
    """Settings of a service that runs a model."""

    device: str = Field("", description="cpu, cuda, cuda:1, …; empty: the first GPU, or the CPU")


def _plain(kind: str, message: str) -> str:
    message = message.removeprefix("Value error, ")
    return "is not set" if kind == "missing" else message[:1].lower() + message[1:]
