"""The program that reads Parquet and Arrow in a process of its own, and writes rows as lines.

    python -P columnar_child.py parquet|arrow file

Readers in C++ can crash, hang, or take all memory on a hostile file: here that ends this process, which has
limits, no credentials, and imports nothing of the service. Lines on standard output: `r` and a row as JSON;
`p` and [path, code, message, hint] of a row that could not be converted; last, `e` where the file was read
whole, or `q` and the same four of what ended it.
"""

import contextlib
import json
import math
import resource
import sys
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

MAX_ROW_BYTES = 16 * 1024**2
MAX_DEPTH = 64
MAX_DATA_BYTES = 2 * 1024**3
"""Memory of its own. What a file of Arrow takes beside that is mapped, not held."""
MAX_ADDRESS_BYTES = 6 * 1024**3
"""Address space beside the file's own bytes: libraries, stacks and `MAX_DATA_BYTES`."""
MAX_CPU_SECONDS = 24 * 3600
BATCH_BYTES = 4 * 1024**2
MAX_BATCH_ROWS = 1024

Convert = Callable[[Any, str], Any]


class Bad(Exception):
    """(path, code, message, hint)"""


def limit(size: int) -> None:
    """No more memory or core files than this; `size` is the file's."""
    for what, most in (
        (resource.RLIMIT_AS, MAX_ADDRESS_BYTES + size),
        (resource.RLIMIT_DATA, MAX_DATA_BYTES),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_CPU, MAX_CPU_SECONDS),
        (resource.RLIMIT_FSIZE, 0),
    ):
        with contextlib.suppress(ValueError, OSError):  # the limits that hold already are lower
            resource.setrlimit(what, (most, most))


def plain(kind: Any, path: str, depth: int = 1) -> Any:
    """The type that a column is cast to before it is read: times become text, dictionaries their values."""
    import pyarrow as pa

    types = pa.types
    if depth > MAX_DEPTH:
        raise Bad(path[:200], "too_deep", f"The column is nested more than {MAX_DEPTH} levels deep.", "")
    if isinstance(kind, pa.BaseExtensionType):
        return plain(kind.storage_type, path, depth)
    if types.is_dictionary(kind) or types.is_run_end_encoded(kind):
        return plain(kind.value_type, path, depth)
    if types.is_timestamp(kind) or types.is_date(kind) or types.is_time(kind):
        return pa.string()
    if types.is_duration(kind):
        return pa.int64()
    if types.is_struct(kind):
        fields = [kind.field(index) for index in range(kind.num_fields)]
        return pa.struct(
            [(field.name, plain(field.type, f"{path}.{field.name}", depth + 1)) for field in fields]
        )
    if types.is_map(kind):
        if not (types.is_string(kind.key_type) or types.is_large_string(kind.key_type)):
            raise unsupported(path, kind, "write its keys as strings")
        return pa.map_(kind.key_type, plain(kind.item_type, f"{path}.*", depth + 1))
    if types.is_fixed_size_list(kind):
        return pa.list_(plain(kind.value_type, f"{path}[*]", depth + 1), kind.list_size)
    if types.is_large_list(kind):
        return pa.large_list(plain(kind.value_type, f"{path}[*]", depth + 1))
    if types.is_list(kind):
        return pa.list_(plain(kind.value_type, f"{path}[*]", depth + 1))
    known = (
        *(types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal),
        *(types.is_string, types.is_large_string, types.is_string_view),
        *(types.is_binary, types.is_large_binary, types.is_fixed_size_binary, types.is_binary_view),
    )
    if any(is_it(kind) for is_it in known):
        return kind
    raise unsupported(path, kind, "leave the column out, or write it as text, numbers, lists or structs")


def unsupported(path: str, kind: Any, hint: str) -> Bad:
    return Bad(path[:200], "unsupported_type", f"The column has the type {str(kind)[:100]}.", hint)


def converter(kind: Any) -> Convert | None:
    """From Python's value of this (plain) type to JSON's; None: they are the same."""
    import pyarrow as pa

    types = pa.types
    if types.is_floating(kind):
        return number
    if types.is_decimal(kind):
        return decimal
    if types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind):
        return text
    if types.is_binary_view(kind):
        return text
    if types.is_struct(kind):
        inner = [
            (kind.field(index).name, converter(kind.field(index).type)) for index in range(kind.num_fields)
        ]
        changed = [(name, convert) for name, convert in inner if convert]
        return (lambda value, path: struct(value, path, changed)) if changed else None
    if types.is_map(kind):
        convert = converter(kind.item_type)
        return lambda value, path: mapping(value, path, convert)
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        item = converter(kind.value_type)
        if item is None:
            return None
        return lambda value, path: [
            None if each is None else item(each, f"{path}[{index}]") for index, each in enumerate(value)
        ]
    return None


def number(value: float, path: str) -> float:
    if not math.isfinite(value):
        raise Bad(path, "nan", f"The number is {value}, which JSON does not have.", "write a number or null")
    return value


def decimal(value: Decimal, path: str) -> int | float:
    """A number, if it is the one that those digits come back from."""
    made: int | float = int(value) if value == value.to_integral_value() else float(value)
    if Decimal(repr(made)) != value:
        hint = "write the column as text, or with fewer digits"
        raise Bad(path, "unsupported_type", f"The decimal {value} is no floating-point number.", hint)
    return made


def text(value: bytes, path: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        message = f"The bytes are no UTF-8 text: 0x{value[error.start]:02x} at byte {error.start + 1}."
        raise Bad(path, "not_utf8", message, "leave the column out, or write it as text") from None


def struct(value: dict[str, Any], path: str, changed: list[tuple[str, Convert]]) -> dict[str, Any]:
    for name, convert in changed:
        if value[name] is not None:
            value[name] = convert(value[name], f"{path}.{name}")
    return value


def mapping(value: list[tuple[str, Any]], path: str, convert: Convert | None) -> dict[str, Any]:
    made = dict(value)
    if len(made) != len(value):
        raise Bad(path, "duplicate_key", "The map holds a key twice.", "keep one")
    return made if convert is None else struct(made, path, [(name, convert) for name in made])


def batches(kind: str, path: str) -> Iterator[Any]:
    """Record batches of a file, none held longer than it is used; raises what pyarrow raises."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if kind == "parquet":
        file = pq.ParquetFile(path, memory_map=False, buffer_size=1024**2, pre_buffer=False)
        columns(file.schema_arrow)
        groups = range(file.metadata.num_row_groups)
        for index in groups:
            group = file.metadata.row_group(index)
            row = max(1, group.total_byte_size // max(1, group.num_rows))
            rows = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES // row))
            yield from file.iter_batches(batch_size=rows, row_groups=[index], use_threads=False)
        return
    source = pa.memory_map(path)
    if source.read(6) == b"ARROW1":
        source.seek(0)
        opened = pa.ipc.open_file(source)
        columns(opened.schema)
        for index in range(opened.num_record_batches):
            yield opened.get_batch(index)
    else:
        source.seek(0)
        stream = pa.ipc.open_stream(source)
        columns(stream.schema)
        yield from stream
        # The format lets a writer leave this mark out; but nothing else tells a file cut between batches.
        source.seek(source.size() - 8)
        if source.read(8) != b"\xff\xff\xff\xff\0\0\0\0":
            raise Bad(
                "", "truncated", "The Arrow stream has no end mark.", "was it cut while it was written?"
            )


def columns(schema: Any) -> None:
    """Refuse what cannot become the keys of an object."""
    names = list(schema.names)
    for name in names:
        if not name.strip():
            raise Bad("", "empty_column_name", "A column has no name.", "every column needs one")
        if names.count(name) > 1:
            raise Bad("", "duplicate_column", f"The column {name[:60]!r} is there twice.", "rename one")
    for field in schema:
        plain(field.type, field.name)


def rows(batch: Any) -> Iterator[tuple[dict[str, Any], Bad | None]]:
    import pyarrow as pa

    batch.validate(full=True)
    names, values, converters = batch.schema.names, [], []
    for name, column in zip(names, batch.columns, strict=True):
        kind = plain(column.type, name)
        if isinstance(column.type, pa.BaseExtensionType):
            column = column.storage
        if kind != column.type:
            try:
                column = column.cast(kind)
            except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
                raise unsupported(name, column.type, f"it cannot be read: {reason(error)}") from None
        values.append(column)
        converters.append(converter(kind))
    step = max(1, min(MAX_BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, step):
        parts = [column.slice(start, step).to_pylist() for column in values]
        for row in zip(*parts, strict=True):
            made: dict[str, Any] = dict(zip(names, row, strict=True))
            problem = None
            for name, convert in zip(names, converters, strict=True):
                if convert is not None and made[name] is not None:
                    try:
                        made[name] = convert(made[name], name)
                    except Bad as bad:
                        problem = bad
                        break
            yield made, problem


def reason(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return lines[0][:300]


def main(kind: str, path: str) -> int:
    limit(Path(path).stat().st_size)
    out = sys.stdout.buffer

    def write(mark: bytes, value: Any) -> None:
        line = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        data = line.encode(errors="surrogatepass")
        if len(data) > MAX_ROW_BYTES:
            size = f"{len(data) / 1024**2:.0f} MiB"
            message = f"The row is {size} long; {MAX_ROW_BYTES // 1024**2} MiB is the most."
            write(b"p", ("", "record_too_long", message, "cut it into several rows"))
        else:
            out.write(mark + data + b"\n")

    import pyarrow as pa

    pa.set_cpu_count(1)
    pa.set_io_thread_count(1)
    try:
        for batch in batches(kind, path):
            for row, problem in rows(batch):
                if problem is None:
                    write(b"r", row)
                else:
                    write(b"p", problem.args)
    except Bad as bad:
        write(b"q", bad.args)
    except MemoryError:
        write(
            b"q",
            (
                "",
                "too_large",
                "Reading it takes more memory than a data file may.",
                "write smaller row groups",
            ),
        )
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        said = reason(error).replace(path, "the file")
        write(b"q", ("", "unreadable_container", f"It cannot be read further: {said}", ""))
    else:
        write(b"e", None)
    out.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2]))
