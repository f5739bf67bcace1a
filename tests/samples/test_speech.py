"""Features of speech: the formulas, one by one; recordings in the official layout."""

from __future__ import annotations

import io
import math
import tarfile
import wave

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gist.errors import DataError
from gist.samples.speech import (
    FRAMES,
    LISTS,
    MELS,
    RATE,
    fingerprint,
    hertz,
    log_mel,
    mel,
    mel_bands,
    parse_wav,
    write_features,
)
from tests.speech_layout import recording, wav, write_archive, write_folder

ARRAYS = ("x", "y", "train", "val", "test", "scale")


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- features --------------------------------------------------------------------------------


def test_the_mel_scale_is_linear_and_then_logarithmic():
    assert mel(f64(0, 60, 200, 1000)).tolist() == pytest.approx([0, 0.9, 3, 15])
    assert mel(f64(6400)).item() == pytest.approx(15 + 27)
    assert hertz(f64(1, 3, 15, 42)).tolist() == pytest.approx([200 / 3, 200, 1000, 6400])


@given(st.floats(0, 8000))
def test_the_mel_scale_has_its_inverse(frequency):
    assert hertz(mel(f64(frequency))).item() == pytest.approx(frequency, rel=1e-12, abs=1e-12)


def test_bands_are_triangles_of_area_one_between_even_steps_of_mel():
    bands = mel_bands()
    assert bands.shape == (MELS, 1025)
    edges = [hertz(f64(i * mel(f64(8000)).item() / 129)).item() for i in range(130)]
    bin_hz = RATE / 2048
    for band, (low, peak, high) in enumerate(zip(edges, edges[1:], edges[2:], strict=False)):
        height = 2 / (high - low)
        for k in range(math.floor(low / bin_hz), math.ceil(high / bin_hz) + 1):
            if not 0 <= k < 1025:
                continue
            at = k * bin_hz
            side = (at - low) / (peak - low) if at <= peak else (high - at) / (high - peak)
            expected = height * max(side, 0.0)
            assert bands[band, k].item() == pytest.approx(expected, abs=1e-12)
        outside = torch.arange(1025) * bin_hz
        assert not bool(bands[band][(outside < low) | (outside > high)].any())


def test_features_are_those_of_the_definition():
    """Frame by frame, with numpy's transform in place of torch's."""
    samples = recording(3)
    padded = np.pad(samples.astype(np.float64), 1024, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)
    frames = [padded[512 * i : 512 * i + 2048] * window for i in range(FRAMES)]
    power = np.abs(np.fft.rfft(frames)) ** 2
    bands = mel_bands().numpy() @ power.T
    decibels = 10 * np.log10(np.maximum(bands, 1e-10))
    expected = np.maximum(decibels - decibels.max(), -80)
    waves = torch.from_numpy(samples.astype(np.float64))[None]
    assert log_mel(waves)[0].numpy() == pytest.approx(expected.ravel(), abs=1e-9)
    assert log_mel(waves.float())[0].numpy() == pytest.approx(expected.ravel(), abs=1e-3)


def test_a_tone_is_loudest_in_its_own_band():
    time = torch.arange(RATE, dtype=torch.float64) / RATE
    for frequency in (300, 1000, 4000):
        tone = 1000 * torch.sin(2 * math.pi * frequency * time)
        features = log_mel(tone[None]).view(MELS, FRAMES)
        band = int(features.mean(1).argmax())
        assert mel_bands()[band, round(frequency / (RATE / 2048))] > 0


def test_features_do_not_depend_on_loudness_or_company():
    waves = torch.from_numpy(np.stack([recording(i) for i in range(5)])).double()
    together = log_mel(waves)
    assert together.shape == (5, MELS * FRAMES)
    assert torch.allclose(log_mel(waves / 7), together, atol=1e-9)
    for alone, row in zip(waves, together, strict=True):
        assert torch.allclose(log_mel(alone[None])[0], row, atol=1e-9)
    assert float(together.max()) == 0
    assert float(together.min()) >= -80


def test_silence_has_features():
    assert log_mel(torch.zeros(1, RATE)).tolist() == [[0.0] * (MELS * FRAMES)]


# --- recordings ------------------------------------------------------------------------------


@given(st.integers(0, 2 * RATE), st.integers(0, 9))
def test_recordings_are_cut_or_padded_to_a_second(length, seed):
    samples = np.random.default_rng(seed).integers(-(2**15), 2**15, length).astype(np.int16)
    read = parse_wav("a.wav", wav(samples))
    assert read.shape == (RATE,)
    kept = min(length, RATE)
    assert read[:kept].tolist() == samples[:kept].tolist()
    assert not bool(read[kept:].any())


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "cannot read the recording a.wav"),
        (b"RIFF" + b"\0" * 50, "cannot read the recording a.wav"),
        (wav(np.zeros(9, np.int16), rate=8000), "got: 1 channels, 16 bits, 8,000 samples per s"),
        (wav(np.zeros(8, np.int16), channels=2), "got: 2 channels, 16 bits, 16,000"),
        (wav(np.zeros(8, np.int8)), "got: 1 channels, 8 bits, 16,000 .*expected: 1 channel, 16"),
    ],
)
def test_other_recordings_are_refused(content, match):
    with pytest.raises(DataError, match=match):
        parse_wav("a.wav", content)


WORDS = {
    f"{label}/{i}_nohash_0.wav": recording(10 * j + i)
    for j, label in enumerate(("yes", "no", "up"))
    for i in range(3)
}
SPLIT = {"val": ["yes/0_nohash_0.wav", "no/2_nohash_0.wav"], "test": ["up/1_nohash_0.wav"]}
SIZES = {"labels": 3, "split": (6, 2, 1)}


def features(raw, folder):
    folder.mkdir()
    write_features(raw, folder, **SIZES)
    return {array: np.load(folder / f"{array}.npy") for array in ARRAYS}


def test_recordings_are_numbered_by_name_and_split_by_the_lists(tmp_path):
    write_folder(tmp_path / "raw", WORDS, SPLIT)
    made = features(tmp_path / "raw", tmp_path / "made")
    names = sorted(WORDS)
    assert made["x"].shape == (9, MELS * FRAMES)
    assert made["x"].dtype == np.float32
    for row, name in zip(made["x"], names, strict=True):
        alone = log_mel(torch.from_numpy(WORDS[name].astype(np.float32))[None])[0]
        assert row == pytest.approx(alone.numpy(), abs=1e-4)
    assert made["y"].tolist() == [["no", "up", "yes"].index(n.split("/")[0]) for n in names]
    for split, listed in SPLIT.items():
        assert {names[i] for i in made[split]} == set(listed)
    parts = np.concatenate([made[split] for split in ("train", *LISTS)])
    assert sorted(parts.tolist()) == list(range(9))
    training = made["x"][made["train"]].astype(np.float64)
    assert made["scale"] == pytest.approx([training.mean(), training.std()], rel=1e-9)


def test_an_archive_gives_what_its_folder_gives(tmp_path):
    write_folder(tmp_path / "raw", WORDS, SPLIT)
    write_archive(tmp_path / "a.tar.gz", WORDS, SPLIT)
    unpacked = features(tmp_path / "raw", tmp_path / "one")
    packed = features(tmp_path / "a.tar.gz", tmp_path / "two")
    for array in ARRAYS:
        assert np.allclose(unpacked[array], packed[array], atol=1e-4), array
    assert len(list(tmp_path.iterdir())) == 4, "nothing is unpacked"


def test_damage_is_told(tmp_path):
    (tmp_path / "made").mkdir()
    write_folder(tmp_path / "raw", WORDS, SPLIT | {"val": ["yes/9_nohash_0.wav"]})
    with pytest.raises(DataError, match=r"validation_list\.txt names .* not there; got: yes/9_no"):
        write_features(tmp_path / "raw", tmp_path / "made", **SIZES)
    (tmp_path / "raw" / "testing_list.txt").unlink()
    with pytest.raises(DataError, match=r"raw lacks testing_list\.txt"):
        write_features(tmp_path / "raw", tmp_path / "made", **SIZES)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no recordings in"):
        write_features(tmp_path / "empty", tmp_path / "made", **SIZES)
    archive = tmp_path / "a.tar.gz"
    write_archive(archive, WORDS, SPLIT)
    whole = archive.read_bytes()
    for content in (b"", b"text" * 999, whole[: len(whole) // 2]):
        archive.write_bytes(content)
        with pytest.raises(DataError, match=r"a\.tar\.gz is damaged or cut off"):
            write_features(archive, tmp_path / "made", **SIZES)


def test_nothing_outside_of_an_archive_is_read(tmp_path):
    secret = tmp_path / "secret.wav"
    secret.write_bytes(wav(recording(0)))
    archive = tmp_path / "a.tar.gz"
    with tarfile.open(archive, "w:gz") as packed:
        link = tarfile.TarInfo("yes/0_nohash_0.wav")
        link.type, link.linkname = tarfile.SYMTYPE, str(secret)
        packed.addfile(link)
    with pytest.raises(DataError, match="no recordings in"):
        write_features(archive, tmp_path, **SIZES)


def test_a_folder_is_known_by_its_files(tmp_path):
    write_folder(tmp_path / "raw", WORDS, SPLIT)
    before = fingerprint(tmp_path / "raw")
    assert fingerprint(tmp_path / "raw") == before
    (tmp_path / "raw" / "_background_noise_" / "other.txt").write_text("not read")
    assert fingerprint(tmp_path / "raw") == before
    (tmp_path / "raw" / "yes" / "0_nohash_0.wav").write_bytes(wav(recording(99)[:50]))
    changed = fingerprint(tmp_path / "raw")
    assert changed != before
    (tmp_path / "raw" / "testing_list.txt").write_text("")
    assert fingerprint(tmp_path / "raw") not in (before, changed)


def test_waves_of_the_tests_are_read_by_the_standard_library():
    with wave.open(io.BytesIO(wav(recording(1)))) as file:
        assert (file.getframerate(), file.getnframes()) == (RATE, RATE)
