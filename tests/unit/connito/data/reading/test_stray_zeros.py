"""Zero bytes in plain text do not make it UTF-16."""

from __future__ import annotations

import pytest
from connito.data.reading.decode import binary, wide


@pytest.mark.parametrize("line", ["alpha \0 beta\n\n", "größe \0 und Weite\n"])
def test_plain_text_with_stray_zero_bytes_is_not_wide(line: str) -> None:
    head = (line * 400).encode()
    assert wide(head) == ""
    assert binary(head), "and with so many of them it is no text"


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize(
    "text",
    [
        "The parties agree.\n",
        "Старый мельник жил у реки.\n",
        "古い水車小屋は 川の そばに あります。\n",
        "Ο γέρος μυλωνάς ζει δίπλα στο ποτάμι.\n",
        "Ο γέρος μυλωνάς ζει δίπλα στο ποτάμι. ",
        "Старый мельник жил у реки. ",
        "The parties agree. ",
    ],
)
def test_utf16_without_a_mark_is_still_known(text: str, name: str) -> None:
    assert wide((text * 200).encode(name)) == name


CHINESE = "一座老磨坊立在河边，水车日夜不停地转动。每天清晨，磨坊主都会走到门口，看一看天色。\n"
KOREAN = "가을이 오면 가마솥에 가득 밥을 짓고 나누어 먹었다. 저 방앗간은 가난한 이들의 집이었다.\n"


@pytest.mark.parametrize("name", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("text", [CHINESE, KOREAN, "東京 大阪 " * 8, CHINESE.replace("。", "。一一一")])
@pytest.mark.parametrize("times", [1, 200])
def test_eastern_utf16_without_a_mark_is_known(text: str, name: str, times: int) -> None:
    # One line, too, whose other bytes hold no line's end.
    assert wide((text * times).encode(name)) == name


@pytest.mark.parametrize(
    "raw",
    [
        ("Der M\xfcller, \xe4lter als alle, sagte \0 nichts.\n" * 100).encode("latin-1"),
        (KOREAN * 50).encode("euc_kr") + b"\0\n",
        (CHINESE * 50).encode("gb18030") + b"\0\n",
        bytes(place * 7919 % 65521 >> shift & 255 for place in range(4000) for shift in (8, 0)),
    ],
)
def test_what_is_no_utf16_is_not_taken_for_eastern_text(raw: bytes) -> None:
    assert wide(raw) == ""
