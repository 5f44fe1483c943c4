"""Where data comes from beside uploads: objects in S3, files of this machine, data sets of the Hub.

A source is listed first, which gives every file's size and version, and downloaded later: what has changed in
between is an error, never other data. Names come from strangers: one that could leave the folder it is
downloaded to is refused.

    s3://bucket/folder          every data file below it        (boto3's own credentials, `AWS_*`)
    s3://bucket/a/**/*.parquet  what matches: * and ? within a name, ** any folders, [abc]
    s3://bucket/a/train.jsonl   one object
    file:///folder              the same, only below folders that the service's operator allows
    hf://datasets/org/name[:config][@revision][?split=train]   data files, never scripts  (`HF_TOKEN`)

Data files are known by their suffix (`containers.is_data`); a pattern that names others gets them.
"""

import os
import re
import secrets
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from peft_service.containers import is_data
from peft_service.errors import InvalidRequest, StoreDenied, StoreError, StoreUnavailable
from peft_service.formats import did_you_mean
from peft_service.store import ObjectInfo, Store, check_key, open_store

MAX_ITEMS = 10_000
"""Files of one source."""
MAX_LISTED = 1_000_000
"""Objects looked at for one pattern."""
WILD = re.compile(r"[*?\[]")
NEVER = (".py", ".pkl", ".pickle", ".pt", ".pth", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".so", ".sh")
"""Suffixes of files that could run code when somebody loads them: not even asked for by name."""

T = TypeVar("T")


@dataclass(frozen=True)
class Item:
    """One file of a source."""

    name: str
    """Where it lies in the source, `a/b.jsonl`; safe as a path below a folder."""
    size: int
    """Bytes."""
    version: str
    """Another one where the content is another: an ETag, a blob's hash, a file's time and number."""
    uri: str
    """Of this file alone; of the Hub, with the commit."""


def is_source(uri: str) -> bool:
    """Whether `uri` has a scheme that is read here."""
    return uri.startswith(("s3://", "file://", "hf://"))


def list_source(uri: str, allow: Sequence[Path] = (), *, limit: int = MAX_ITEMS) -> list[Item]:
    """The files of a source, in the order of their names; at least one.

    `allow`: the folders of this machine that `file://` may read.

    Raises:
        InvalidRequest: `param` is "source"; the code is `bad_source`, `source_not_found`, `no_data_files`,
            `too_many_files`, `split_missing` or `config_missing`.
        StoreDenied, StoreUnavailable: as the stores do.
    """
    if uri.startswith("s3://"):
        items = _in_s3(uri)
    elif uri.startswith("file://"):
        items = _in_folder(uri, allow)
    elif uri.startswith("hf://"):
        items = _in_hub(uri)
    else:
        hint = "use s3://bucket/prefix, file:///folder or hf://datasets/org/name"
        raise _bad("bad_source", f"{_shown(uri)} is no source of data; {hint}.")
    found = sorted(items, key=lambda item: item.name)
    if not found:
        hint = "name the files with a pattern like /**/*.jsonl if their names have other suffixes"
        raise _bad("no_data_files", f"There are no data files in {_shown(uri)}; {hint}.")
    if len(found) > limit:
        raise _bad("too_many_files", f"{_shown(uri)} has {len(found):,} files; {limit:,} is the most.")
    return found


def download(item: Item, path: Path, allow: Sequence[Path] = ()) -> None:
    """Write the file to `path`, which appears whole or not at all.

    Raises:
        StoreError: `object_changed`, it is not what was listed any more.
        ObjectNotFound, StoreDenied, StoreUnavailable: as the stores do.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if item.uri.startswith("hf://"):
        _from_hub(item, path)
        return
    if item.uri.startswith("file://"):
        _allowed(_path(item.uri), allow, item.uri)
    store, key = _object(item.uri)
    temporary = path.with_name(f".{secrets.token_hex(8)}.source")
    try:
        store.download(key, temporary)
        # The same question as when it was listed: some servers have one ETag for listings, one for objects.
        now = _only(store, key)
        if now is None or (now.size, now.version) != (item.size, item.version):
            raise _changed(item)
        if temporary.stat().st_size != item.size:
            raise _changed(item)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _bad(code: str, message: str) -> InvalidRequest:
    return InvalidRequest(message, code=code, param="source")


def _changed(item: Item) -> StoreError:
    return StoreError(
        f"{_shown(item.uri)} is not what it was when it was listed; list the source again, and start anew",
        code="object_changed",
    )


def _shown(uri: str) -> str:
    return repr(re.sub(r"//[^/@\s]*@", "//…@", uri)[:300])


def _safe(name: str, uri: str) -> str:
    """A name that stays below the folder it is downloaded to."""
    try:
        return check_key(name)
    except InvalidRequest as error:
        raise _bad("bad_source", f"{_shown(uri)} has a file whose name is refused: {error.message}") from None


# ------------------------------------------------------------------------------------------------------
# Patterns


def _split(path: str) -> tuple[str, str]:
    """The folder before the first wildcard of `a/b/*.x`, and the pattern behind it, or (path, "")."""
    wild = WILD.search(path)
    if not wild:
        return path.strip("/"), ""
    folder, _, _ = path[: wild.start()].rpartition("/")
    return folder.strip("/"), path[len(folder) :].lstrip("/")


def _matcher(pattern: str) -> "re.Pattern[str]":
    """The regular expression of a glob; takes linear time for every `**/`, of which there are at most two.

    Raises:
        InvalidRequest: it is no glob.
    """
    segments = re.sub(r"(\*\*/)+", "**/", pattern).split("/")
    if segments.count("**") > 2:
        raise _bad("bad_source", f"The pattern {pattern[:100]!r} has more than two **.")
    made = ""
    for segment in segments[:-1]:
        made += r"(?:[^/]++/)*" if segment == "**" else _segment(segment, pattern) + "/"
    made += ".*" if segments[-1] == "**" else _segment(segments[-1], pattern)
    try:
        return re.compile(made)
    except re.error as error:
        raise _bad("bad_source", f"The pattern {pattern[:100]!r} cannot be read: {error}.") from None


def _segment(segment: str, pattern: str) -> str:
    fixed, at = [""], 0
    while at < len(segment):
        if segment[at] == "*":
            fixed.append("")
        elif segment[at] == "?":
            fixed[-1] += "[^/]"
        elif segment[at] == "[":
            found = re.match(r"\[([!^]?)([^]\\\[]+)\]", segment[at:])
            if not found:
                raise _bad("bad_source", f"The pattern {pattern[:100]!r} has a [ without its ].")
            inside = re.sub(r"([&~|^])", r"\\\1", found[2])
            fixed[-1] += f"[^/{inside}]" if found[1] else f"[{inside}]"
            at += found.end() - 1
        else:
            fixed[-1] += re.escape(segment[at])
        at += 1
    if len(fixed) == 1:
        return fixed[0]
    # What is between two asterisks may as well match where it first can: atomic groups never look again.
    middle = "".join(f"(?>[^/]*?{part})" for part in fixed[1:-1] if part)
    return fixed[0] + middle + "[^/]*" + fixed[-1]


def _chosen(infos: Iterable[ObjectInfo], folder: str, pattern: str, uri: str) -> list[tuple[str, ObjectInfo]]:
    """(name below the folder, object) of those that the pattern wants; without one, of the data files."""
    wanted = _matcher(pattern) if pattern else None
    found = []
    for count, info in enumerate(infos):
        if count >= MAX_LISTED:
            raise _bad(
                "too_many_files", f"{_shown(uri)}: there are more than {MAX_LISTED:,} objects to look at."
            )
        name = info.key[len(folder) + 1 :] if folder else info.key
        if wanted.fullmatch(name) if wanted else is_data(name):
            found.append((_safe(name, uri), info))
            if len(found) > MAX_ITEMS:
                raise _bad("too_many_files", f"{_shown(uri)} has more than {MAX_ITEMS:,} files.")
    return found


# ------------------------------------------------------------------------------------------------------
# Objects and files


def _object(uri: str) -> tuple[Store, str]:
    """The store and the key of one file's address, as `list_source` makes it."""
    if uri.startswith("s3://"):
        bucket, _, key = uri.removeprefix("s3://").partition("/")
        return open_store(f"s3://{bucket}"), key
    path = _path(uri)
    return open_store(path.parent.as_uri()), path.name


def _only(store: Store, key: str) -> ObjectInfo | None:
    """What a listing says about one object."""
    return next((info for info in store.list(key) if info.key == key), None)


def _in_s3(uri: str) -> list[Item]:
    bucket, _, path = uri.removeprefix("s3://").partition("/")
    store = open_store(f"s3://{bucket}")
    folder, pattern = _split(path)
    if folder:
        check_key(folder)

    def item(name: str, info: ObjectInfo) -> Item:
        return Item(name, info.size, info.version, f"s3://{bucket}/{info.key}")

    if not pattern and folder and not path.endswith("/"):
        single = _only(store, folder)
        if single:
            return [item(_safe(folder.rpartition("/")[2], uri), single)]
    prefix = folder + "/" if folder else ""
    # The wildcards' first letters make the listing shorter: a/b/part-*.jsonl need not see a/b/other.
    prefix += WILD.split(pattern, maxsplit=1)[0]
    return [item(name, info) for name, info in _chosen(store.list(prefix), folder, pattern, uri)]


def _path(uri: str) -> Path:
    path = urllib.parse.unquote(uri.removeprefix("file://"))
    if not uri.startswith("file:///") or "\0" in path:
        raise _bad("bad_source", f"{_shown(uri)} needs an absolute path: file:///folder.")
    return Path(os.path.normpath(path))


def _allowed(path: Path, allow: Sequence[Path], uri: str) -> Path:
    """`path` without links, if it is below a folder of `allow`.

    Raises:
        StoreDenied: it is not; whether there is such a file is not said.
    """
    real = Path(os.path.realpath(path))
    if not any(real.is_relative_to(os.path.realpath(folder)) for folder in allow):
        raise StoreDenied(
            f"{_shown(uri)} is not below a folder that this service may read; upload the file, or ask its "
            "operator to allow the folder"
        )
    return real


def _in_folder(uri: str, allow: Sequence[Path]) -> list[Item]:
    whole = _path(uri)
    folder, pattern = _split(str(whole))
    root = _allowed(Path("/" + folder), allow, uri)
    if not root.exists():
        raise _bad("source_not_found", f"There is no {_shown(uri)}.")

    def item(name: str, info: ObjectInfo) -> Item:
        return Item(name, info.size, info.version, (root / name).as_uri())

    if not root.is_dir():
        info = open_store(root.parent.as_uri()).info(root.name)
        if pattern or info is None:
            raise _bad("source_not_found", f"There is no {_shown(uri)}.")
        return [Item(root.name, info.size, info.version, root.as_uri())]
    found = _chosen(open_store(root.as_uri()).list(""), "", pattern, uri)
    # A link may lead anywhere; the store follows those of files.
    return [item(name, info) for name, info in found if not (root / name).is_symlink()]


# ------------------------------------------------------------------------------------------------------
# The Hugging Face Hub

_HUB = re.compile(
    r"hf://datasets/(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[\w.-]+))?(?:@(?P<revision>[\w./-]+))?"
    r"(?:\?split=(?P<split>[\w.-]+))?"
)
_ONE_OF_HUB = re.compile(r"hf://datasets/(?P<name>[\w./-]+)@(?P<sha>[0-9a-f]{40})/(?P<file>.+)")
_HUBS_OWN = ("httpx", "httpx2", "httpcore", "httpcore2", "huggingface_hub", "hf_xet")
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""Words in the names of files that say which split they are, as `datasets` finds them."""


def _in_hub(uri: str) -> list[Item]:
    found = _HUB.fullmatch(uri)
    if not found:
        form = "hf://datasets/org/name[:config][@revision][?split=train]"
        raise _bad("bad_source", f"{_shown(uri)}: write {form}.")
    name, config, split = found["name"], found["config"], found["split"]
    info = _hub(uri, lambda api: api.dataset_info(name, revision=found["revision"], files_metadata=True))
    sha = str(info.sha or "")
    if not re.fullmatch(r"[0-9a-f]{40}", sha):
        raise StoreUnavailable(f"{_shown(uri)}: the Hub did not say which commit it is")
    files = {
        file.rfilename: Item(
            _safe(file.rfilename, uri),
            int(file.size or 0),
            file.lfs.sha256 if file.lfs else str(file.blob_id or ""),
            f"hf://datasets/{name}@{sha}/{file.rfilename}",
        )
        for file in info.siblings or []
        if is_data(file.rfilename)
    }
    if not files:
        scripts = any(file.rfilename.endswith(".py") for file in info.siblings or [])
        hint = " It is made by a script, which is never run; try @refs/convert/parquet." if scripts else ""
        raise _bad("no_data_files", f"There are no data files in {_shown(uri)}.{hint}")
    names = _of_config(list(files), _configs(info), config, uri)
    return [files[each] for each in _of_split(names, split, uri)]


def _configs(info: Any) -> dict[str, list[tuple[str, list[str]]]]:
    """What the data set's card says: for each config its (split, patterns); "" for the default one."""
    made: dict[str, list[tuple[str, list[str]]]] = {}
    card = info.card_data.to_dict() if info.card_data is not None else {}
    listed = card.get("configs")
    for each in listed if isinstance(listed, list) else []:
        if not isinstance(each, dict) or not isinstance(each.get("config_name"), str):
            continue
        data = each.get("data_files")
        if isinstance(data, str) or (isinstance(data, list) and all(isinstance(one, str) for one in data)):
            data = [{"split": "train", "path": data}]
        below = str(each.get("data_dir") or "").strip("/")
        parts = []
        for one in data if isinstance(data, list) else []:
            paths = one.get("path") if isinstance(one, dict) else None
            paths = [paths] if isinstance(paths, str) else paths
            if isinstance(paths, list) and all(isinstance(path, str) for path in paths):
                inside = [f"{below}/{path}" if below else path for path in paths]
                parts.append((str(one.get("split", "train")), inside))
        if parts or below:
            made[each["config_name"]] = parts or [("", [f"{below}/**"])]
            if each.get("default") is True:
                made[""] = made[each["config_name"]]
    if "" not in made and "default" in made:
        made[""] = made["default"]
    return made


def _of_config(
    files: list[str], configs: dict[str, list[tuple[str, list[str]]]], config: str | None, uri: str
) -> dict[str, str]:
    """File -> its split ("": none is known), for the files of a config."""
    named = sorted(each for each in configs if each)
    if config is None and "" not in configs and len(named) == 1:
        config = named[0]
    if config is None and "" not in configs and named:
        message = f"{_shown(uri)} has several configs: {', '.join(named[:50])}. Add one behind a colon."
        raise _bad("config_missing", message)
    if (config or "") in configs:
        made: dict[str, str] = {}
        for split, patterns in configs[config or ""]:
            wanted = [_matcher(pattern.removeprefix("./")) for pattern in patterns]
            for file in files:
                if any(each.fullmatch(file) for each in wanted):
                    made.setdefault(file, split or _split_of(file))
        return made
    if config is not None:
        inside = [file for file in files if config in file.split("/")[:-1]]
        if not inside:
            known = named or sorted({part for file in files for part in file.split("/")[:-1]})
            meant = did_you_mean(config, known) or f"it has {', '.join(known[:50]) or 'none'}"
            raise _bad("config_missing", f"{_shown(uri)} has no config {config!r}: {meant}.")
        files = inside
    return {file: _split_of(file) for file in files}


def _split_of(file: str) -> str:
    """The split that a file's name says, the last such word: `data/train-00000-of-00001.parquet` is train."""
    words = re.split(r"[^A-Za-z0-9]+|(?<=[A-Za-z])(?=[0-9])", file.lower())
    for word in reversed(words):
        for split, names in SPLITS.items():
            if word in names:
                return split
    return ""


def _of_split(files: dict[str, str], split: str | None, uri: str) -> list[str]:
    known = sorted({each for each in files.values() if each})
    if split is None:
        if len(known) > 1:
            message = (
                f"{_shown(uri)} has the splits {', '.join(known[:50])}; add ?split={known[0]} or another."
            )
            raise _bad("split_missing", message)
        return list(files)
    wanted = [name for name, words in SPLITS.items() if split == name or split in words] + [split]
    found = [file for file, each in files.items() if each in wanted]
    if not found and not known and split == "train":
        return list(files)
    if not found:
        meant = did_you_mean(split, known) or f"it has {', '.join(known[:50]) or 'none'}"
        raise _bad("split_missing", f"{_shown(uri)} has no split {split!r}: {meant}.")
    return found


def _from_hub(item: Item, path: Path) -> None:
    found = _ONE_OF_HUB.fullmatch(item.uri)
    if not found or item.name.lower().endswith(NEVER):
        raise _bad("bad_source", f"{_shown(item.uri)} is no data file of the Hub.")
    folder = path.with_name(f".{secrets.token_hex(8)}.source")
    try:
        made = _hub(
            item.uri,
            lambda api: api.hf_hub_download(
                found["name"], found["file"], repo_type="dataset", revision=found["sha"], local_dir=folder
            ),
        )
        if Path(made).stat().st_size != item.size:
            raise _changed(item)
        os.replace(made, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _hub(uri: str, call: Callable[[Any], T]) -> T:
    """`call(the Hub's client)`, its errors as ours."""
    from huggingface_hub import HfApi, errors

    try:
        return call(HfApi())
    except errors.GatedRepoError as error:
        raise StoreDenied(
            f"{_shown(uri)}: access is granted on request; ask for it on the Hub, and set HF_TOKEN"
        ) from error
    except (
        errors.RepositoryNotFoundError,
        errors.RevisionNotFoundError,
        errors.RemoteEntryNotFoundError,
    ) as error:
        message = f"The Hub has no {_shown(uri)}; check its name and revision, and HF_TOKEN if it is private."
        raise _bad("source_not_found", message) from error
    except errors.HFValidationError as error:
        raise _bad("bad_source", f"{_shown(uri)}: {str(error)[:200]}") from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", 0)
        if status in (401, 403):
            raise StoreDenied(f"{_shown(uri)}: the Hub said {status}; check HF_TOKEN") from error
        raise StoreUnavailable(f"{_shown(uri)}: the Hub said {status}") from error
    except Exception as error:
        # httpx's errors are no OSErrors, and this package does not import httpx.
        known = type(error).__module__.split(".")[0] in _HUBS_OWN
        if not known and not isinstance(error, OSError):
            raise
        said = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
        raise StoreUnavailable(f"{_shown(uri)}: the Hub cannot be reached ({said})") from error
