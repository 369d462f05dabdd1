"""A copy of a run folder at any fsspec path, from which another machine goes on.

What files hold lies in `blobs/`, under its hash, and `manifests/N.json` names every file of the
folder with its hash. A manifest is written last and what it names is never changed, so a copy is
there as a whole or not at all, and what did not change since the last one is not sent again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import threading
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import fsspec

from envs.errors import UserError
from rl_ft.run_folder import appearing, run_id

log = logging.getLogger(__name__)

LEFT_OUT = {".lock", ".incomplete", "ray"}
"""Files and folders that only mean something where they are, or that are being written."""
IN_MEMORY_BYTES = 64 * 2**20
"""Up to this size a file is sent as it was read at one instant: it may be growing."""
PATIENCE_S = 900.0
"""For a copy at the end of a stage, with a storage that may be far or gone."""

_SENDING = threading.Lock()
"""Of two copies at once, one would forget what the other has sent and not named yet."""


class Mirror:
    """Copies of one run folder.

    Example:
        mirror = Mirror("s3://bucket/first")
        mirror.push(Path("runs/first"))
        mirror.pull(Path("runs/again"))   # on another machine

    Raises:
        UserError: nothing that can be asked is at the path.
    """

    def __init__(self, url: str, *, keep: int = 2) -> None:
        self._url, self._keep = url.rstrip("/"), keep
        try:
            self._fs, self._root = fsspec.core.url_to_fs(self._url)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{url} is no path that fsspec can open: {error}; expected one such as "
                "s3://bucket/folder, gs://bucket/folder or file:///folder"
            ) from error
        self._known: dict[tuple[Path, int, int], str] = {}

    def claim(self, run: str) -> None:
        """Keep the path for one run: copies of another would push its own out.

        Raises:
            UserError: it is another run's.
        """
        place = f"{self._root}/run.json"
        self._fs.invalidate_cache()
        if not self._fs.exists(place):
            self._fs.makedirs(self._root, exist_ok=True)
            self._fs.pipe_file(place, json.dumps({"run_id": run}).encode())
        elif json.loads(self._fs.cat_file(place))["run_id"] != run:
            raise UserError(
                f"monitor.mirror is {self._url}, where copies of another run are: expected a path "
                "of its own for every run"
            )

    def push(self, folder: Path) -> None:
        """Add a copy, and forget all but the `keep` newest."""
        for place in ("blobs", "manifests"):
            self._fs.makedirs(f"{self._root}/{place}", exist_ok=True)
        there = {Path(name).name: size for name, size in self._sizes("blobs")}
        sent = ((str(file.relative_to(folder)), self._send(file, there)) for file in _files(folder))
        files = {name: digest for name, digest in sent if digest is not None}
        numbers = self._numbers()
        number = max(numbers, default=0) + 1
        self._fs.pipe_file(self._manifest(number), json.dumps(files).encode())
        self._forget([*numbers, number])

    def pull(self, folder: Path) -> None:
        """The newest copy, as a folder that must not be there yet.

        Raises:
            UserError: it is there, or no copy is whole.
        """
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} is there already; give another --out")
        causes = []
        for number in reversed(self._numbers()):
            try:
                files = json.loads(self._fs.cat_file(self._manifest(number)))
                with appearing(folder) as partial:
                    for name, digest in files.items():
                        _require_within(name, digest)
                        self._receive(digest, partial / name)
                return
            except (OSError, ValueError) as error:
                causes.append(f"copy {number}: {error}")
                log.warning("%s: copy %d is not whole: %s", self._url, number, error)
        raise UserError(f"there is no copy of a run in {self._url} ({'; '.join(causes) or 'none'})")

    def _send(self, file: Path, there: dict[str, int]) -> str | None:
        """Its hash; None if it has vanished, of a checkpoint that is being forgotten: its seal will
        tell. What the storage misses is an error."""
        content = None
        try:
            stat = file.stat()
            size, key = stat.st_size, (file, stat.st_size, stat.st_mtime_ns)
            if size <= IN_MEMORY_BYTES:
                content = file.read_bytes()
                size, digest = len(content), hashlib.blake2b(content, digest_size=20).hexdigest()
            else:
                digest = self._known.get(key) or _digest(file)
                self._known[key] = digest
        except FileNotFoundError:
            return None
        if there.get(digest) != size:
            if content is None:
                self._fs.put_file(str(file), self._blob(digest))
            else:
                self._fs.pipe_file(self._blob(digest), content)
            there[digest] = size
        return digest

    def _receive(self, digest: str, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        self._fs.get_file(self._blob(digest), str(file))
        if _digest(file) != digest:
            raise ValueError(f"{file.name} is not as it was sent")

    def _forget(self, numbers: list[int]) -> None:
        kept = sorted(numbers)[-self._keep :]
        for number in set(numbers) - set(kept):
            self._fs.rm_file(self._manifest(number))
        wanted = set()
        for number in kept:
            wanted |= set(json.loads(self._fs.cat_file(self._manifest(number))).values())
        for name, _ in self._sizes("blobs"):
            if Path(name).name not in wanted:
                self._fs.rm_file(name)

    def _numbers(self) -> list[int]:
        names = (Path(name) for name, _ in self._sizes("manifests"))
        return sorted(int(name.stem) for name in names if name.stem.isdigit())

    def _sizes(self, place: str) -> Iterator[tuple[str, int]]:
        self._fs.invalidate_cache()
        try:
            found = self._fs.ls(f"{self._root}/{place}", detail=True)
        except FileNotFoundError:
            return
        for entry in found:
            if entry["type"] == "file":
                yield entry["name"], entry["size"]

    def _blob(self, digest: str) -> str:
        return f"{self._root}/blobs/{digest}"

    def _manifest(self, number: int) -> str:
        return f"{self._root}/manifests/{number}.json"


class Copier:
    """Copies a run folder beside the run: one copy at a time, and none ends or holds the run.

    Raises:
        UserError: the path is none, or another run's.
    """

    def __init__(self, url: str | None, folder: Path) -> None:
        self._mirror = None if url is None else Mirror(url)
        self._folder = folder
        self._latest: threading.Thread | None = None
        run = run_id(folder)
        if self._mirror is not None and run is not None:
            self._claim(self._mirror, run)

    def begin(self) -> None:
        """Copy, unless the last copy is still under way."""
        if self._mirror is None or (self._latest is not None and self._latest.is_alive()):
            return
        self._latest = threading.Thread(
            target=self._copy, args=(self._mirror,), name="mirror", daemon=True
        )
        self._latest.start()

    def wait(self) -> None:
        """Until the copy that is under way is there, `PATIENCE_S` at most."""
        if self._latest is None:
            return
        self._latest.join(PATIENCE_S)
        if self._latest.is_alive():
            log.warning("%s is still being copied: the run goes on", self._folder)

    def finish(self) -> None:
        """Copy what is there now, and wait for it."""
        self.wait()
        self.begin()
        self.wait()

    def _claim(self, mirror: Mirror, run: str) -> None:
        try:
            mirror.claim(run)
        except UserError:
            raise
        except Exception as error:  # it may answer when there is something to copy
            log.warning("no copy of %s yet: %s: %s", self._folder, type(error).__name__, error)

    def _copy(self, mirror: Mirror) -> None:
        try:
            with _SENDING:
                mirror.push(self._folder)
        except Exception as error:  # whatever a storage raises: the run itself is whole
            log.warning("%s was not copied: %s: %s", self._folder, type(error).__name__, error)


def _require_within(name: str, digest: str) -> None:
    """Whoever may write the copy must not write elsewhere on the machine that pulls it."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not re.fullmatch("[0-9a-f]{40}", digest):
        raise ValueError(f"{name!r} ({digest!r}) is no file of a run folder")


def _files(folder: Path) -> Iterator[Path]:
    try:
        entries = sorted(folder.iterdir())
    except FileNotFoundError:
        # Forgotten since it was listed, like a file of an old checkpoint.
        return
    for entry in entries:
        if entry.name in LEFT_OUT or entry.name.endswith(".partial"):
            continue
        if entry.is_dir():
            yield from _files(entry)
        else:
            yield entry


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.blake2b(digest_size=20)).hexdigest()
