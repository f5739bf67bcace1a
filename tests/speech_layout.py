"""Tiny sets of recordings in the layout of Google Speech Commands."""

from __future__ import annotations

import io
import tarfile
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

LISTS = {"val": "validation_list.txt", "test": "testing_list.txt"}


def recording(seed: int) -> np.ndarray:
    """Noise of one second that grows and fades, int16."""
    noise = np.random.default_rng(seed).standard_normal(16_000) * np.hanning(16_000)
    return (3000 * noise).astype(np.int16)


def wav(samples: np.ndarray, *, rate: int = 16_000, channels: int = 1) -> bytes:
    """A WAV file."""
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(samples.itemsize)
        file.setframerate(rate)
        file.writeframes(samples.tobytes())
    return stream.getvalue()


def files(words: Mapping[str, np.ndarray], split: Mapping[str, Sequence[str]]) -> dict[str, bytes]:
    """Contents of all files, noise and words about them among them."""
    noise = {"_background_noise_/pink.wav": wav(recording(1000)), "README.md": b"words"}
    lists = {
        LISTS[name]: "".join(f"{n}\n" for n in names).encode() for name, names in split.items()
    }
    return {name: wav(samples) for name, samples in words.items()} | noise | lists


def write_folder(
    folder: Path, words: Mapping[str, np.ndarray], split: Mapping[str, Sequence[str]]
) -> None:
    """Words such as ``yes/0_nohash_0.wav`` in a folder."""
    for name, content in files(words, split).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def write_archive(
    file: Path, words: Mapping[str, np.ndarray], split: Mapping[str, Sequence[str]]
) -> None:
    """The same as the official archive has them, in no order and below ``./``."""
    with tarfile.open(file, "w:gz") as archive:
        for name, content in reversed(files(words, split).items()):
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
