"""Raw files from the network: in several tries, checked, unpacked, and all of them or none."""

from __future__ import annotations

import errno
import http.client
import shutil
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from gist.catalog.places import SUMS, data_folders, record_sums, verify
from gist.catalog.records import Card
from gist.errors import DataError

_TIMEOUT_SECONDS = 60
_TRIES = 5
_PAUSE_SECONDS = 1.0
"""Before the second try; before each further one, twice as long."""

_CHUNK_BYTES = 2**20
_WORTH_ANOTHER_TRY = (408, 425, 429)
"""Answers that blame the client, and yet may be others in a moment."""


def fetch(card: Card, root: str | Path | None) -> Path:
    """Downloads the raw files of a dataset that a data folder lacks, and verifies them.

    An archive that lies beside the dataset's folder, or in it, in any data folder, is taken in
    place of the network.

    Args:
        card: Of the dataset.
        root: As for :func:`~gist.catalog.places.data_folders`: the last one of these is written to.

    Returns:
        The dataset's folder.

    Raises:
        DataError: a download failed after several tries, or what came is not what the card says.
            Then nothing is left behind.
    """
    places = data_folders(root)
    place = places[-1]
    folder = place / card.folders[0]
    place.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{card.name}-", dir=place) as name, _bar() as bar:
        new = Path(name) / "raw"
        for file, url in _wanted(card):
            if file.endswith("/"):
                archive = _given(card, url, places)
                if archive is None:
                    archive = Path(name) / _file_name(url)
                    by_hand = f"{folder.parent / archive.name}, or what it holds in {folder / file}"
                    _download(url, archive, by_hand + _elsewhere(root), bar)
                _unpack(archive, new / file, _inside(card, file))
            elif not (folder / file).is_file():
                _download(url, new / file, str(folder / file), bar)
        for file in card.checksums:
            if not (new / file).is_file():
                _adopt(folder / file, new / file, card)
        verify(card, folder, new=new, root=root)
        record_sums(card, new)
        _move(new, folder)
    return folder


def _wanted(card: Card) -> Iterator[tuple[str, str]]:
    """What to download: a file, or a folder that an archive goes to, and its URL."""
    for path, url in card.urls.items():
        if not (path.endswith("/") and url.endswith("/")):
            yield path, url
            continue
        for file in card.checksums:
            if file.startswith(path):
                yield file, url + file.removeprefix(path)


def _inside(card: Card, folder: str) -> set[PurePosixPath]:
    """Raw files that lie in a folder below the dataset's, as paths below that one."""
    files = (PurePosixPath(file) for file in card.checksums)
    return {file.relative_to(folder) for file in files if file.is_relative_to(folder)}


def _file_name(url: str) -> str:
    return PurePosixPath(urlsplit(url).path).name


def _given(card: Card, url: str, places: Sequence[Path]) -> Path | None:
    """An archive that was put beside the dataset's folder, or into it, by hand; or None."""
    folders = (place / name for place in places for name in card.folders)
    files = (at / _file_name(url) for folder in folders for at in (folder.parent, folder))
    return next((file for file in files if file.is_file()), None)


def _elsewhere(root: str | Path | None) -> str:
    return "; or either of them in the same place below GIST_DATA" if root is None else ""


def _adopt(there: Path, new: Path, card: Card) -> None:
    """Links a file that was there before, so that all are verified together."""
    if not there.is_file():
        raise DataError(
            f"what was downloaded for {card.name} lacks {there.name}",
            got=", ".join(card.urls.values()),
            expected=", ".join(card.checksums),
            remedy=f"the source has changed: put the file at {there} by hand",
        )
    new.parent.mkdir(parents=True, exist_ok=True)
    new.symlink_to(there.absolute())


def _move(new: Path, folder: Path) -> None:
    """Puts files where they belong; the sums last, which are of all of them."""
    files = sorted(path for path in new.rglob("*") if path.is_file() and not path.is_symlink())
    for file in sorted(files, key=lambda path: path.name == SUMS):
        target = folder / file.relative_to(new)
        target.parent.mkdir(parents=True, exist_ok=True)
        file.replace(target)


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )


def _download(url: str, path: Path, by_hand: str, bar: Progress) -> None:
    """Writes what a URL gives to ``path``, going on where the last try ended."""
    path.parent.mkdir(parents=True, exist_ok=True)
    transfer = _Transfer(url, path, bar)
    failure: Exception | None = None
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS * 2 ** (attempt - 1))
        try:
            return transfer.run()
        except urllib.error.HTTPError as error:
            failure = error
            error.close()
            if 400 <= error.code < 500 and error.code not in _WORTH_ANOTHER_TRY:
                break
        except (OSError, http.client.HTTPException) as error:
            failure = error
            if getattr(error, "errno", None) == errno.ENOSPC:
                break
    raise DataError(
        f"cannot download {url}",
        got=failure,
        remedy=f"check the network and run the command again; or get it by hand and put it at "
        f"{by_hand}; and then run the command again",
    ) from failure


class _Transfer:
    """One file on its way, over several connections.

    Args:
        url: Where from.
        path: Where to.
        bar: Shows how much is there.
    """

    def __init__(self, url: str, path: Path, bar: Progress) -> None:
        self.url, self.path, self.bar = url, path, bar
        self.task = bar.add_task(path.name, total=None)
        self.version: str | None = None
        """What the server calls the file's content: a file is never put together from two."""

    def run(self) -> None:
        """Receives what is missing.

        Raises:
            OSError: the connection failed, or ended too early.
            DataError: a page came in place of a file.
        """
        have = self.path.stat().st_size if self.version and self.path.exists() else 0
        request = urllib.request.Request(self.url)
        if have:
            request.add_header("Range", f"bytes={have}-")
            request.add_header("If-Range", self.version)  # type: ignore[arg-type]
        with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as answer:
            if answer.headers.get_content_type() == "text/html":
                raise DataError(
                    f"{self.url} gives a web page, not a file",
                    got=answer.headers["Content-Type"],
                    remedy="open it in a browser: the page tells why, or asks for something",
                )
            start = have if answer.status == http.client.PARTIAL_CONTENT else 0
            if start and not str(answer.headers["Content-Range"]).startswith(f"bytes {start}-"):
                self.version = None
                raise ConnectionError(f"another part came: {answer.headers['Content-Range']}")
            self.version = answer.headers["ETag"] or answer.headers["Last-Modified"]
            length = answer.headers["Content-Length"]
            total = None if length is None else start + int(length)
            self.bar.update(self.task, total=total, completed=start)
            with self.path.open("ab" if start else "wb") as file:
                while chunk := answer.read(_CHUNK_BYTES):
                    file.write(chunk)
                    self.bar.update(self.task, advance=len(chunk))
                size = file.tell()
        if total is not None and size != total:
            raise ConnectionError(f"the connection ended after {size:,} of {total:,} bytes")


def _unpack(archive: Path, folder: Path, wanted: set[PurePosixPath]) -> None:
    """Unpacks what is wanted of a zip archive; one folder around everything in it is left out.

    Raises:
        DataError: it is no whole archive, or a file in it would lie outside of ``folder``.
    """
    try:
        with zipfile.ZipFile(archive) as packed:
            members = [member for member in packed.infolist() if not member.is_dir()]
            paths = [PurePosixPath(member.filename) for member in members]
            for path in paths:
                if not path.parts or path.is_absolute() or ".." in path.parts:
                    raise DataError(
                        f"{archive.name} is not to be trusted: a file would lie outside its folder",
                        got=str(path),
                        expected="names below the folder",
                    )
            wrapped = len({path.parts[0] for path in paths}) == 1 and wanted.isdisjoint(paths)
            for member, path in zip(members, paths, strict=True):
                below = PurePosixPath(*path.parts[wrapped:])
                if below not in wanted:
                    continue
                target = folder / below
                target.parent.mkdir(parents=True, exist_ok=True)
                with packed.open(member) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, _CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise DataError(
            f"{archive.name} is damaged or cut off",
            got=error,
            expected="a whole zip archive",
            remedy="run the command again; a copy put there by hand has to be replaced",
        ) from error
