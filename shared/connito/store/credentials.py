"""Find a service's credentials for the store: two keys, or the identity of the pod or machine that it runs on."""

from __future__ import annotations

import urllib3
from minio.credentials import Credentials, IamAwsProvider, Provider, StaticProvider, WebIdentityProvider

from connito.errors import Fatal, Retry
from connito.runtime.settings import ServiceSettings


class Identity(Provider):  # type: ignore[misc]
    """Credentials that end and are renewed. Raises `Retry` while nobody hands any out."""

    def __init__(self, source: Provider) -> None:
        self._source = source

    def retrieve(self) -> Credentials:
        """Return what holds now."""
        try:
            return self._source.retrieve()
        except (ValueError, OSError, urllib3.exceptions.HTTPError) as error:
            said = f"no credentials for the store: {error}. Check the identity of this pod or machine, and the STS"
            raise Retry(said, dependency="credentials") from error


def provider(settings: ServiceSettings) -> Provider | None:
    """Return what to ask for credentials, which it renews by itself; None where keys are needed and not there.

    `iam` takes what AWS offers: IRSA, EKS pod identity, ECS, the instance. `web-identity` changes a token that the cluster
    renews in a file (a projected service account token, on any cloud) for credentials at an STS.
    """
    if settings.s3_credentials == "iam":
        return Identity(IamAwsProvider())
    if settings.s3_credentials == "keys":
        secret = settings.s3_secret_key.get_secret_value()
        return StaticProvider(settings.s3_access_key, secret) if settings.s3_access_key and secret else None
    if not settings.s3_sts_endpoint:
        raise Fatal(
            "CONNITO_S3_CREDENTIALS is web-identity: name the STS that takes the token in CONNITO_S3_STS_ENDPOINT"
        )

    def token() -> dict[str, str]:
        return {"access_token": settings.s3_token_file.read_text().strip()}

    return Identity(WebIdentityProvider(jwt_provider_func=token, sts_endpoint=settings.s3_sts_endpoint))
