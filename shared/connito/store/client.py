"""The S3 client, on the store's clock.

A request's signature holds its time, and a store refuses one from more than a quarter of an hour away. Every answer says in
its `Date` what time the store has; requests and links are signed by that.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from email.utils import parsedate_to_datetime
from typing import Any

import urllib3
from minio import Minio
from minio.credentials import Provider
from minio.error import S3Error
from minio.time import to_amz_date

# `Date` has whole seconds: what is smaller is not the clock but the rounding and the way.
NOISE_SECONDS = 2.0
# From here on a refusal may be due to the clock.
SKEW_SECONDS = 60.0

# Until there is a connection, and until there is an answer: as long as a slow store takes for a large object.
CONNECT_SECONDS, READ_SECONDS = 3.0, 60.0
# A request with at most so many bytes is asked again after so long.
SMALL_BYTES, SOON_SECONDS = 1 << 20, 2.0


class StoreClock:
    """The store's time: by `steady`, a clock that nobody sets, as the store last told it; before, what `wall` says."""

    def __init__(self, wall: Callable[[], float] = time.time, steady: Callable[[], float] = time.monotonic) -> None:
        self._steady, self._ahead = steady, wall() - steady()

    def now(self) -> datetime.datetime:
        """Return the store's time, in UTC."""
        return datetime.datetime.fromtimestamp(self._steady() + self._ahead, datetime.UTC)

    def hear(self, date: str) -> None:
        """Take over a `Date` that has just arrived."""
        try:
            told = parsedate_to_datetime(date).timestamp() + 0.5
        except (TypeError, ValueError):
            return
        ahead = told - self._steady()
        if abs(ahead - self._ahead) > NOISE_SECONDS:
            self._ahead = ahead


class _Pool(urllib3.PoolManager):
    """Connections that listen for the time, and ask a second time where a small request is not answered soon.

    SeaweedFS holds what reaches it in the first moment after its start for 13 s, and answers the same at once a moment later.
    """

    def __init__(self, clock: StoreClock, **options: Any) -> None:
        super().__init__(**options)
        self._clock = clock

    def urlopen(self, method: str, url: str, redirect: bool = True, **kw: Any) -> urllib3.BaseHTTPResponse:  # type: ignore[override]
        """Send a request and note the time that the answer tells."""
        body = kw.get("body") or b""
        # A second one of these does no harm.
        small = method in ("HEAD", "PUT") and isinstance(body, bytes) and len(body) <= SMALL_BYTES
        soon = {"timeout": urllib3.Timeout(connect=CONNECT_SECONDS, read=SOON_SECONDS)} if small else {}
        try:
            response = super().urlopen(method, url, redirect, **(kw | soon))
        except urllib3.exceptions.HTTPError as error:
            if not (small and isinstance(getattr(error, "reason", error), urllib3.exceptions.ReadTimeoutError)):
                raise
            response = super().urlopen(method, url, redirect, **kw)
        self._clock.hear(response.headers.get("Date", ""))
        return response


class Client(Minio):  # type: ignore[misc]
    """`Minio` whose requests are signed by `clock`. A request that only the clock was wrong for is sent again."""

    def __init__(self, endpoint: str, clock: StoreClock, *, credentials: Provider, secure: bool, region: str) -> None:
        self.clock = clock
        self._pool = _Pool(
            clock,
            maxsize=8,
            timeout=urllib3.Timeout(connect=CONNECT_SECONDS, read=READ_SECONDS),
            retries=urllib3.Retry(total=0, redirect=0),
        )
        super().__init__(endpoint, credentials=credentials, secure=secure, region=region, http_client=self._pool)

    def _build_headers(self, *args: Any, **kw: Any) -> tuple[Any, datetime.datetime]:
        headers, _ = super()._build_headers(*args, **kw)
        date = self.clock.now()
        headers["x-amz-date"] = to_amz_date(date)
        return headers, date

    def _url_open(self, *args: Any, **kw: Any) -> Any:
        began = self.clock.now()
        try:
            return super()._url_open(*args, **kw)
        except S3Error:
            if abs((self.clock.now() - began).total_seconds()) < SKEW_SECONDS:
                raise
            return super()._url_open(*args, **kw)
