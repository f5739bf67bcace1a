"""Images and speech by name: generated ones at once, the others from a folder with their raw files.

:mod:`gist.catalog.places` says where raw files lie. They are verified each time; what takes long to
make of them is kept (:mod:`gist.samples.kept`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gist.catalog.cards import load_card
from gist.catalog.download import fetch
from gist.catalog.options import every_option
from gist.catalog.places import find_form, not_there, preparing, sha256, verify
from gist.catalog.records import MAIN, SampleCard
from gist.errors import ConfigError, DataError, one_of
from gist.samples.convert import SPLITS
from gist.samples.data import SampleData
from gist.samples.image_files import (
    CIFAR_BATCHES,
    Labels,
    Pixels,
    in_order,
    parse_cifar_batch,
    read_cifar_archive,
    read_class_zip,
    read_idx,
)
from gist.samples.kept import kept_arrays
from gist.samples.outline import SampleShape
from gist.samples.speech import fingerprint, write_features
from gist.samples.transforms import ImageTransform, Scale

Numbers = NDArray[np.int64]

CIFAR_CLASSES = (
    "airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck",
)  # fmt: skip
"""Classes of CIFAR-10, as the official files number them."""

_MNIST_TRANSFORM = ImageTransform(mean=0.1307, std=0.3081)
_CIFAR_TRANSFORM = ImageTransform(
    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), pad=4, flip=True
)
"""Mean and standard deviation of each colour over the training images."""


def load_dataset(name: str, /, *, root: str | Path | None = None, **options: Any) -> SampleData:
    """Independent samples by name; never touches the network.

    Args:
        name: The name of a dataset of samples.
        root: Folder to read raw files from, in place of ``GIST_DATA`` and the cache; what takes
            long to read is kept there too, if it may be written to.
        **options: mnist: ``part="auto"``, ``"full"`` or ``"t10k"`` as in :func:`read_mnist`.
            cifar10: ``train_size=None`` as in :func:`read_cifar10`.

    Raises:
        ConfigError: an unknown dataset or option; lists the known ones.
        DataError: raw files are missing (says which go where) or damaged (names them).
        MissingDependencyError: a package that reads them is not installed.
    """
    card = _sample_card(name)
    load = _LOADERS[card.name]
    every = every_option(card.name, load, options)
    try:
        return load(card, root, **every)
    except DataError as error:
        if error.remedy:
            raise
        remedy = f"delete the damaged files and run {preparing(card, root)}"
        raise DataError(
            error.what, got=error.got, expected=error.expected, remedy=remedy
        ) from error


def shape_of_dataset(
    card: SampleCard, *, root: str | Path | None = None, **options: Any
) -> SampleShape:
    """The sizes that :func:`load_dataset` would give.

    They are those of the card, unless options, or which files are there, make them others.

    Args:
        card: Of the dataset.
        root: As for :func:`load_dataset`.
        **options: Likewise.

    Raises:
        ConfigError: an unknown option.
    """
    shape, every = SampleShape.of_card(card), every_option(card.name, _LOADERS[card.name], options)
    if (size := every.get("train_size")) is not None:
        left_out = card.split_sizes[0] - size
        return replace(shape, train_samples=size, num_samples=shape.num_samples - left_out)
    if "part" in every:
        found = find_form(card, root, _forms(every["part"]))
        if every["part"] == "t10k" or (found is not None and found[0] == "t10k"):
            _, _, test = card.split_sizes
            train = test - test // 10 - test // 5
            name = f"{card.name}-t10k"
            return replace(shape, num_samples=test, train_samples=train, name=name)
    return shape


def prepare_dataset(name: str, root: str | Path | None = None, **options: Any) -> Path | None:
    """Downloads the raw files of a dataset, unless they are there, verifies and reads them.

    What takes long to read is kept, so that :func:`load_dataset` has it at once.

    Args:
        name: As for :func:`load_dataset`.
        root: Folder to put them in, in place of the cache.
        **options: As for :func:`load_dataset`.

    Returns:
        The dataset's folder; None where the dataset needs no files.

    Raises:
        ConfigError: an unknown dataset or option.
        DataError: the download failed, or what came is not what the card says. Then nothing is
            left behind.
        MissingDependencyError: a package that reads the files is not installed.
    """
    card = _sample_card(name)
    if not card.checksums:
        return None
    every = every_option(card.name, _LOADERS[card.name], options)
    found = find_form(card, root, _forms_to_prepare(every))
    folder = fetch(card, root) if found is None else found[1]
    load_dataset(name, root=root, **options)
    return folder


def digits_images(card: SampleCard, root: str | Path | None = None) -> SampleData:
    """scikit-learn's 1,797 handwritten digits as images of 8 x 8 pixels from 0 to 16.

    A fixed permutation is split: 1,097 for training, 200 for validation, 500 for testing.

    Args:
        card: Of the dataset.
        root: Of no effect: the images come with scikit-learn.
    """
    from sklearn.datasets import load_digits  # takes a second to import

    loaded = load_digits()
    _, val, test = card.split_sizes
    return _samples(
        card,
        loaded.images.astype(np.uint8)[:, None],
        loaded.target.astype(np.int64),
        _shuffled(len(loaded.target), val, test),
        transform=ImageTransform(mean=4.884 / 255, std=6.017 / 255),
    )


def read_mnist(card: SampleCard, root: str | Path | None, *, part: str = "auto") -> SampleData:
    """MNIST: 28 x 28 pixels, in the four files of the IDX format.

    The last 5,000 training images are for validation. Where only the 10,000 test images are used,
    a fixed permutation of them is split: 7,000 for training, 1,000 for validation, 2,000 for
    testing; the data is then called ``mnist-t10k``.

    Args:
        card: Of the dataset.
        root: As for :func:`load_dataset`.
        part: ``"full"``; ``"t10k"`` for the test images alone; or ``"auto"``, whichever is there.
    """
    form, folder = _found(card, root, _forms(part))
    verify(card.in_forms()[form], folder, root=root)
    train, val, test = card.split_sizes

    def images(prefix: str, count: int) -> tuple[Pixels, Labels]:
        pixels, labels = (
            read_idx(folder / f"{prefix}-{kind}-ubyte.gz")
            for kind in ("images-idx3", "labels-idx1")
        )
        return _checked(card, folder, pixels[:, None], labels.astype(np.int64), count)

    tested = images("t10k", test)
    if form == "t10k":
        splits = _shuffled(test, test // 10, test // 5)
        return _samples(
            card, *tested, splits, transform=_MNIST_TRANSFORM, name=f"{card.name}-{form}"
        )
    pixels, labels = in_order([images("train", train + val), tested])
    ends = np.split(np.arange(len(labels)), [train, train + val])
    splits = dict(zip(SPLITS, ends, strict=True))
    return _samples(card, pixels, labels, splits, transform=_MNIST_TRANSFORM)


def read_cifar10(
    card: SampleCard, root: str | Path | None, *, train_size: int | None = None
) -> SampleData:
    """CIFAR-10: 32 x 32 pixels in colour.

    Of the 50,000 training images 5,000 are for validation, 500 of each class, by a fixed
    permutation. They are read from the official archive for Python, from the batches in it, or from
    two zips with a folder for each class. The order of images, and so the split, is another one in
    zips.

    Args:
        card: Of the dataset.
        root: As for :func:`load_dataset`.
        train_size: Train on so many images, equally many of each class: those that come first in
            the permutation, so that a larger choice has all of a smaller one. None takes all.
    """
    form, folder = _found(card, root)
    alone = card.in_forms()[form]
    train, val, test = card.split_sizes

    def write(target: Path) -> None:
        *trained, tested = _cifar_batches(form, folder)
        images = in_order(trained)
        _checked(card, folder, *images, train + val)
        _checked(card, folder, *tested, test)
        pixels, labels = in_order([images, tested])
        np.save(target / "x.npy", pixels)
        np.save(target / "y.npy", labels)

    kept = kept_arrays(card.name, root, _source(alone, folder, root), ("x", "y"), write)
    pixels, labels = kept["x"].numpy(), kept["y"].numpy()
    order = np.random.default_rng(0).permutation(train + val)
    ranks = _ranks_in_class(labels[order])
    each = val // card.classes
    chosen = ranks >= each
    if train_size is not None:
        chosen &= ranks < each + _per_class(train_size, train, card.classes)
    splits = {"train": np.sort(order[chosen]), "val": np.sort(order[ranks < each])}
    splits["test"] = np.arange(train + val, len(labels))
    return _samples(card, pixels, labels, splits, transform=_CIFAR_TRANSFORM)


def read_speech_commands(card: SampleCard, root: str | Path | None) -> SampleData:
    """Google Speech Commands (Warden, arXiv 1804.03209), version 0.02, as 4,096 features.

    :mod:`gist.samples.speech` says which. They are standardised by the mean and the standard
    deviation of all of them in the training recordings. The official lists make the splits.

    Args:
        card: Of the dataset.
        root: As for :func:`load_dataset`.
    """
    form, folder = _found(card, root)
    if form == MAIN:
        source = _source(card.in_forms()[form], folder, root)
        raw = folder / next(iter(source))
    else:
        raw, source = folder, {"files": fingerprint(folder)}
    names = ("x", "y", *SPLITS, "scale")
    write = partial(write_features, raw, labels=card.classes, split=card.split_sizes)
    arrays = kept_arrays(card.name, root, source, names, write)
    mean, std = arrays["scale"].tolist()
    return SampleData(
        **{name: arrays[name] for name in names[:-1]},
        num_classes=card.classes,
        transform=Scale(mean=mean, std=std),
        metric=card.metric,
        name=card.name,
    )


def _sample_card(name: str) -> SampleCard:
    card = load_card(name)
    if not isinstance(card, SampleCard):
        raise ConfigError(
            "a graph is no dataset of independent samples",
            got=card.name,
            expected="the name of a dataset of samples",
            remedy="gist.load_dataset reads both kinds",
        )
    return card


def _forms(part: str) -> Collection[str] | None:
    """The forms of raw files that hold a part of the data; None for any."""
    one_of("part", part, _PARTS)
    return _PARTS[part]


def _forms_to_prepare(options: Mapping[str, Any]) -> Collection[str] | None:
    """The forms of raw files that need no download: a part of the data only if asked for."""
    if "part" not in options:
        return None
    return _forms("full" if options["part"] == "auto" else options["part"])


def _found(
    card: SampleCard, root: str | Path | None, forms: Collection[str] | None = None
) -> tuple[str, Path]:
    """The form of the raw files that is there, and their folder.

    Raises:
        DataError: there is none.
    """
    found = find_form(card, root, forms)
    if found is None:
        raise not_there(card if forms is None else card.in_forms()[next(iter(forms))], root)
    return found


def _source(alone: SampleCard, folder: Path, root: str | Path | None) -> dict[str, str]:
    """The SHA-256 of each raw file, those that are known compared with it."""
    known = verify(alone, folder, root=root)
    return {file: known.get(file) or sha256(folder / file) for file in alone.checksums}


def _cifar_batches(form: str, folder: Path) -> Iterator[tuple[Pixels, Labels]]:
    """Batches of CIFAR-10, the last of which is for testing."""
    if form == MAIN:
        yield from read_cifar_archive(folder / "cifar-10-python.tar.gz")
    elif form == "batches":
        for batch in CIFAR_BATCHES:
            content = (folder / "cifar-10-batches-py" / batch).read_bytes()
            yield parse_cifar_batch(batch, content)
    else:
        for name in ("cifar10_train.zip", "cifar10_test.zip"):
            pixels, labels, classes = read_class_zip(folder / name, (32, 32))
            if classes != list(CIFAR_CLASSES):
                raise DataError(
                    f"the folders in {name} are not the classes of CIFAR-10",
                    got=", ".join(classes),
                    expected=", ".join(CIFAR_CLASSES),
                )
            yield pixels, labels


def _checked(
    card: SampleCard, folder: Path, pixels: Pixels, labels: Labels, count: int
) -> tuple[Pixels, Labels]:
    """Images and labels, refused where they are not as many or as large as the card says."""
    got = (len(pixels), list(pixels.shape[1:]), len(labels))
    if got != (count, card.shape, count):
        raise DataError(
            f"the raw files in {folder} are not those of {card.name}",
            got="{:,} images of shape {}, {:,} labels".format(*got),
            expected=f"{count:,} of shape {card.shape}",
        )
    return pixels, labels


def _shuffled(count: int, val: int, test: int) -> dict[str, Numbers]:
    """A fixed permutation, split: the last samples are for testing, those before for validation."""
    order = np.random.default_rng(0).permutation(count)
    return dict(zip(SPLITS, np.split(order, [count - val - test, count - test]), strict=True))


def _ranks_in_class(labels: Labels) -> Numbers:
    """How many samples of its own class come before each sample."""
    ranks = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        mine = np.flatnonzero(labels == label)
        ranks[mine] = np.arange(len(mine))
    return ranks


def _per_class(train_size: int, most: int, classes: int) -> int:
    whole = isinstance(train_size, int) and not isinstance(train_size, bool)
    if not whole or not 0 < train_size <= most or train_size % classes:
        raise ConfigError(
            "train_size is out of range",
            got=repr(train_size),
            expected=f"a multiple of {classes} from {classes} to {most:,}",
        )
    return train_size // classes


def _samples(
    card: SampleCard,
    pixels: Pixels,
    labels: Labels,
    splits: Mapping[str, Numbers],
    *,
    transform: ImageTransform,
    name: str | None = None,
) -> SampleData:
    return SampleData(
        x=torch.from_numpy(pixels),
        y=torch.from_numpy(labels),
        **{split: torch.from_numpy(numbers) for split, numbers in splits.items()},
        num_classes=card.classes,
        transform=transform,
        metric=card.metric,
        name=name or card.name,
    )


_PARTS: dict[str, Collection[str] | None] = {"auto": None, "full": (MAIN,), "t10k": ("t10k",)}
"""Forms of the raw files of MNIST that hold a part of it."""

_LOADERS: dict[str, Callable[..., SampleData]] = {
    "digits-images": digits_images,
    "mnist": read_mnist,
    "cifar10": read_cifar10,
    "speech-commands": read_speech_commands,
}
