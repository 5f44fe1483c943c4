"""gzip and Zstandard around any container, by chunks: a bomb takes constant memory, and is reported."""

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Literal

from peft_service.containers.record import CHUNK_BYTES, Unreadable

Compression = Literal["", "gzip", "zstd"]
GZIP_MAGIC = b"\x1f\x8b"
ZSTD_MAGIC = b"\x28\xb5\x2f\xfd"
ZSTD_SKIPPABLE = tuple(bytes([number]) + b"\x2a\x4d\x18" for number in range(0x50, 0x60))

MAX_DECOMPRESSED_BYTES = 1024**4
MAX_RATIO = 500
"""Decompressed bytes for a compressed one; texts have 3 to 20, the same line again and again has more."""
MAX_BYTES_AT_ANY_RATIO = 256 * 1024**2
MAX_ZSTD_WINDOW = 128 * 1024**2
"""Bytes; what `zstd --ultra -22` uses at most, less than `--long=31`."""
ZSTD_INPUT = 512
"""Compressed bytes at once: a block of 128 KiB may take four, so a slice gives at most some 16 MiB."""


def compression_of(head: bytes) -> Compression:
    """What the first bytes of a file say."""
    if head.startswith(GZIP_MAGIC):
        return "gzip"
    return "zstd" if head.startswith((ZSTD_MAGIC, *ZSTD_SKIPPABLE)) else ""


def chunks_of(path: Path, compression: Compression) -> Iterator[bytes]:
    """The decompressed bytes of a file in non-empty chunks (1 MiB, of zstd up to 16 MiB).

    Raises:
        Unreadable: `truncated`, `too_large` (a bomb), or `unreadable_container` where the bytes are wrong;
            all that could be decompressed has been yielded then.
    """
    with path.open("rb") as file:
        if not compression:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
            return
        made = 0
        for chunk in _gzip(file) if compression == "gzip" else _zstd(file):
            made += len(chunk)
            if made > max(MAX_BYTES_AT_ANY_RATIO, MAX_RATIO * file.tell()) or made > MAX_DECOMPRESSED_BYTES:
                raise Unreadable(
                    "too_large",
                    f"{file.tell():,} compressed bytes became more than {made:,}; the most is {MAX_RATIO} "
                    f"for one and {MAX_DECOMPRESSED_BYTES // 1024**4} TiB in all.",
                    "upload the file without compression",
                )
            yield chunk


def _gzip(file: IO[bytes]) -> Iterator[bytes]:
    # Files are often joined from several: a member may follow a member, and zeros the last.
    inflate = zlib.decompressobj(wbits=31)
    waiting, begun = b"", False
    while True:
        if not waiting:
            waiting = file.read(64 * 1024)
            if not waiting:
                break
        if not begun:
            waiting = waiting.lstrip(b"\0")
            begun = bool(waiting)
            continue
        try:
            chunk = inflate.decompress(waiting, CHUNK_BYTES)
        except zlib.error as error:
            raise _wrong("gzip", str(error)) from None
        waiting = inflate.unused_data if inflate.eof else inflate.unconsumed_tail
        if inflate.eof:
            inflate, begun = zlib.decompressobj(wbits=31), False
        if chunk:
            yield chunk
    while begun and (chunk := inflate.decompress(b"", CHUNK_BYTES)):
        yield chunk
    if begun and not inflate.eof:
        raise _truncated("gzip")


def _zstd(file: IO[bytes]) -> Iterator[bytes]:
    import zstandard

    made = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    inflate = made.decompressobj()
    begun = False
    parts: list[bytes] = []
    size = 0
    while block := file.read(CHUNK_BYTES):
        for start in range(0, len(block), ZSTD_INPUT):
            waiting = block[start : start + ZSTD_INPUT]
            while waiting:
                begun = True
                try:
                    chunk = inflate.decompress(waiting)
                except zstandard.ZstdError as error:
                    if parts:
                        yield b"".join(parts)
                    raise _wrong("Zstandard", str(error)) from None
                waiting = inflate.unused_data if inflate.eof else b""
                if inflate.eof:
                    inflate, begun = made.decompressobj(), False
                parts.append(chunk)
                size += len(chunk)
                if size >= CHUNK_BYTES:
                    yield b"".join(parts)
                    parts, size = [], 0
    if size:
        yield b"".join(parts)
    if begun:
        raise _truncated("Zstandard")


def _wrong(name: str, said: str) -> Unreadable:
    return Unreadable(
        "unreadable_container",
        f"The {name} data is broken here: {said[:200]}.",
        "was the file changed on its way? Compress and upload it again",
    )


def _truncated(name: str) -> Unreadable:
    message = f"The {name} data ends too early."
    return Unreadable("truncated", message, "was the file cut while it was written or sent?")
