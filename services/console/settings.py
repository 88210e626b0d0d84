"""The console's settings."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Network, ip_network
from urllib.parse import urlsplit

from connito.errors import Fatal
from connito.render import formats
from connito.runtime.settings import ServiceSettings
from pydantic import Field, SecretStr

LOOPBACK = ("127.0.0.1", "::1", "localhost")
TOKEN_LENGTH = 16


class ConsoleSettings(ServiceSettings):
    """Settings of the console: its address and access."""

    console_host: str = Field("127.0.0.1", description="address that the page listens on; any other needs a token")
    console_port: int = Field(0, ge=0, le=65535, description="its port; 0 takes a free one")
    console_token: SecretStr = Field(
        SecretStr(""), description="who knows it may read; required unless the page listens on loopback only"
    )
    console_user_header: str = Field(
        "", description="header in which a proxy that speaks OpenID Connect names the user, e.g. X-Forwarded-Email"
    )
    console_proxies: str = Field(
        "", description="addresses or networks of that proxy, by commas; from elsewhere the header counts for nothing"
    )
    console_public_leaderboard: bool = Field(
        False,
        description="true shows the leaderboard of public runs to everybody who reaches the page, without a token",
    )
    console_oidc_client: str = Field(
        "", description="the console as CONNITO_OIDC_ISSUER knows it: readers sign in there, with a code and PKCE"
    )
    console_oidc_secret: SecretStr = Field(SecretStr(""), description="its secret, where the provider gave it one")
    console_oidc_scopes: str = Field("openid", description="what it asks the provider for, by spaces")
    console_url: str = Field("", description="https:// address that readers find the console at; needed to sign in")
    console_secure_cookie: bool = Field(False, description="true where a proxy in front of the console speaks TLS")

    console_serve_url: str = Field(
        "",
        description="address of a `connito serve`, e.g. http://127.0.0.1:8000/v1: readers then try experts beside their base",
    )
    console_serve_key: SecretStr = Field(SecretStr(""), description="the console's key there, where it asks for one")

    def serve(self) -> str:
        """Return the address of the server of experts. Raises `Fatal` for what is none."""
        url = self.console_serve_url.strip()
        try:
            parts = urlsplit(url)
            good = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
            (parts.hostname or "").encode("idna")
        except ValueError:
            good = False
        if url and "@" in url:
            raise Fatal(
                "CONNITO_CONSOLE_SERVE_URL holds a user's name, and pages show that address; write it without, and the key "
                "as CONNITO_CONSOLE_SERVE_KEY"
            )
        if url and not good:
            raise Fatal(f"CONNITO_CONSOLE_SERVE_URL is {url!r}; write an address like http://127.0.0.1:8000/v1")
        return url

    def proxies(self) -> list[IPv4Network | IPv6Network]:
        """Return the networks that may name a user. Raises `Fatal` for what is no network."""
        try:
            return [ip_network(part.strip()) for part in self.console_proxies.split(",") if part.strip()]
        except ValueError as error:
            raise Fatal(f"CONNITO_CONSOLE_PROXIES: {error}; write addresses or networks, e.g. 10.1.0.0/16") from error

    def check_access(self) -> str:
        """Return the token, or the empty string where none is needed. Raises `Fatal` where everybody could read."""
        token = self.console_token.get_secret_value()
        if self.console_user_header and not self.proxies():
            raise Fatal(
                f"anybody can send {self.console_user_header}; set CONNITO_CONSOLE_PROXIES to the address of the proxy that "
                "does, or leave CONNITO_CONSOLE_USER_HEADER out"
            )
        if self.console_oidc_client and not (self.oidc_issuer and self.console_url):
            raise Fatal(
                "readers can sign in where CONNITO_OIDC_ISSUER, CONNITO_CONSOLE_OIDC_CLIENT and CONNITO_CONSOLE_URL are all set"
            )
        guarded = token or self.console_user_header or self.oidc_issuer
        if not guarded and self.console_host not in LOOPBACK:
            raise Fatal(
                f"the console would show every run to whoever reaches {self.console_host}; set CONNITO_CONSOLE_TOKEN "
                f"to at least {TOKEN_LENGTH} random characters, or CONNITO_CONSOLE_HOST to 127.0.0.1"
            )
        if token and len(token) < TOKEN_LENGTH:
            raise Fatal(
                f"CONNITO_CONSOLE_TOKEN has {formats.count(len(token), 'character')} "
                f"and can be guessed; use at least {TOKEN_LENGTH}, "
                "for example from `openssl rand -hex 24`"
            )
        return token
