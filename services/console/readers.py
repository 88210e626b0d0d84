"""Access for readers as the settings say (token, proxy or sign-in), and the server that they try experts on."""

from __future__ import annotations

from connito.service.oidc import secure, tokens_of
from connito.wire.identity import Identity
from connito.wire.roster import Roster

from .access import Access
from .pages import LEADERBOARD
from .settings import ConsoleSettings
from .sign_in import SignIn
from .trial import Trial


def access_of(settings: ConsoleSettings, roster: Roster, identity: Identity, token: str) -> Access:
    """Return the access that the settings ask for. Raises `Fatal`, `Invalid` for those that are not whole."""
    public = [LEADERBOARD] if settings.console_public_leaderboard else []
    tokens, sign_in = tokens_of(settings, roster), None
    if tokens is not None and settings.console_oidc_client:
        sign_in = SignIn(
            tokens, settings.console_oidc_client, settings.console_oidc_secret.get_secret_value(),
            secure(settings.console_url, "CONNITO_CONSOLE_URL"), settings.console_oidc_scopes,
            identity.derive("console", "sign-in"),
        )  # fmt: skip
    return Access(
        token, user_header=settings.console_user_header, proxies=settings.proxies(), public=public, tokens=tokens,
        sign_in=sign_in,
    )  # fmt: skip


def trial_of(settings: ConsoleSettings) -> Trial:
    """Return the server of experts that the settings name. Raises `Fatal` for an address that is none."""
    return Trial(settings.serve(), settings.console_serve_key.get_secret_value())
