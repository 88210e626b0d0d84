"""Decode bytes that somebody's program wrote: by mark, as UTF-8, or in the encoding that they are likeliest to have."""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterator
from typing import BinaryIO
from unicodedata import category

from connito.data.reading.rows import Account, unreadable

CHUNK = 1 << 18
# UTF-32 first: its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"), (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"), (codecs.BOM_UTF16_BE, "utf-16-be"),
)  # fmt: skip
_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1a\x1c-\x1f\x7f]")
_PRINTABLE = re.compile(rb"[ -~]")
# Ideographs, kana, hangul, and their punctuation and wide forms. So much of a file tells its script.
_EASTERN, _SCRIPT = re.compile("[\u3000-\u30ff\u4e00-\u9fff\uac00-\ud7a3\uff00-\uffef]"), 1 << 14
# Text in an encoding of one or two bytes has none of these; random bytes have every tenth.
_TOLERATED_CONTROL = 0.01
# Encodings that text outside UTF-8 is in today; the first of equally likely ones is taken.
_LEGACY = [
    "cp1252", "cp932", "gb18030", "euc_jp", "big5", "euc_kr", "cp1251", "koi8_r", "cp1250", "cp1253", "cp1254",
    "cp1255", "cp1256", "cp1257", "cp866", "cp437", "cp850", "mac_roman", "iso2022_jp", "johab",
]  # fmt: skip
CONFIDENT = 0.8


def marked(head: bytes) -> tuple[str, int]:
    """Return the encoding that a mark at the beginning names, with its length; ("", 0) without one."""
    return next(((name, len(mark)) for mark, name in _MARKS if head.startswith(mark)), ("", 0))


def wide(head: bytes) -> str:
    """Return the encoding of UTF-16 or UTF-32 without a mark, known by the zero bytes of its ASCII and by its script; or ""."""
    whole = head[: len(head) // 4 * 4]
    if len(whole) < 4 or b"\0" not in whole:
        return ""
    zeros = [whole[place::4].count(0) / (len(whole) // 4) for place in range(4)]
    for name, high in (("utf-32-le", (2, 3)), ("utf-32-be", (0, 1))):
        low = min(zeros[place] for place in range(4) if place not in high)
        if all(zeros[place] > 0.98 for place in high) and low < 0.5 and _decodes(whole, name):
            return name
    bare = whole.replace(b"\0", b"")
    # Stray zero bytes in plain text; what has ASCII in UTF-16 is zero bytes by half, the rest is no UTF-8.
    if len(_PRINTABLE.findall(whole)) > 0.8 * len(whole) or (len(bare) > 0.75 * len(whole) and _decodes(bare, "utf-8")):
        return ""
    for name, high in (("utf-16-le", (1, 3)), ("utf-16-be", (0, 2))):
        odd, even = sum(zeros[place] for place in high), sum(zeros[place] for place in range(4) if place not in high)
        # Ideographs whose other byte is zero are letters in the other order, but never spaces.
        if odd > 0.02 and odd > 8 * even and re.search(r"[ \n]", _decodes(whole, name)):
            return name
    eastern = [name for name in ("utf-16-le", "utf-16-be") if _is_eastern(_decodes(whole[:_SCRIPT], name))]
    return eastern[0] if len(eastern) == 1 else ""


def _decodes(raw: bytes, encoding: str) -> str:
    """Return bytes as text where they are some in an encoding: valid, without control characters; else ""."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(raw)
    except UnicodeDecodeError:
        return ""
    return "" if _CONTROL.search(text.encode("utf-8", "replace")) else text


def _is_eastern(text: str) -> bool:
    """Tell whether text is Chinese, Japanese or Korean: in the other order of bytes it has characters that nobody has."""
    known = not any(category(character) in ("Cn", "Co") for character in set(text))
    return known and len(_EASTERN.findall(text)) > 0.5 * len(text)


def binary(head: bytes) -> bool:
    """Tell whether bytes are no text in any encoding of one or two bytes a character."""
    return len(_CONTROL.findall(head)) > max(1, _TOLERATED_CONTROL * len(head))


def likely(raw: bytes) -> tuple[str, float]:
    """Return the encoding, other than UTF-8, that the bytes are likeliest to be in, with a confidence from 0 to 1."""
    from charset_normalizer import from_bytes

    found = from_bytes(raw[:CHUNK], cp_isolation=_LEGACY)
    if not found:
        return "", 0.0
    least = min(match.chaos for match in found)
    near = [match for match in found if match.chaos <= least + 0.02]
    # One match stands for every encoding that gives the same text.
    named = [(match.coherence, -_LEGACY.index(name)) for match in near for name in _names(match.could_be_from_charset)]
    return _LEGACY[-max(named)[1]] if named else near[0].encoding, 1.0 - least


def _names(encodings: list[str]) -> list[str]:
    return [name for name in encodings if name in _LEGACY]


class Decoder:
    """Decode one file in pieces. UTF-8 until something in it is not; then, if all before was ASCII, what it is likeliest
    in, else with each broken byte replaced and counted."""

    def __init__(self, name: str, encoding: str, account: Account) -> None:
        self.name, self.encoding, self.account = name, encoding or "utf-8", account
        self.ascii, self.done = True, 0
        self._decoder = codecs.getincrementaldecoder(self.encoding)()
        self._lines = io.IncrementalNewlineDecoder(None, translate=True)
        self._tail = b""

    def decode(self, raw: bytes, final: bool = False) -> str:
        """Return the text of the next bytes, with line ends as `\\n` and without NUL characters."""
        raw, self._tail = self._tail + raw, b""
        try:
            text = self._decoder.decode(raw, final)
        except UnicodeDecodeError:
            text = self._recover(raw, final)
        self.ascii = self.ascii and text.isascii()
        self.done += len(raw)
        if "\0" in text or "\x1a" in text:  # The second ends files of MS-DOS.
            self.account.dropped["control characters removed"] += text.count("\0") + text.count("\x1a")
            text = text.replace("\0", "").replace("\x1a", "")
        return str(self._lines.decode(text, final))

    def _recover(self, raw: bytes, final: bool) -> str:
        # What the decoder kept of a character that the last piece cut off belongs in front again.
        kept = self._decoder.getstate()[0] if isinstance(self._decoder.getstate()[0], bytes) else b""
        raw = kept + raw
        if self.encoding == "utf-8" and self.ascii:
            return self._switch(raw, final)
        self._decoder = codecs.getincrementaldecoder(self.encoding)("replace")
        text = self._decoder.decode(raw, final)
        self.account.dropped["broken characters replaced"] += text.count("\ufffd")
        return text

    def _switch(self, raw: bytes, final: bool) -> str:
        valid = codecs.getincrementaldecoder("utf-8")("ignore").decode(raw)
        broken = len(raw) - len(valid.encode("utf-8", "surrogatepass"))
        multibyte = sum(1 for character in valid[:CHUNK] if character > "\x7f")
        if multibyte > broken:
            # UTF-8 with a few broken places, not another encoding.
            self.ascii = False
            return self._recover(raw, final)
        first = next(place for place, byte in enumerate(raw) if byte > 0x7F)
        try:
            guess, confidence = likely(raw[max(0, first - 2000) :])
        except ImportError as error:
            needed = "telling other encodings takes charset-normalizer: pip install 'connito[data]'"
            raise unreadable(f"{self.name} is not UTF-8; {needed}") from error
        if not guess or confidence < CONFIDENT:
            raise unreadable(
                f"{self.name} is not UTF-8 (byte {self.done + first} is {raw[first]:#04x}) and its encoding is unclear; "
                "convert it with `iconv -f ENCODING -t utf-8`"
            )
        self.encoding = guess
        self.account.note(f"{self.name} was read as {guess}, confidence {confidence:.0%}")
        self._decoder = codecs.getincrementaldecoder(guess)("replace")
        text = self._decoder.decode(raw, final)
        self.account.dropped["broken characters replaced"] += text.count("\ufffd")
        return text


def texts(stream: BinaryIO, name: str, head: bytes, account: Account) -> Iterator[str]:
    """Yield the text of a stream in pieces. `head` is its beginning, which decides the encoding and is read again."""
    encoding, skip = marked(head)
    decoder = Decoder(name, encoding or wide(head), account)
    stream.read(skip)
    while raw := stream.read(CHUNK):
        account.bytes += len(raw)
        if text := decoder.decode(raw):
            yield text
    if text := decoder.decode(b"", final=True):
        yield text
    account.encodings[decoder.encoding] += 1
