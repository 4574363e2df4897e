"""A portable file of kernels and their evidence: `.llmk`, a zip of JSON with a manifest of sha256 digests.

A bundle is a claim by whoever made it. Importing one makes its kernels candidates: each is checked and timed on this device
before its first use, exactly as if it had been searched here. That a kernel is wrong or no faster is believed, where every field
of the decision's key is equal: it can cost speed, never a right answer. What was measured about whole graphs comes along, and
counts on devices of the same kind and driver, for exactly the kernels that were measured; elsewhere graphs are measured again.
Compiled binaries are exported for inspection and archiving only; they are never imported, because a binary cannot be checked
against its source.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.cache.library import write_atomically
from torch_llmkernels.cache.store import BaseStore
from torch_llmkernels.errors import SchemaError, StoreError
from torch_llmkernels.evaluation import Decision, GraphDecision, Record
from torch_llmkernels.task import canonical_json, digest

SCHEMA = 1
MANIFEST = "manifest.json"
MAX_ENTRIES = 100_000
MAX_ENTRY_BYTES = 64 << 20  # the largest cubins are a few MiB
MAX_TOTAL_BYTES = 2 << 30
_KINDS = ("records", "decisions", "graphs", "binaries")
_EPOCH = (1980, 1, 1, 0, 0, 0)  # the same content gives the same file


@dataclasses.dataclass(frozen=True)
class Imported:
    """What an import did.

    Attributes:
        records: Store keys of the candidates that were added.
        skipped: One line for each entry that was not, with the reason.
        graphs: Store keys of the whole-graph decisions that were added.
        decisions: Store keys of what was tried elsewhere: kernels that lost there are not verified on devices like that one.
    """

    records: tuple[str, ...]
    skipped: tuple[str, ...]
    graphs: tuple[str, ...] = ()
    decisions: tuple[str, ...] = ()


def export(
    path: Path | str,
    records: Iterable[Record] = (),
    decisions: Iterable[tuple[RecordKey, Decision]] = (),
    binaries: Mapping[str, bytes] | None = None,
    graphs: Iterable[GraphDecision] = (),
) -> int:
    """Write a bundle; returns the number of entries.

    Args:
        path: The file; replaced if it exists.
        records: Accepted kernels.
        decisions: Decisions with their keys: what won, and what was tried where.
        binaries: Compiled code by binary key.
        graphs: What was measured about whole graphs, with the device.

    Raises:
        StoreError: if the file cannot be written.
    """
    if not Path(path).absolute().parent.is_dir():
        raise StoreError(f"bundle {path} cannot be written: its folder is not there; make it first, or name another place")
    entries: dict[str, bytes] = {}
    for record in records:
        entries[_name("records", record.to_json())] = canonical_json(record.to_json()).encode()
    for key, decision in decisions:
        plain = {"key": key.to_json(), "decision": decision.to_json()}
        entries[_name("decisions", plain)] = canonical_json(plain).encode()
    for graph in graphs:
        entries[_name("graphs", graph.to_json())] = canonical_json(graph.to_json()).encode()
    for key, code in (binaries or {}).items():
        entries[f"binaries/{digest(key)}.bin"] = code
    try:
        write_atomically(Path(path), _archive(entries))
    except OSError as error:
        raise StoreError(f"bundle {path} cannot be written: {error.strerror or error}; name another file") from error
    return len(entries)


def _name(kind: str, plain: Any) -> str:
    return f"{kind}/{digest(plain)}.json"


def _archive(entries: Mapping[str, bytes]) -> bytes:
    listing = {n: {"sha256": hashlib.sha256(b).hexdigest(), "size": len(b)} for n, b in sorted(entries.items())}
    manifest = {"schema": SCHEMA, "made_by": f"torch-llmkernels {_version()}", "entries": listing}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {MANIFEST: json.dumps(manifest, indent=1).encode(), **entries}.items():
            archive.writestr(zipfile.ZipInfo(name, _EPOCH), content, zipfile.ZIP_DEFLATED)
    return buffer.getvalue()


def _version() -> str:
    try:
        return metadata.version("torch-llmkernels")
    except metadata.PackageNotFoundError:
        return "unknown"


def import_(path: Path | str, store: BaseStore) -> Imported:
    """Add a bundle's kernels to `store` as candidates (origin `import:<file stem>`). All of it is checked before any is added.

    Raises:
        SchemaError: if the file is not a bundle, is damaged, or is of another schema version.
        StoreError: if it cannot be opened or is larger than the limits.
    """
    path = Path(path)
    entries = read(path)
    found: list[Record] = []
    skipped: list[str] = []
    graphs = [_graph(name, content, path) for name, content in entries.items() if name.startswith("graphs/")]
    tried = [_decision(name, content, path) for name, content in entries.items() if name.startswith("decisions/")]
    for name, content in entries.items():
        if name.startswith("graphs/"):
            continue
        record = _record(name, content, path)
        if record is not None:
            found.append(dataclasses.replace(record, origin=f"import:{path.stem}"))
        elif name.startswith("binaries/"):
            skipped.append(f"{name}: a binary: built here from its source when it is needed")
    keys = dict.fromkeys(store.put_imported(record) for record in found)
    decisions = [store.put_imported_decision(key, decision) for key, decision in tried if decision.tried]
    return Imported(
        tuple(keys), tuple(skipped), tuple(store.put_imported_graph(graph) for graph in graphs), tuple(decisions)
    )


def _record(name: str, content: bytes, path: Path) -> Record | None:
    if name.startswith("binaries/"):
        return None
    try:
        plain = json.loads(content)
        if name.startswith("records/"):
            return Record.from_json(plain)
        return Decision.from_json(plain["decision"]).record
    except (SchemaError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SchemaError(f"bundle {path}: entry {name}: {error}") from error


def _decision(name: str, content: bytes, path: Path) -> tuple[RecordKey, Decision]:
    try:
        plain = json.loads(content)
        return RecordKey.from_json(plain["key"]), Decision.from_json(plain["decision"])
    except (SchemaError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SchemaError(f"bundle {path}: entry {name}: {error}") from error


def _graph(name: str, content: bytes, path: Path) -> GraphDecision:
    try:
        return GraphDecision.from_json(json.loads(content))
    except (SchemaError, ValueError) as error:
        raise SchemaError(f"bundle {path}: entry {name}: {error}") from error


def read(path: Path) -> dict[str, bytes]:
    """The entries of a bundle by name, each checked against the manifest. Nothing is unpacked to disk.

    Raises:
        SchemaError: if the file is not a bundle, is damaged, or is of another schema version.
        StoreError: if it cannot be opened or is larger than the limits.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            _check_sizes(archive, path)
            manifest = _manifest(archive, path)
            return {name: _entry(archive, name, expected, path) for name, expected in manifest.items()}
    except OSError as error:
        raise StoreError(f"bundle {path} cannot be read: {error.strerror or error}") from error
    except (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise SchemaError(f"{path} is not a bundle or is damaged: {error}; ask for it again") from error


def _check_sizes(archive: zipfile.ZipFile, path: Path) -> None:
    infos = archive.infolist()
    largest, total = max((i.file_size for i in infos), default=0), sum(i.file_size for i in infos)
    if len(infos) > MAX_ENTRIES or largest > MAX_ENTRY_BYTES or total > MAX_TOTAL_BYTES:
        raise StoreError(
            f"bundle {path} is too large: {len(infos)} entries, {total} bytes unpacked, the largest {largest} "
            f"(limits: {MAX_ENTRIES}, {MAX_TOTAL_BYTES}, {MAX_ENTRY_BYTES})"
        )


def _manifest(archive: zipfile.ZipFile, path: Path) -> dict[str, Any]:
    try:
        manifest = json.loads(_limited(archive, MANIFEST, MAX_ENTRY_BYTES))
        schema, entries = manifest["schema"], manifest["entries"]
    except (KeyError, ValueError, TypeError) as error:
        raise SchemaError(f"{path} is not a bundle: no readable {MANIFEST} ({error})") from error
    if schema != SCHEMA:
        raise SchemaError(f"bundle {path} has schema {schema!r}, this release reads {SCHEMA}; export it again with this release")
    listed, present = set(entries), {i.filename for i in archive.infolist()} - {MANIFEST}
    if listed != present:
        raise SchemaError(f"bundle {path}: manifest and content differ in {', '.join(sorted(listed ^ present)[:5])}")
    for name in entries:
        kind, _, rest = name.partition("/")
        if kind not in _KINDS or not rest.replace(".", "", 1).isalnum():
            raise SchemaError(f"bundle {path}: entry name {name!r} is not allowed")
    return entries


def _entry(archive: zipfile.ZipFile, name: str, expected: Mapping[str, Any], path: Path) -> bytes:
    try:
        size, sha256 = expected["size"], expected["sha256"]
        content = _limited(archive, name, size)
    except (KeyError, TypeError, ValueError) as error:
        raise SchemaError(f"bundle {path}: manifest entry {name} is damaged: {error}") from error
    if len(content) != size or hashlib.sha256(content).hexdigest() != sha256:
        raise SchemaError(f"bundle {path}: entry {name} does not match its sha256; the file was altered or damaged")
    return content


def _limited(archive: zipfile.ZipFile, name: str, size: int) -> bytes:
    """At most `size` + 1 bytes of an entry: what the zip's directory says about sizes is a claim too."""
    with archive.open(name) as stream:
        return stream.read(min(int(size), MAX_ENTRY_BYTES) + 1)
