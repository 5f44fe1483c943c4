"""Which container a file is, from its first bytes; its name only decides where bytes cannot."""

import json
import re
from pathlib import Path
from typing import Literal, NamedTuple

from peft_service.containers import table
from peft_service.containers.compression import Compression, chunks_of, compression_of
from peft_service.containers.record import BYTE_ORDER_MARK, Unreadable

HEAD_BYTES = 64 * 1024
"""Of the decompressed content; enough to see some lines."""
LINES_TRIED = 20

Kind = Literal["jsonl", "json_array", "csv", "tsv", "parquet", "arrow", "text", "unknown"]


class Container(NamedTuple):
    kind: Kind
    compression: Compression
    delimiter: str = ""
    """Of csv and tsv (tsv: it is the tab)."""
    looks_like: str = ""
    """What an `unknown` file probably is, for example `a zip archive`; or JSON Lines that may be none."""
    hint: str = ""
    """What to do about that."""


def container_of(path: Path, name: str = "") -> Container:
    """What the file holds. `name`: what its owner calls it, if not the path's own name.

    Never raises for what a file holds; only OSError where it cannot be opened.
    """
    name = (name or path.name).lower()
    with path.open("rb") as file:
        first = file.read(8)
    compression = compression_of(first)
    head, whole = _head(path, compression)
    if compression:
        name = re.sub(r"\.(gz|gzip|zst|zstd)$", "", name)
        if inner := compression_of(head):
            other = "gzip" if inner == "gzip" else "Zstandard"
            return Container("unknown", compression, "", f"{other} in {compression}", "decompress it once")
    return _of(head, whole, name)._replace(compression=compression)


def _head(path: Path, compression: Compression) -> tuple[bytes, bool]:
    """The first bytes, and whether they are all there are."""
    parts: list[bytes] = []
    size = 0
    chunks = chunks_of(path, compression)
    try:
        for chunk in chunks:
            parts.append(chunk)
            size += len(chunk)
            if size > HEAD_BYTES:
                return b"".join(parts)[:HEAD_BYTES], False
    except Unreadable:  # said when it is read
        pass
    finally:
        chunks.close()  # type: ignore[attr-defined]
    return b"".join(parts), True


def _of(head: bytes, whole: bool, name: str) -> Container:
    for magic, looks_like, hint in _MAGICS:
        if head.startswith(magic):
            return Container("unknown", "", "", looks_like, hint)
    if head.startswith((b"PAR1", b"PARE")):
        return Container("parquet", "")
    if head.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
        return Container("arrow", "")
    if found := _binary(head):
        return found
    text = head.removeprefix(BYTE_ORDER_MARK).lstrip()
    suffix = name.rpartition(".")[2] if "." in name else ""
    for pattern, looks_like, hint in _TEXTS:
        if pattern.match(text[:200]):
            return Container("unknown", "", "", looks_like, hint)
    plain = suffix in ("txt", "text", "md", "csv", "tsv", "tab")
    if re.match(rb"\[\s*\{\s*[\"}]", text):
        return Container("json_array", "")
    if _has_objects(text, whole) or (text.startswith(b"{") and not plain):
        looks_like = ""
        if text.split(b"\n", 1)[0].rstrip() == b"{":
            looks_like = "the file looks like indented JSON: write each object on one line"
        return Container("jsonl", "", "", "indented JSON" if looks_like else "", looks_like)
    json_name = suffix in ("json", "jsonl", "ndjson", "jsonlines")
    if re.match(rb"\[" if json_name else rb"\[\s*(\{?\s*$|\])" if plain else rb"\[\s*([\[{\"\]]|$)", text):
        return Container("json_array", "")
    decoded = head.removeprefix(BYTE_ORDER_MARK).decode(errors="replace")
    preferred = "\t" if suffix in ("tsv", "tab") else ","
    delimiter, certain = table.sniff(decoded, whole, preferred)
    if suffix in ("csv", "tsv", "tab"):
        return Container("tsv" if delimiter == "\t" else "csv", "", delimiter)
    if json_name:
        hint = ""
        if text and not text.startswith((b"{", b'"')) and (certain or b"," in text or b"\t" in text):
            hint = "the file looks like a table (CSV): name it .csv, or write each row as a JSON object"
        return Container("jsonl", "", "", "a table" if hint else "", hint)
    if certain and suffix not in ("txt", "text", "md"):
        return Container("tsv" if delimiter == "\t" else "csv", "", delimiter)
    return Container("text", "")


def _has_objects(text: bytes, whole: bool) -> bool:
    """Whether one of the first lines is a JSON object."""
    lines = text.split(b"\n")
    for line in (lines if whole or len(lines) == 1 else lines[:-1])[:LINES_TRIED]:
        if not line.lstrip().startswith(b"{"):
            continue
        try:
            if isinstance(json.loads(line), dict):
                return True
        except (ValueError, RecursionError):
            # A line longer than the head: its beginning has to do.
            if len(lines) == 1 and not whole and re.match(rb'\{\s*"[^"\\]{1,256}"\s*:', line):
                return True
    return False


def _binary(head: bytes) -> Container | None:
    """Files of no text, and text that is so far from UTF-8 that a problem for every line would not help."""
    if re.match(rb"\x80[\x02-\x05]", head):
        hint = "write its rows as JSON Lines; pickles run code when they are read, so none ever is"
        return Container("unknown", "", "", "a Python pickle", hint)
    if head[4:9] == b"\0\0\0\0{":  # the length of its header, in eight bytes
        hint = "these are weights of a model; upload the data it is to be trained on"
        return Container("unknown", "", "", "a safetensors file", hint)
    if head[257:262] == b"ustar":
        return Container("unknown", "", "", "a tar archive", "extract it and upload the files in it")
    sample = head[:4096]
    if len(sample) >= 8 and 0 in sample:
        for first, encoding in ((0, "big-endian"), (1, "little-endian")):
            zeros = sample[first::2].count(0)
            if zeros > 0.4 * len(sample) / 2 and sample[1 - first :: 2].count(0) < zeros / 8:
                what = f"UTF-16 text ({encoding})"
                return Container("unknown", "", "", what, "the file is UTF-16: save it as UTF-8")
        if sample.count(0) > len(sample) / 20 or not sample.lstrip().startswith((b"{", b"[")):
            controls = sum(byte < 32 and byte not in b"\t\n\r\f\0" for byte in sample)
            if controls + sample.count(0) > max(3, len(sample) / 20):
                hint = "data files are JSON Lines, a JSON array, CSV, TSV, Parquet, Arrow or plain text"
                return Container("unknown", "", "", "binary data", hint)
    return None


_AS_TEXT = "export its rows as JSON Lines, CSV or Parquet"
_EXTRACT = "extract it and upload the files in it"
_UTF8 = "the file is {}: save it as UTF-8"
_MAGICS: tuple[tuple[bytes, str, str], ...] = (
    (
        b"PK\x03\x04",
        "a zip archive",
        "extract it; .xlsx, .npz and .pt files are zip archives, too",
    ),
    (b"PK\x05\x06", "an empty zip archive", _EXTRACT),
    (b"\xff\xfe\x00\x00", "UTF-32 text", _UTF8.format("UTF-32")),
    (b"\x00\x00\xfe\xff", "UTF-32 text", _UTF8.format("UTF-32")),
    (b"\xff\xfe", "UTF-16 text", _UTF8.format("UTF-16")),
    (b"\xfe\xff", "UTF-16 text", _UTF8.format("UTF-16")),
    (b"BZh", "bzip2", "decompress it, or compress it with gzip or Zstandard"),
    (b"\xfd7zXZ\x00", "xz", "decompress it, or compress it with gzip or Zstandard"),
    (b"\x04\x22\x4d\x18", "LZ4", "decompress it, or compress it with gzip or Zstandard"),
    (b"7z\xbc\xaf\x27\x1c", "a 7-Zip archive", _EXTRACT),
    (b"Rar!", "a RAR archive", _EXTRACT),
    (b"ORC", "ORC", "write it as Parquet or JSON Lines"),
    (b"Obj\x01", "Avro", "write it as Parquet or JSON Lines"),
    (b"FEA1", "Feather, version 1", "write it as Parquet or as Arrow (Feather, version 2)"),
    (b"SQLite format 3\x00", "an SQLite database", _AS_TEXT),
    (b"\x89HDF", "HDF5", _AS_TEXT),
    (b"\x93NUMPY", "a NumPy array", _AS_TEXT),
    (b"GGUF", "a GGUF model", "these are weights of a model; upload the data it is to be trained on"),
    (b"%PDF", "a PDF document", "extract its text and upload that"),
    (b"{\\rtf", "an RTF document", "save it as plain text"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", "save it as CSV or plain text"),
    (b"\x89PNG", "a PNG image", "data files are text"),
    (b"\xff\xd8\xff", "a JPEG image", "data files are text"),
    (b"\x7fELF", "a program", "data files are text"),
)
_TEXTS = (
    (
        re.compile(rb"<(!doctype html|html|head|body)\b", re.IGNORECASE),
        "an HTML page",
        "was it downloaded from a page that asks for a login? Download the file itself",
    ),
    (re.compile(rb"<\?xml\b"), "an XML document", _AS_TEXT),
    (
        re.compile(rb"version https://git-lfs\.github\.com/"),
        "a Git LFS pointer",
        "it only says where the file is: run `git lfs pull` and upload the file itself",
    ),
)
