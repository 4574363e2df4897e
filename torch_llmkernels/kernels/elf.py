"""Just enough of ELF64 to see what a shared object (or a cubin) imports, its writable data, and what runs when it is loaded."""

from __future__ import annotations

import dataclasses
import struct
from collections.abc import Iterator

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_STRTAB_LINK, _SHT_SYMTAB, _SHT_DYNSYM = 6, 2, 11


@dataclasses.dataclass(frozen=True)
class SharedObject:
    """A shared object's interface.

    Attributes:
        imports: Names of the symbols it takes from elsewhere (weak ones included).
        sections: Section name to size in bytes.
        symbols: Section name to the names of the symbols that are defined in it.
    """

    imports: frozenset[str]
    sections: dict[str, int]
    symbols: dict[str, frozenset[str]]


def read_shared_object(code: bytes) -> SharedObject:
    """Read a little-endian ELF64 file.

    Raises:
        ValueError: if it is not one.
    """
    if code[:6] != b"\x7fELF\x02\x01":
        raise ValueError("not a little-endian ELF64 file")
    (offset,) = struct.unpack_from("<Q", code, 0x28)
    size, count, names_index = struct.unpack_from("<HHH", code, 0x3A)
    headers = [_SECTION.unpack_from(code, offset + i * size) for i in range(count)]
    names = headers[names_index]
    titles = [_string(code, names[4] + header[0]) for header in headers]
    imports: set[str] = set()
    symbols: dict[str, set[str]] = {}
    for header in headers:
        if header[1] not in (_SHT_SYMTAB, _SHT_DYNSYM):
            continue
        for name, section in _symbols(code, header[4], header[5], headers[header[_STRTAB_LINK]][4]):
            if section == 0 and header[1] == _SHT_DYNSYM:
                imports.add(name)
            elif 0 < section < len(titles):
                symbols.setdefault(titles[section], set()).add(name)
    sizes = {title: header[5] for title, header in zip(titles, headers, strict=True)}
    return SharedObject(frozenset(imports), sizes, {title: frozenset(found) for title, found in symbols.items()})


def _symbols(code: bytes, offset: int, size: int, strings: int) -> Iterator[tuple[str, int]]:
    """(name, index of its section) of every symbol of a table that has a name."""
    for i in range(0, size, _SYMBOL.size):
        name, _, _, section, _, _ = _SYMBOL.unpack_from(code, offset + i)
        if name:
            yield _string(code, strings + name), section


def _string(code: bytes, offset: int) -> str:
    return code[offset : code.index(b"\0", offset)].decode()
