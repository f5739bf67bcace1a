"""Where the files of datasets lie, which of them are missing, and whether they are what they were.

Raw files lie in the dataset's folder below a data folder, as ``planetoid/Cora/raw/ind.cora.x``. The
data folder is ``root=``, or ``GIST_DATA`` (only ever read) and then the cache: ``GIST_CACHE``, by
default ``~/.cache/gist``. A card may name several forms of the raw files; one of them is enough.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Collection, Mapping
from pathlib import Path

from gist.catalog.records import Card
from gist.errors import DataError

SUMS = "SHA256SUMS"
"""In a dataset's folder: sums that the card does not have, from when files were downloaded."""

_FILES_NAMED = 3
"""How many files an error names; it counts the others."""


def data_folders(root: str | Path | None) -> list[Path]:
    """Folders to look in; the last is the one to write to."""
    if root is not None:
        return [Path(root).expanduser()]
    data = os.environ.get("GIST_DATA")
    cache = Path(os.environ.get("GIST_CACHE") or "~/.cache/gist").expanduser()
    return [Path(data).expanduser(), cache] if data else [cache]


def find_raw(card: Card, root: str | Path | None) -> Path | None:
    """The dataset's folder with all raw files, in the first data folder that has them; or None."""
    found = find_form(card, root)
    return None if found is None else found[1]


def find_form(
    card: Card, root: str | Path | None, forms: Collection[str] | None = None
) -> tuple[str, Path] | None:
    """The first form of a dataset's raw files that is there, in the first data folder with it.

    Args:
        card: Of the dataset.
        root: As for :func:`data_folders`.
        forms: Those that will do; all by default.

    Returns:
        Its name and the dataset's folder; None where none is there.
    """
    for form, alone in card.in_forms().items():
        folders = (at / name for at in data_folders(root) for name in card.folders)
        if forms is None or form in forms:
            found = next((folder for folder in folders if _has_all(alone, folder)), None)
            if found is not None:
                return form, found
    return None


def _has_all(card: Card, folder: Path) -> bool:
    return all((folder / file).is_file() for file in card.checksums)


def not_there(card: Card, root: str | Path | None) -> DataError:
    """The error that tells where which raw files are missing."""
    otherwise = "set GIST_DATA to a folder that holds them" if root is None else "put them there"
    others = "".join(f"; or {form}: {_named([*files])}" for form, files in card.forms.items())
    return DataError(
        f"the raw files of {card.name} are not there",
        got="; ".join(_lacking(card, place) for place in data_folders(root)),
        expected=f"all of them in {' or '.join(card.folders)} below a data folder{others}",
        remedy=f"run {preparing(card, root)}, which downloads them, or {otherwise}",
    )


def preparing(card: Card, root: str | Path | None) -> str:
    """What is to be run to have a dataset's files in the folder ``root``, or in the cache."""
    if root is None:
        return f"`gist prepare {card.name}`"
    return f"`gist.prepare_dataset({card.name!r}, root={str(root)!r})`"


def _lacking(card: Card, place: Path) -> str:
    """What a data folder lacks, of the dataset's folder in it that has most of the files."""
    if not place.is_dir():
        return f"{place} does not exist"
    lacks = {place: card.files}
    for folder in (place / name for name in card.folders):
        if folder.is_dir():
            lacks[folder] = [file for file in card.checksums if not (folder / file).is_file()]
    folder, missing = min(lacks.items(), key=lambda item: len(item[1]))
    return f"{folder} lacks {_named(missing)}"


def _named(files: list[str]) -> str:
    more = len(files) - _FILES_NAMED
    return ", ".join(files[:_FILES_NAMED]) + (f" and {more} more" if more > 0 else "")


def verify(
    card: Card, folder: Path, *, new: Path | None = None, root: str | Path | None = None
) -> dict[str, str]:
    """Compares raw files with their SHA-256 on the card, or from when they were downloaded.

    Args:
        card: Of the dataset.
        folder: The dataset's folder.
        new: Where files lie that are meant for that folder; None for those that are in it.
        root: As for :func:`data_folders`.

    Returns:
        The SHA-256 of files that were compared.

    Raises:
        DataError: a file is another one.
    """
    known = known_sums(card, folder)
    for file, expected in known.items():
        if (got := sha256((new or folder) / file)) != expected:
            remedy = f"delete it and run {preparing(card, root)}"
            if card.checksums[file] is None:
                remedy += f"; or delete {folder / SUMS} too, if a new version is meant"
            raise DataError(
                f"{folder / file} is damaged or of another version",
                got=f"SHA-256 {got}",
                expected=expected,
                remedy=remedy,
            )
    return known


def known_sums(card: Card, folder: Path) -> dict[str, str]:
    """SHA-256 of raw files, of those that it is known of."""
    recorded: Mapping[str, str] = {}
    if (folder / SUMS).is_file():
        lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        recorded = {file: digest for digest, _, file in (line.partition("  ") for line in lines)}
    sums = {file: known or recorded.get(file) for file, known in card.checksums.items()}
    return {file: digest for file, digest in sums.items() if digest is not None}


def sums_known(card: Card, folder: Path) -> str:
    """What raw files were compared with, in words.

    Args:
        card: Of the dataset.
        folder: The dataset's folder, or one with what was made of raw files that are gone.
    """
    there = next((form for form in card.in_forms().values() if _has_all(form, folder)), None)
    if there is None:
        return "its raw files are gone, so nothing was compared with their checksums"
    known = known_sums(there, folder)
    listed = sum(there.checksums[file] is not None for file in known)
    counts = {"on its card": listed, f"in {folder / SUMS}": len(known) - listed}
    found = [f"{count} {where}" for where, count in counts.items() if count]
    said = f"checksums of {len(there.checksums)} raw files: {', '.join(found) or 'none is known'}"
    if not listed:
        said += "; its card has none, so only its sizes say that these are the official files"
    return said


def record_sums(card: Card, folder: Path) -> None:
    """Writes down the SHA-256 of files that the card has none of, as ``sha256sum -c`` reads it."""
    unknown = [file for file, known in card.checksums.items() if known is None]
    if unknown:
        lines = (f"{sha256(folder / file)}  {file}\n" for file in unknown)
        (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def sha256(file: Path) -> str:
    """The SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
