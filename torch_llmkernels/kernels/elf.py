"""Just enough of ELF64 to see what a shared object (or a cubin) imports, its writable data, and what runs when it is loaded."""

from __future__ import annotations

import dataclasses
import struct

_SECTION = struct.Struct("<IIQQQQIIQQ")
_SYMBOL = struct.Struct("<IBBHQQ")
_STRTAB_LINK, _SHT_DYNSYM = 6, 11


@dataclasses.dataclass(frozen=True)
class SharedObject:
    """A shared object's interface.

    Attributes:
        imports: Names of the symbols it takes from elsewhere (weak ones included).
        sections: Section name to size in bytes.
    """

    imports: frozenset[str]
    sections: dict[str, int]


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
    sections = {_string(code, names[4] + header[0]): header[5] for header in headers}
    imports: set[str] = set()
    for header in headers:
        if header[1] == _SHT_DYNSYM:
            imports |= _undefined(code, header[4], header[5], headers[header[_STRTAB_LINK]][4])
    return SharedObject(frozenset(imports), sections)


def _undefined(code: bytes, offset: int, size: int, strings: int) -> set[str]:
    symbols = (_SYMBOL.unpack_from(code, offset + i) for i in range(0, size, _SYMBOL.size))
    return {_string(code, strings + name) for name, _, _, section, _, _ in symbols if section == 0 and name}


def _string(code: bytes, offset: int) -> str:
    return code[offset : code.index(b"\0", offset)].decode()
