"""Files of images in their official layouts: read as they are, refused where they are damaged."""

from __future__ import annotations

import gzip
import io
import os
import pickle
import tarfile
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from gist.errors import DataError
from gist.samples.image_files import (
    CIFAR_BATCHES,
    parse_cifar_batch,
    read_cifar_archive,
    read_class_zip,
    read_idx,
)
from tests.image_layout import cifar_batch, idx, jpeg, write_cifar_archive

RNG = np.random.default_rng(0)


@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 99))
def test_idx_files_are_read_back(tmp_path_factory, shape, seed):
    values = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    file = tmp_path_factory.mktemp("idx") / "a.gz"
    file.write_bytes(gzip.compress(idx(values)))
    read = read_idx(file)
    assert read.dtype == np.uint8
    assert read.shape == tuple(shape)
    assert np.array_equal(read, values)
    assert read.flags.writeable


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", "cannot read a.gz"),
        (b"no gzip", "cannot read a.gz; got: Not a gzipped file"),
        (gzip.compress(idx(np.zeros((2, 3), np.uint8)))[:-9], "cannot read a.gz"),
        (gzip.compress(b"\0\0"), "it begins with 0000"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0"), "it begins with 00000d01"),
        (gzip.compress(b"\0\0\x08\x02\0\0\0\x01"), "8 bytes for the shape"),
        (gzip.compress(idx(np.zeros(5, np.uint8))[:-1]), r"12 bytes for the shape \[5\]"),
        (gzip.compress(idx(np.zeros(5, np.uint8)) + b"x"), r"14 bytes for the shape \[5\]"),
    ],
    ids=["empty", "no gzip", "cut off", "magic", "kind", "header", "short", "long"],
)
def test_damaged_idx_files_are_refused(tmp_path, content, match):
    file = tmp_path / "a.gz"
    file.write_bytes(content)
    with pytest.raises(DataError, match=match):
        read_idx(file)


@given(st.integers(0, 7), st.integers(0, 99))
def test_batches_as_python_2_pickled_them_are_read(count, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
    labels = rng.integers(0, 10, count).tolist()
    read, numbers = parse_cifar_batch("a", cifar_batch(pixels, labels))
    assert read.dtype == np.uint8
    assert read.shape == (count, 3, 32, 32)
    assert np.array_equal(read.reshape(count, 3072), pixels)
    assert numbers.dtype == np.int64
    assert numbers.tolist() == labels


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def test_no_code_of_a_batch_is_run(tmp_path):
    written = tmp_path / "written"
    content = pickle.dumps({b"data": Bomb(f"touch {written}"), b"labels": []}, protocol=3)
    pickle.loads(content)
    assert written.exists(), "it would be run"
    written.unlink()
    with pytest.raises(DataError, match=r"is not to be trusted.*got: (posix|nt)\.system"):
        parse_cifar_batch("a", content)
    assert not written.exists()


@pytest.mark.parametrize("name", ["builtins.eval", "numpy.load", "builtins.getattr"])
def test_nothing_but_arrays_may_be_called(name):
    module, _, function = name.rpartition(".")
    content = f"c{module}\n{function}\n.".encode()
    with pytest.raises(DataError, match=f"got: {name}; expected: arrays"):
        parse_cifar_batch("a", content)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        cifar_batch(np.zeros((2, 3072), np.uint8), [1, 2])[:-50],
        cifar_batch(np.zeros((2, 3072), np.uint8), [1]),
        cifar_batch(np.zeros((2, 3071), np.uint8), [1, 2]),
        cifar_batch(np.zeros((2, 3072), np.float32), [1, 2]),
        cifar_batch(np.zeros((2, 3072), np.uint8), [1, "2"]),
        cifar_batch(np.zeros((2, 3072), np.uint8), None),
        cifar_batch([[0] * 3072], [1]),
        pickle.dumps([1, 2], protocol=2),
    ],
)
def test_damaged_batches_are_refused(content):
    with pytest.raises(DataError, match="cannot read a"):
        parse_cifar_batch("a", content)


def batches(count=2):
    return {
        name: (RNG.integers(0, 256, (count, 3072), dtype=np.uint8), [i, 9 - i])
        for i, name in enumerate(CIFAR_BATCHES)
    }


def test_batches_of_an_archive_come_in_order(tmp_path):
    written = batches()
    file = tmp_path / "cifar.tar.gz"
    write_cifar_archive(file, dict(reversed(written.items())))
    read = list(read_cifar_archive(file))
    assert len(read) == 6
    for (pixels, labels), (expected, numbers) in zip(read, written.values(), strict=True):
        assert np.array_equal(pixels.reshape(2, -1), expected)
        assert labels.tolist() == numbers
    assert [path.name for path in tmp_path.iterdir()] == ["cifar.tar.gz"], "nothing is unpacked"


def test_damaged_archives_are_refused(tmp_path):
    file = tmp_path / "cifar.tar.gz"
    write_cifar_archive(file, {k: v for k, v in batches().items() if k != "data_batch_3"})
    with pytest.raises(DataError, match=r"cannot read cifar\.tar\.gz; got: it lacks data_batch_3"):
        list(read_cifar_archive(file))
    write_cifar_archive(file, batches(50))
    content = file.read_bytes()
    for damaged in (b"", b"text" * 99, content[: len(content) // 2], content[:-1000]):
        file.write_bytes(damaged)
        with pytest.raises(DataError, match=r"cannot read cifar\.tar\.gz"):
            list(read_cifar_archive(file))


def test_a_link_in_place_of_a_batch_is_not_followed(tmp_path):
    file = tmp_path / "cifar.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    with pytest.raises(DataError, match="it lacks data_batch_1"):
        list(read_cifar_archive(file))


def write_zip(file, images):
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in images.items():
            archive.writestr(name, content)


def png(pixels, mode=None):
    stream = io.BytesIO()
    Image.fromarray(pixels, mode).save(stream, "PNG")
    return stream.getvalue()


def test_images_of_a_zip_are_in_order_of_class_and_name(tmp_path):
    pixels = RNG.integers(0, 256, (4, 5, 6, 3), dtype=np.uint8)
    names = ["b/1.png", "a/0.png", "b/0.png", "c/0.png"]
    file = tmp_path / "a.zip"
    write_zip(file, {"a/": b""} | dict(zip(names, map(png, pixels), strict=True)))
    read, labels, classes = read_class_zip(file, (5, 6))
    assert classes == ["a", "b", "c"]
    assert labels.tolist() == [0, 1, 1, 2]
    assert labels.dtype == np.int64
    assert np.array_equal(read, pixels[[1, 2, 0, 3]].transpose(0, 3, 1, 2))


def test_jpeg_is_decoded_and_grey_becomes_colour(tmp_path):
    smooth = np.broadcast_to(np.arange(0, 256, 8, dtype=np.uint8)[:, None], (32, 32))
    file = tmp_path / "a.zip"
    write_zip(file, {"a/0.jpg": jpeg(np.stack([smooth] * 3, -1)), "a/1.png": png(smooth.copy())})
    read, _, _ = read_class_zip(file, (32, 32))
    assert np.abs(read.astype(int) - smooth).max() <= 4
    assert np.array_equal(read[1], np.stack([smooth] * 3))


@pytest.mark.parametrize(
    ("images", "match"),
    [
        ({"a/0.jpg": b"text"}, r"cannot read a/0\.jpg"),
        ({"a/0.jpg": jpeg(np.zeros((32, 32, 3), np.uint8))[:200]}, r"cannot read a/0\.jpg"),
        ({"a/0.png": png(np.zeros((32, 31, 3), np.uint8))}, "32 x 31; expected: 32 x 32 pixels"),
        ({"0.jpg": b""}, r"0\.jpg in it is in no folder of a class"),
        ({"a/b/0.jpg": b""}, "in no folder of a class"),
    ],
)
def test_zips_with_other_files_are_refused(tmp_path, images, match):
    file = tmp_path / "a.zip"
    write_zip(file, images)
    with pytest.raises(DataError, match=match):
        read_class_zip(file, (32, 32))


def test_damaged_zips_are_refused(tmp_path):
    file = tmp_path / "a.zip"
    write_zip(file, {"a/0.png": png(np.zeros((32, 32, 3), np.uint8))})
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[60] ^= 255
    for content in (b"", whole[:-30], bytes(changed)):
        file.write_bytes(content)
        with pytest.raises(DataError, match="cannot read a"):
            read_class_zip(file, (32, 32))
