"""Images and speech by name, from tiny raw files in the official layouts."""

from __future__ import annotations

import dataclasses
import gzip

import numpy as np
import pytest
import torch

from gist.catalog import download
from gist.catalog.cards import list_cards, load_card
from gist.catalog.places import sums_known
from gist.catalog.records import SampleCard, Split
from gist.errors import ConfigError, DataError
from gist.samples import datasets, image_files
from gist.samples.data import SampleData
from gist.samples.datasets import CIFAR_CLASSES, load_dataset, prepare_dataset, shape_of_dataset
from gist.samples.image_files import CIFAR_BATCHES
from gist.samples.transforms import ImageTransform, Scale
from tests.image_layout import cifar_batch, idx, write_cifar_archive, write_class_zip
from tests.speech_layout import recording, write_archive, write_folder

RNG = np.random.default_rng(0)


@pytest.fixture
def places(monkeypatch, tmp_path):
    """An empty GIST_DATA and an empty GIST_CACHE."""
    folders = {name: tmp_path / name.lower() for name in ("GIST_DATA", "GIST_CACHE")}
    for name, folder in folders.items():
        folder.mkdir()
        monkeypatch.setenv(name, str(folder))
    return folders["GIST_DATA"], folders["GIST_CACHE"]


@pytest.fixture
def use_card(monkeypatch):
    """Makes a card without checksums, of other sizes, the one that counts."""

    def use(name, **changes):
        card = load_card(name)
        unknown = dict.fromkeys(card.checksums)
        forms = {form: dict.fromkeys(files) for form, files in card.forms.items()}
        card = dataclasses.replace(card, checksums=unknown, forms=forms, **changes)
        monkeypatch.setattr(datasets, "load_card", lambda _: card)
        monkeypatch.setattr(download, "_TRIES", 1)
        return card

    return use


def sizes(data: SampleData) -> tuple[int, int, int]:
    return len(data.train), len(data.val), len(data.test)


def numbers(data: SampleData) -> list[int]:
    """All sample numbers of the splits, sorted."""
    return torch.cat([data.train, data.val, data.test]).sort().values.tolist()


# --- by name ---------------------------------------------------------------------------------


def test_every_card_of_samples_has_a_loader():
    names = [name for name in list_cards() if isinstance(load_card(name), SampleCard)]
    assert set(names) == datasets._LOADERS.keys()


def test_graphs_are_no_samples():
    for action in (load_dataset, prepare_dataset):
        with pytest.raises(ConfigError, match=r"graph is no dataset of .* samples; got: cora; "):
            action("cora")


@pytest.mark.parametrize(
    ("name", "expected"),
    [("digits-images", "none"), ("mnist", "part"), ("cifar10", "train_size")],
)
def test_unknown_options_list_the_known_ones(name, expected):
    for action in (load_dataset, prepare_dataset):
        if name == "digits-images" and action is prepare_dataset:
            continue
        match = f"options that {name} does not have; got: card, x; expected: {expected}$"
        with pytest.raises(ConfigError, match=match):
            action(name, x=1, card=2)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "speech-commands"])
def test_missing_raw_files_say_which_go_where(places, name):
    card = load_card(name)
    with pytest.raises(DataError) as raised:
        load_dataset(name)
    message = str(raised.value)
    for place in places:
        assert f"{place} lacks {card.files[0]}" in message
    assert f"run `gist prepare {name}`, which downloads them" in message
    for form, files in card.forms.items():
        assert f"; or {form}: {next(iter(files))}, " in message
    assert "GIST_DATA" in message


# --- digits ----------------------------------------------------------------------------------


def test_digits_are_the_images_of_scikit_learn():
    from sklearn.datasets import load_digits

    data, theirs = load_dataset("digits-images"), load_digits()
    card = load_card("digits-images")
    assert data.x.dtype == torch.uint8
    assert data.x.shape == (card.samples, *card.shape)
    assert np.array_equal(data.x[:, 0].numpy(), theirs.images)
    assert np.array_equal(data.y.numpy(), theirs.target)
    assert sizes(data) == card.split_sizes
    assert numbers(data) == list(range(card.samples))
    assert data.fingerprint() == load_dataset("digits-images").fingerprint()
    assert len(data.y[data.train].unique()) == card.classes == data.num_classes
    everything = data.inputs(torch.arange(1797), training=False, generator=torch.Generator())
    assert float(everything.mean()) == pytest.approx(0, abs=1e-3)
    assert float(everything.std()) == pytest.approx(1, abs=1e-3)
    assert prepare_dataset("digits-images") is None


# --- MNIST -----------------------------------------------------------------------------------

MNIST = {
    "train": (RNG.integers(0, 256, (30, 28, 28), dtype=np.uint8), np.arange(30) % 10),
    "t10k": (RNG.integers(0, 256, (20, 28, 28), dtype=np.uint8), np.arange(20)[::-1] % 10),
}


def write_mnist(folder, parts=("train", "t10k")):
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        pixels, labels = MNIST[part]
        for kind, values in (("images-idx3", pixels), ("labels-idx1", labels.astype(np.uint8))):
            (folder / f"{part}-{kind}-ubyte.gz").write_bytes(gzip.compress(idx(values)))


@pytest.fixture
def mnist(use_card):
    return use_card("mnist", samples=50, split=Split(train=24, val=6, test=20))


@pytest.mark.parametrize("folder", ["mnist", "MNIST/raw"])
@pytest.mark.parametrize("part", ["auto", "full"])
def test_mnist_keeps_the_order_of_its_files(mnist, tmp_path, folder, part):
    write_mnist(tmp_path / folder)
    data = load_dataset("mnist", root=tmp_path, part=part)
    assert np.array_equal(data.x[:, 0].numpy(), np.concatenate([MNIST[p][0] for p in MNIST]))
    assert data.y.tolist() == [*MNIST["train"][1], *MNIST["t10k"][1]]
    assert data.train.tolist() == list(range(24))
    assert data.val.tolist() == list(range(24, 30))
    assert data.test.tolist() == list(range(30, 50))
    assert (data.name, data.num_classes, data.metric) == ("mnist", 10, "accuracy")
    assert data.transform == ImageTransform(mean=0.1307, std=0.3081)


@pytest.mark.parametrize("part", ["auto", "t10k"])
def test_the_test_images_of_mnist_may_stand_alone(mnist, tmp_path, part):
    write_mnist(tmp_path / "mnist", ["t10k"] if part == "auto" else ["train", "t10k"])
    data = load_dataset("mnist", root=tmp_path, part=part)
    assert data.name == "mnist-t10k"
    assert np.array_equal(data.x[:, 0].numpy(), MNIST["t10k"][0])
    assert sizes(data) == (14, 2, 4)
    assert numbers(data) == list(range(20))
    assert data.train.tolist() != sorted(data.train.tolist())
    again = load_dataset("mnist", root=tmp_path, part=part)
    assert again.fingerprint() == data.fingerprint()
    shape = shape_of_dataset(mnist, root=tmp_path, part=part)
    assert (shape.name, shape.num_samples, shape.training_samples) == ("mnist-t10k", 20, 14)


def test_a_part_that_is_not_there_is_refused(mnist, tmp_path):
    write_mnist(tmp_path / "mnist", ["t10k"])
    with pytest.raises(DataError, match=r"mnist lacks train-images-idx3-ubyte\.gz, train-la"):
        load_dataset("mnist", root=tmp_path, part="full")
    with pytest.raises(ConfigError, match="unknown part; got: 'half'; expected: auto or full or t"):
        load_dataset("mnist", root=tmp_path, part="half")


def test_other_sizes_than_those_on_the_card_are_refused(mnist, use_card, tmp_path):
    write_mnist(tmp_path / "mnist")
    use_card("mnist")
    match = (
        r"not those of mnist; got: 20 images of shape \[1, 28, 28\], 20 labels; expected: 10,000"
    )
    with pytest.raises(DataError, match=match) as raised:
        load_dataset("mnist", root=tmp_path)
    assert "remedy: delete the damaged files and run `gist.prepare_dataset('mnist', root" in str(
        raised.value
    )


def test_checksums_tell_damaged_files(tmp_path):
    write_mnist(tmp_path / "mnist")
    for action in (load_dataset, prepare_dataset):
        match = r"train-images-idx3-ubyte\.gz is damaged or of another version.*440fcabf"
        with pytest.raises(DataError, match=match):
            action("mnist", root=tmp_path)


@pytest.mark.realdata
def test_the_real_test_images_of_mnist(real_data_root):
    data = load_dataset("mnist", root=real_data_root, part="t10k")
    assert sizes(data) == (7000, 1000, 2000)
    assert data.x.shape == (10_000, 1, 28, 28)
    assert torch.bincount(data.y).tolist() == [
        980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009,
    ]  # fmt: skip
    assert data.y[:5].tolist() == [7, 2, 1, 0, 4]
    assert float(data.x.float().mean() / 255) == pytest.approx(0.1325, abs=1e-4)


# --- CIFAR-10 --------------------------------------------------------------------------------

COLOURS = {name: RNG.integers(0, 256, 3, dtype=np.uint8) for name in CIFAR_CLASSES}


def cifar_batches(per_class=2):
    """Six batches with images of one colour for each class, classes in turn."""
    labels = list(range(10)) * per_class
    pixels = np.stack([np.repeat(COLOURS[CIFAR_CLASSES[y]], 1024) for y in labels])
    noise = {name: np.int64(i) for i, name in enumerate(CIFAR_BATCHES)}
    return {name: ((pixels + noise[name]).astype(np.uint8), labels) for name in CIFAR_BATCHES}


@pytest.fixture
def cifar(use_card):
    return use_card("cifar10", samples=120, split=Split(train=80, val=20, test=20))


def write_cifar(root, form):
    folder = root / "cifar10"
    folder.mkdir(parents=True)
    batches = cifar_batches()
    if form == "archive":
        write_cifar_archive(folder / "cifar-10-python.tar.gz", batches)
    elif form == "batches":
        (folder / "cifar-10-batches-py").mkdir()
        for name, (pixels, labels) in batches.items():
            (folder / "cifar-10-batches-py" / name).write_bytes(cifar_batch(pixels, labels))
    else:
        for name, count in (("train", 10), ("test", 2)):
            images = {
                label: np.broadcast_to(colour, (count, 32, 32, 3))
                for label, colour in COLOURS.items()
            }
            write_class_zip(folder / f"cifar10_{name}.zip", images)


@pytest.mark.parametrize("form", ["archive", "batches"])
def test_cifar_keeps_the_order_of_its_batches(cifar, tmp_path, form):
    write_cifar(tmp_path, form)
    data = load_dataset("cifar10", root=tmp_path)
    pixels = np.concatenate([pixels for pixels, _ in cifar_batches().values()])
    assert np.array_equal(data.x.reshape(120, -1).numpy(), pixels)
    assert data.y.tolist() == [*range(10)] * 12
    assert data.test.tolist() == list(range(100, 120))
    assert (data.name, data.num_classes) == ("cifar10", 10)
    assert (data.transform.pad, data.transform.flip) == (4, True)


def test_zips_give_the_official_classes(cifar, tmp_path):
    write_cifar(tmp_path, "zips")
    data = load_dataset("cifar10", root=tmp_path)
    for y, label in enumerate(CIFAR_CLASSES):
        of_class = data.x[data.y == y].permute(0, 2, 3, 1).reshape(-1, 3).short()
        assert len(of_class) == 12 * 1024
        assert int((of_class - torch.from_numpy(COLOURS[label]).short()).abs().max()) <= 4
    assert data.test.tolist() == list(range(100, 120))


def test_zips_with_other_classes_are_refused(cifar, tmp_path):
    write_cifar(tmp_path, "zips")
    images = {f"a{name}": np.zeros((1, 32, 32, 3), np.uint8) for name in CIFAR_CLASSES}
    write_class_zip(tmp_path / "cifar10" / "cifar10_train.zip", images)
    with pytest.raises(DataError, match=r"cifar10_train.zip are not the classes.*got: aairplane,"):
        load_dataset("cifar10", root=tmp_path)
    assert list((tmp_path / "processed").iterdir()) == []


def test_validation_is_stratified_and_the_same_each_time(cifar, tmp_path):
    write_cifar(tmp_path, "archive")
    data = load_dataset("cifar10", root=tmp_path)
    assert sizes(data) == (80, 20, 20)
    assert numbers(data) == list(range(120))
    assert torch.bincount(data.y[data.val]).tolist() == [2] * 10
    assert torch.equal(load_dataset("cifar10", root=tmp_path).val, data.val)


def test_smaller_choices_are_balanced_and_nested(cifar, tmp_path):
    write_cifar(tmp_path, "archive")
    whole = load_dataset("cifar10", root=tmp_path)
    seen: set[int] = set()
    for size in range(10, 81, 10):
        data = load_dataset("cifar10", root=tmp_path, train_size=size)
        assert torch.bincount(data.y[data.train]).tolist() == [size // 10] * 10
        assert torch.equal(data.val, whole.val)
        assert torch.equal(data.test, whole.test)
        assert seen < set(data.train.tolist()) <= set(whole.train.tolist())
        seen = set(data.train.tolist())
    for wrong in (0, 5, 90, 10.0, True, "10"):
        match = "train_size is out of range; got: .*; expected: a multiple of 10 from 10 to 80"
        with pytest.raises(ConfigError, match=match):
            load_dataset("cifar10", root=tmp_path, train_size=wrong)


def test_images_are_decoded_once(cifar, tmp_path, monkeypatch):
    write_cifar(tmp_path, "zips")
    first = load_dataset("cifar10", root=tmp_path)
    monkeypatch.setattr(image_files, "_decoder", lambda size: pytest.fail("decoded again"))
    assert load_dataset("cifar10", root=tmp_path).fingerprint() == first.fingerprint()


def test_changed_images_are_decoded_again(cifar, tmp_path):
    write_cifar(tmp_path, "zips")
    first = load_dataset("cifar10", root=tmp_path)
    images = {name: np.zeros((2, 32, 32, 3), np.uint8) for name in CIFAR_CLASSES}
    write_class_zip(tmp_path / "cifar10" / "cifar10_test.zip", images)
    second = load_dataset("cifar10", root=tmp_path)
    assert int(second.x[100:].max()) <= 1 < int(first.x[100:].max())
    assert torch.equal(first.x[:100], second.x[:100])


def test_the_official_archive_comes_first(cifar, tmp_path):
    write_cifar(tmp_path / "a", "archive")
    write_cifar(tmp_path / "b", "zips")
    for file in (tmp_path / "b" / "cifar10").iterdir():
        file.rename(tmp_path / "a" / "cifar10" / file.name)
    data = load_dataset("cifar10", root=tmp_path / "a")
    assert data.y[:10].tolist() == list(range(10)), "zips are sorted by class"


@pytest.mark.realdata
@pytest.mark.slow
def test_the_real_images_of_cifar(real_data_root, tmp_path, monkeypatch):
    monkeypatch.setenv("GIST_DATA", str(real_data_root))
    monkeypatch.setenv("GIST_CACHE", str(tmp_path))
    data = load_dataset("cifar10")
    card = load_card("cifar10")
    assert data.x.shape == (card.samples, *card.shape)
    assert sizes(data) == card.split_sizes
    assert torch.bincount(data.y[data.train]).tolist() == [4500] * 10
    pixels = data.x[:50_000].float() / 255
    assert torch.allclose(pixels.mean((0, 2, 3)), torch.tensor(data.transform.mean), atol=1e-3)
    assert torch.allclose(pixels.std((0, 2, 3)), torch.tensor(data.transform.std), atol=3e-3)


# --- speech ----------------------------------------------------------------------------------

WORDS = {
    f"{label}/{i}_nohash_0.wav": recording(7 * j + i)
    for j, label in enumerate(("yes", "no"))
    for i in range(4)
}
SPLIT = {"val": ["yes/0_nohash_0.wav"], "test": ["no/1_nohash_0.wav", "yes/3_nohash_0.wav"]}


@pytest.fixture
def speech(use_card):
    return use_card("speech-commands", samples=8, classes=2, split=Split(train=5, val=1, test=2))


def write_speech(root, form):
    if form == "archive":
        folder = root / "speech-commands"
        folder.mkdir()
        write_archive(folder / "speech_commands_v0.02.tar.gz", WORDS, SPLIT)
    else:
        write_folder(root / "SpeechCommands" / "speech_commands_v0.02", WORDS, SPLIT)


@pytest.mark.parametrize("form", ["archive", "unpacked"])
def test_speech_is_standardised(speech, tmp_path, form):
    write_speech(tmp_path, form)
    data = load_dataset("speech-commands", root=tmp_path)
    assert sizes(data) == (5, 1, 2)
    assert numbers(data) == list(range(8))
    assert data.sample_shape == (4096,)
    names = sorted(WORDS)
    assert [names[i] for i in data.val] == SPLIT["val"]
    assert data.y.tolist() == [0] * 4 + [1] * 4
    assert isinstance(data.transform, Scale)
    inputs = data.inputs(data.train, training=True, generator=torch.Generator())
    assert float(inputs.mean()) == pytest.approx(0, abs=1e-4)
    assert float(inputs.std()) == pytest.approx(1, abs=1e-3)
    assert float(data.x.max()) == 0


def test_features_are_made_once(speech, tmp_path, monkeypatch):
    write_speech(tmp_path, "unpacked")
    first = load_dataset("speech-commands", root=tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(datasets, "write_features", lambda *_, **__: pytest.fail("made again"))
        again = load_dataset("speech-commands", root=tmp_path)
    assert again.fingerprint() == first.fingerprint()
    changed = {**WORDS, "yes/2_nohash_0.wav": recording(99)[:9000]}
    write_folder(tmp_path / "SpeechCommands" / "speech_commands_v0.02", changed, SPLIT)
    changed_data = load_dataset("speech-commands", root=tmp_path)
    assert torch.equal((changed_data.x != first.x).any(1).nonzero()[:, 0], torch.tensor([6]))


def test_other_recordings_than_those_on_the_card_are_refused(speech, use_card, tmp_path):
    write_speech(tmp_path, "archive")
    use_card("speech-commands")
    match = r"are not all of the official.*; got: 2 labels, split 5 / 1 / 2; expected: 35, 84,843"
    with pytest.raises(DataError, match=match):
        load_dataset("speech-commands", root=tmp_path)
    assert list((tmp_path / "processed").iterdir()) == []


# --- preparing -------------------------------------------------------------------------------


def served(card, folder):
    """The card, with downloads from a folder."""
    urls = {file: (folder / file).as_uri() for file in card.urls}
    return dataclasses.replace(card, urls=urls)


def test_preparing_downloads_into_the_cache(cifar, places, tmp_path, monkeypatch):
    write_cifar(tmp_path / "server", "archive")
    card = served(cifar, tmp_path / "server" / "cifar10")
    monkeypatch.setattr(datasets, "load_card", lambda _: card)
    folder = places[1] / "cifar10"
    assert prepare_dataset("cifar10") == folder
    assert sorted(path.name for path in places[1].iterdir()) == ["cifar10", "processed"]
    assert list(places[0].iterdir()) == []
    assert sizes(load_dataset("cifar10")) == (80, 20, 20)
    assert "checksums of 1 raw files: 1 in" in sums_known(card, folder)
    (tmp_path / "server" / "cifar10" / "cifar-10-python.tar.gz").unlink()
    assert prepare_dataset("cifar10") == folder


def test_preparing_takes_any_form_that_is_there(cifar, places):
    write_cifar(places[0], "zips")
    assert prepare_dataset("cifar10") == places[0] / "cifar10"
    assert [path.name for path in places[1].iterdir()] == ["processed"]
    assert "checksums of 2 raw files: none is known" in sums_known(cifar, places[0] / "cifar10")


def test_preparing_mnist_gets_all_of_it(mnist, places, tmp_path, monkeypatch):
    write_mnist(tmp_path / "server")
    write_mnist(places[0] / "mnist", ["t10k"])
    card = served(mnist, tmp_path / "server")
    monkeypatch.setattr(datasets, "load_card", lambda _: card)
    assert prepare_dataset("mnist", part="t10k") == places[0] / "mnist"
    assert not any(places[1].iterdir())
    assert prepare_dataset("mnist") == places[1] / "mnist"
    assert load_dataset("mnist").name == "mnist"


@pytest.mark.parametrize("name", ["mnist", "cifar10", "speech-commands"])
def test_without_a_network_it_says_what_goes_where(use_card, places, name, monkeypatch):
    card = use_card(name)
    urls = dict.fromkeys(card.urls, "file:///nowhere/file")
    card = dataclasses.replace(card, urls=urls)
    monkeypatch.setattr(datasets, "load_card", lambda _: card)
    with pytest.raises(DataError) as raised:
        prepare_dataset(name)
    assert "cannot download file:///nowhere/file" in str(raised.value)
    assert f"put it at {places[1] / card.files[0]}" in str(raised.value)
    assert not any(places[1].iterdir())
