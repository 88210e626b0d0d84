"""Set the clock of a running process, in whatever language it is written.

A program asks for the time in a page that the kernel puts into each process (its vDSO). There, of one process, that question is
replaced by a call to the kernel with some seconds added for the wall clock: `libfaketime` sets the clocks of programs that are
linked with the C library, and broker and store are not.
"""

from __future__ import annotations

import platform
import signal
import struct
import time
from pathlib import Path

import psutil
import pytest

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_DYNSYM = 11
# mov eax, 228 (clock_gettime); syscall; test edi, edi (wall clock: 0); jne end; mov rcx, [rip + 4]; add [rsi], rcx; end: ret
_CODE = bytes.fromhex("b8e4000000 0f05 85ff 750a 488b0d04000000 48010e c3")


def set_clock(pid: int, ahead: int) -> None:
    """Let a process read the wall clock so many seconds ahead of this machine's. Skips the test where that cannot be done."""
    if platform.machine() != "x86_64" or not hasattr(signal, "SIGSTOP"):
        pytest.skip("clocks are set on Linux for x86-64 only")
    process = psutil.Process(pid)
    process.suspend()
    try:
        while process.status() != psutil.STATUS_STOPPED:
            time.sleep(0.001)
        _write(pid, struct.pack("<q", ahead))
    except PermissionError as error:
        pytest.skip(f"this user may not write into a process: {error}")
    finally:
        process.resume()


def _write(pid: int, ahead: bytes) -> None:
    rows = Path(f"/proc/{pid}/maps").read_text().splitlines()
    begin, end = (int(place, 16) for place in next(row for row in rows if "[vdso]" in row).split()[0].split("-"))
    with Path(f"/proc/{pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(begin)
        at, size = _found(memory.read(end - begin), b"__vdso_clock_gettime")
        assert size >= len(_CODE) + len(ahead)
        for place, content in ((at + len(_CODE), ahead), (at, _CODE)):
            memory.seek(begin + place)
            memory.write(content)


def _found(page: bytes, name: bytes) -> tuple[int, int]:
    """Return place and size of a function in an ELF file of 64 bits."""
    (start,), (size, count) = struct.unpack_from("<Q", page, 0x28), struct.unpack_from("<HH", page, 0x3A)
    sections = [_SECTION.unpack_from(page, start + size * number) for number in range(count)]
    table = next(section for section in sections if section[1] == _DYNSYM)
    names = sections[table[6]][4]
    for at in range(table[4], table[4] + table[5], _SYMBOL.size):
        word, _, _, _, value, length = _SYMBOL.unpack_from(page, at)
        if page.startswith(name + b"\0", names + word):
            return value, length
    raise LookupError(name)
