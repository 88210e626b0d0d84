"""Cuts the sleeps of the files that SHORT_SLEEP_IN names to SHORT_SLEEP seconds: polls of programs that have no option for it."""

import os
import sys
import time

_sleep, _most = time.sleep, float(os.environ["SHORT_SLEEP"])
_files = tuple(os.environ["SHORT_SLEEP_IN"].split(","))


def _short(seconds: float) -> None:
    polls = sys._getframe(1).f_code.co_filename.endswith(_files)
    _sleep(min(seconds, _most) if polls else seconds)


time.sleep = _short  # type: ignore[assignment]
