"""Machine code as bytes that run wherever they lie, on Linux with x86-64.

An object file is linked at once, as far as it can be: code and constants are laid out one after the
other, so that the distances between them, all that position-independent code asks for, are known
(System V ABI, AMD64 supplement). Calls to the C library go to stubs at the end, jumps to addresses
that are filled in when the image is loaded. The few relocations that such code has are known here;
whatever has another is refused, never guessed at.

An image is a line "entry stubs names" (offsets of the function and of the stubs, names joined by
commas), then the bytes.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
import sys
from typing import Any, NamedTuple

# Of sections, and of relocations (R_X86_64_PC32, R_X86_64_PLT32).
_SYMBOLS, _RELOCATIONS = 2, 4
_PC32, _PLT32 = 2, 4
_STUB_BYTES = 16
_JUMP = b"\xff\x25\0\0\0\0"


def make_image(file: bytes, entry: str) -> bytes | None:
    """The code of an object file whose function `entry` is to be called, linked.

    Returns:
        None for a file that is not ELF for x86-64 and for code that needs anything from outside
        but functions of the C library.
    """
    if sys.platform != "linux" or file[:6] != b"\x7fELF\x02\x01" or file[18:20] != b"\x3e\0":
        return None
    sections = _sections(file)
    image, start_of = bytearray(), {}
    for number, section in enumerate(sections):
        if section.loaded:
            if section.writable:
                return None
            image += bytes(-len(image) % max(section.align, 1))
            start_of[number] = len(image)
            image += section.data
    stubs = len(image) + -len(image) % 16
    names: list[str] = []
    for section in sections:
        if section.type != _RELOCATIONS or section.info not in start_of:
            continue
        symbols = _symbols(file, sections[section.link], sections)
        for at, kind, number, addend in struct.iter_unpack("<QIIq", section.data):
            name, where, value = symbols[number]
            if where in start_of and kind in (_PC32, _PLT32):
                target = start_of[where] + value
            elif where == 0 and kind == _PLT32 and hasattr(ctypes.pythonapi, name):
                names += [name] * (name not in names)
                target = stubs + _STUB_BYTES * names.index(name)
            else:
                return None
            place = start_of[section.info] + at
            struct.pack_into("<i", image, place, target + addend - place)
    table = next(section for section in sections if section.type == _SYMBOLS)
    first = next(
        start_of[where] + value
        for name, where, value in _symbols(file, table, sections)
        if name == entry
    )
    head = f"{first} {stubs} {','.join(names)}\n"
    return head.encode() + image.ljust(stubs + _STUB_BYTES * len(names), b"\0")


class _Section(NamedTuple):
    """What matters of a section of an ELF file."""

    type: int
    flags: int
    data: bytes
    link: int
    info: int
    align: int

    @property
    def loaded(self) -> bool:
        """Whether it has contents that the program needs (unwinding tables have another type)."""
        return self.type == 1 and bool(self.flags & 2)

    @property
    def writable(self) -> bool:
        return bool(self.flags & 1 and self.data)


def _sections(file: bytes) -> list[_Section]:
    (table,) = struct.unpack_from("<Q", file, 40)
    size, count = struct.unpack_from("<HH", file, 58)
    found = []
    for at in range(table, table + size * count, size):
        _, type_, flags, _, offset, length, link, info, align, _ = struct.unpack_from(
            "<IIQQQQIIQQ", file, at
        )
        found.append(_Section(type_, flags, file[offset : offset + length], link, info, align))
    return found


def _symbols(file: bytes, table: _Section, sections: list[_Section]) -> list[tuple[str, int, int]]:
    """(name, section, offset in it) of each; section 0 is elsewhere."""
    names = sections[table.link].data
    return [
        (names[name : names.index(b"\0", name)].decode(), where, value)
        for name, _, _, where, value, _ in struct.iter_unpack("<IBBHQQ", table.data)
    ]


def load_image(image: bytes) -> tuple[int, Any]:
    """The entry's address, and the mapping to keep as long as it may be called.

    Raises:
        OSError: where the system does not let a program make code executable.
    """
    head, _, code = image.partition(b"\n")
    entry, stubs, names = head.decode().split(" ")
    memory = mmap.mmap(-1, len(code), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.write(code)
    for number, name in enumerate(filter(None, names.split(","))):
        target = ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value
        # jmp *0(%rip), and the address that it takes
        struct.pack_into("<6sQ", memory, int(stubs) + _STUB_BYTES * number, _JUMP, target)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    length = ctypes.c_size_t(len(memory))
    if protect(ctypes.c_void_p(address), length, mmap.PROT_READ | mmap.PROT_EXEC):
        raise OSError(ctypes.get_errno(), "the system does not let a program make code executable")
    return address + int(entry), memory
