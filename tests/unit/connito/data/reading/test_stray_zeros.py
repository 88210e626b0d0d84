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
    ],
)
def test_utf16_without_a_mark_is_still_known(text: str, name: str) -> None:
    assert wide((text * 200).encode(name)) == name
