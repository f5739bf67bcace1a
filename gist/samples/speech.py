"""Google Speech Commands: recordings of one second as features of 128 mel bands in 32 frames.

The features are those of the IST paper's release (Yuan et al., arXiv 1910.02120), which takes the
default log-mel spectrogram of librosa, 128 bands at 16,000 samples per second, as 4,096 inputs.
They are computed here with torch alone. What differs: the official lists say which recordings are
for validation and testing, and shorter recordings, which the release leaves out, are padded.

Shape legend: ``B`` recordings, ``T`` samples of a recording, ``K`` frequencies, ``M`` mel bands,
``L`` frames.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import hashlib
import io
import tarfile
import wave
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gist.errors import DataError

RATE = 16_000
"""Samples per second, and of each recording."""

MELS, FRAMES = 128, 32
LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}
"""Files that list the recordings of a split; all others are for training."""

_FFT, _HOP = 2048, 512
_FLOOR = 1e-10
"""Least power that is told from silence, of samples of 16 bits as whole numbers."""

_RANGE_DB = 80.0
"""Below the loudest entry of a recording by so much, all is equal."""

_AT_A_TIME = 256


def write_features(raw: Path, folder: Path, *, labels: int, split: Sequence[int]) -> None:
    """Makes features of all recordings, in ``x.npy``, labels and splits, in a folder.

    Recordings are in the order of their names, labels are numbered in alphabetical order.
    ``scale.npy`` holds mean and standard deviation of all features of the training recordings.

    Args:
        raw: The official archive, or the folder that it unpacks to.
        folder: Where ``x``, ``y``, ``train``, ``val``, ``test`` and ``scale`` go.
        labels: How many there must be.
        split: Recordings that there must be for training, validation and testing.

    Raises:
        DataError: the archive is damaged, a recording is not as the official ones are, a list names
            one that is not there, or there are more or fewer than there must be.
    """
    with _opened(raw) as (found, read):
        words = [name for name in found if _is_recording(name)]
        rows = {name: row for row, name in enumerate(sorted(words))}
        if not rows:
            raise DataError(f"no recordings in {raw}", expected="such as yes/0a7c2a8d_nohash_0.wav")
        if missing := [name for name in LISTS.values() if name not in found]:
            raise DataError(f"{raw} lacks {missing[0]}")
        splits = _splits(rows, {split: read(name).decode() for split, name in LISTS.items()})
        _, y = np.unique([name.partition("/")[0] for name in rows], return_inverse=True)
        got = [int(y.max()) + 1, *map(len, splits.values())]
        if got != [labels, *split]:
            raise DataError(
                f"the recordings in {raw} are not all of the official ones, or others",
                got="{:,} labels, split {:,} / {:,} / {:,}".format(*got),
                expected="{:,}, {:,} / {:,} / {:,}".format(labels, *split),
            )
        shape = (len(rows), MELS * FRAMES)
        x = np.lib.format.open_memmap(folder / "x.npy", mode="w+", dtype=np.float32, shape=shape)
        for start in range(0, len(words), _AT_A_TIME):
            some = words[start : start + _AT_A_TIME]
            waves = torch.stack([parse_wav(name, read(name)) for name in some])
            x[[rows[name] for name in some]] = log_mel(waves).numpy()
        x.flush()
    arrays = {"y": y.astype(np.int64), "scale": _scale(x, splits["train"]), **splits}
    for array, values in arrays.items():
        np.save(folder / f"{array}.npy", values)


def fingerprint(folder: Path) -> str:
    """A digest of names, sizes and times of the files in an unpacked folder."""
    digest = hashlib.sha256()
    with _opened(folder) as (names, _):
        for name in names:
            state = (folder / name).stat()
            digest.update(f"{name} {state.st_size} {state.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def parse_wav(name: str, content: bytes) -> Tensor:
    """The ``[T]`` samples of a WAV file, as stored, cut or padded with zeros to one second.

    Args:
        name: Of the file, for errors.
        content: Of the file.

    Raises:
        DataError: it is none, or not 16 bits, one channel and 16,000 samples per second.
    """
    try:
        with wave.open(io.BytesIO(content)) as file:
            layout = (file.getnchannels(), 8 * file.getsampwidth(), file.getframerate())
            data = file.readframes(RATE)
    except (wave.Error, EOFError) as error:
        raise DataError(f"cannot read the recording {name}", got=error) from error
    if layout != (1, 16, RATE):
        raise DataError(
            f"{name} is no recording like the others",
            got="{} channels, {} bits, {:,} samples per second".format(*layout),
            expected=f"1 channel, 16 bits, {RATE:,} samples per second",
        )
    samples = np.zeros(RATE, np.float32)
    found = np.frombuffer(data[: len(data) // 2 * 2], "<i2")
    samples[: len(found)] = found
    return torch.from_numpy(samples)


def log_mel(waves: Tensor) -> Tensor:
    """Power in mel bands, in decibels below the loudest entry of each recording.

    Power spectra of frames of 2,048 samples under a Hann window, 512 apart and centred, with the
    recording reflected at its ends; weighted by :func:`mel_bands`; ``10 log10`` of it relative to
    its maximum, at least -80.

    Args:
        waves: ``[B, T]`` with ``T`` = 16,000, from -32,768 to 32,767.

    Returns:
        ``[B, M * L]``, bands first; from -80 to 0.
    """
    window = torch.hann_window(_FFT, dtype=waves.dtype)
    spectra = torch.stft(waves, _FFT, _HOP, window=window, return_complex=True)  # [B, K, L]
    power = mel_bands().to(waves.dtype) @ spectra.abs().square()  # [B, M, L]
    decibels = 10 * power.clamp(min=_FLOOR).log10()
    relative = decibels - decibels.amax(dim=(1, 2), keepdim=True)
    return relative.clamp(min=-_RANGE_DB).flatten(1)


@functools.cache
def mel_bands() -> Tensor:
    """Weights ``[M, K]`` of frequencies in triangular mel bands, each of area 1 (Slaney, 1998).

    ``M + 2`` frequencies lie evenly on the mel scale from 0 to 8,000 Hz. A band rises from 0 at the
    one before to its peak, falls to 0 at the one after, and is scaled by 2 over its width in Hz.
    """
    highest = float(mel(torch.tensor(RATE / 2, dtype=torch.float64)))
    edges = hertz(torch.linspace(0, highest, MELS + 2, dtype=torch.float64))
    frequencies = torch.linspace(0, RATE / 2, _FFT // 2 + 1, dtype=torch.float64)
    low, peak, high = (edges[i : MELS + i, None] for i in range(3))
    rising = (frequencies - low) / (peak - low)
    falling = (high - frequencies) / (high - peak)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return triangles * (2 / (high - low))


_LINEAR_HZ = 200 / 3
"""Hz per mel below 1,000 Hz: there the scale is linear, above it logarithmic."""

_LOG_STEP = float(np.log(6.4)) / 27
"""27 mels above 1,000 Hz the frequency is 6.4 times as high."""


def mel(frequency: Tensor) -> Tensor:
    """Hz on Slaney's mel scale (Auditory Toolbox, 1998)."""
    linear = frequency / _LINEAR_HZ
    above = 15 + (frequency.clamp(min=1000) / 1000).log() / _LOG_STEP
    return torch.where(frequency < 1000, linear, above)


def hertz(mels: Tensor) -> Tensor:
    """The inverse of :func:`mel`."""
    return torch.where(mels < 15, mels * _LINEAR_HZ, 1000 * (_LOG_STEP * (mels - 15)).exp())


@contextlib.contextmanager
def _opened(raw: Path) -> Iterator[tuple[list[str], Callable[[str], bytes]]]:
    """Names of all files in a folder or archive as they lie there, and what reads one of them."""
    if raw.is_dir():
        names = sorted(path.relative_to(raw).as_posix() for path in raw.glob("*/*.wav"))
        lists = (name for name in LISTS.values() if (raw / name).is_file())
        yield [*names, *lists], lambda name: (raw / name).read_bytes()
        return
    try:
        with tarfile.open(raw) as archive:
            members = {str(PurePosixPath(m.name)): m for m in archive if m.isfile()}

            def read(name: str) -> bytes:
                content = archive.extractfile(members[name])
                assert content is not None  # it is a file
                return content.read()

            yield list(members), read
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(f"{raw.name} is damaged or cut off", got=error) from error


def _is_recording(name: str) -> bool:
    """Whether a file is a spoken word; noise lies in a folder whose name begins with ``_``."""
    return name.count("/") == 1 and name.endswith(".wav") and not name.startswith("_")


def _splits(rows: Mapping[str, int], lists: Mapping[str, str]) -> dict[str, NDArray[np.int64]]:
    """Numbers of the recordings of each split, in order."""
    split_of = np.full(len(rows), "train")
    for split, text in lists.items():
        for name in text.split():
            if name not in rows:
                raise DataError(
                    f"{LISTS[split]} names a recording that is not there",
                    got=name,
                    expected="one of the recordings",
                )
            split_of[rows[name]] = split
    return {split: np.flatnonzero(split_of == split) for split in ("train", *LISTS)}


def _scale(x: NDArray[np.float32], rows: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean and standard deviation of all entries of some rows, a part of the rows at a time."""
    total = squares = 0.0
    for start in range(0, len(rows), _AT_A_TIME):
        part = x[rows[start : start + _AT_A_TIME]].astype(np.float64)
        total, squares = total + part.sum(), squares + (part**2).sum()
    count = max(len(rows), 1) * x.shape[1]
    mean = total / count
    return np.array([mean, np.sqrt(squares / count - mean**2)])
