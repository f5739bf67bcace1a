"""Transforms against slow ones that treat one image after the other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gist.errors import ConfigError
from gist.partition.streams import stream
from gist.samples.transforms import ImageTransform, Scale, identify


def one_by_one(batch: Tensor, transform: ImageTransform, generator: torch.Generator) -> Tensor:
    """Pads, cuts, mirrors and normalises every image for itself, from the same draws."""
    count, channels, height, width = batch.shape
    pad = transform.pad
    down, right = torch.randint(2 * pad + 1, (2, count, 1), generator=generator)
    mirrored = torch.rand(count, 1, generator=generator) < 0.5 if transform.flip else down < 0
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (transform.mean, transform.std))
    out = []
    for image, y, x, flip in zip(batch, down, right, mirrored, strict=True):
        padded = torch.zeros(channels, height + 2 * pad, width + 2 * pad, dtype=torch.uint8)
        padded[:, pad : pad + height, pad : pad + width] = image
        cut = padded[:, int(y) : int(y) + height, int(x) : int(x) + width]
        cut = cut.flip(2) if flip else cut
        out.append(cut.float() * (1 / (255 * std)) - mean / std)
    return torch.stack(out)


@given(
    seed=st.integers(0, 999),
    count=st.integers(1, 6),
    channels=st.sampled_from([1, 3]),
    height=st.integers(1, 6),
    width=st.integers(1, 6),
    pad=st.integers(0, 3),
    flip=st.booleans(),
)
def test_augmentation_is_that_of_single_images(seed, count, channels, height, width, pad, flip):
    rng = torch.Generator().manual_seed(seed)
    shape = (count, channels, height, width)
    batch = torch.randint(256, shape, generator=rng).to(torch.uint8)
    before = batch.clone()
    transform = ImageTransform(mean=[0.4] * channels, std=[0.2] * channels, pad=pad, flip=flip)
    got = transform(batch, training=True, generator=stream("x", seed))
    assert torch.equal(got, one_by_one(batch, transform, stream("x", seed)))
    assert torch.equal(got, transform(batch, training=True, generator=stream("x", seed)))
    assert torch.equal(batch, before)


def test_every_place_and_both_sides_are_drawn():
    image = torch.zeros(1, 1, 3, 3, dtype=torch.uint8)
    image[0, 0, 1, 0] = 255
    transform = ImageTransform(pad=1, flip=True)
    many = transform(image.expand(2000, 1, 3, 3), training=True, generator=stream("places"))
    assert many.dtype == torch.float32
    seen = many.flatten(1).mean(dim=0).view(3, 3)  # how often the pixel is at each place
    # 9 places x 2 sides: column 0 of a third is cut away; its mirror is column 2.
    expected = torch.tensor([[1.0, 2.0, 1.0]] * 3) / 18
    assert torch.allclose(seen, expected, atol=0.03)


def test_evaluation_draws_nothing_and_moves_nothing():
    batch = torch.randint(256, (4, 3, 5, 5)).to(torch.uint8)
    transform = ImageTransform(mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7), pad=2, flip=True)
    generator = stream("unused")
    got = transform(batch, training=False, generator=generator)
    assert torch.equal(generator.get_state(), stream("unused").get_state())
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (transform.mean, transform.std))
    assert torch.allclose(got, (batch / 255 - mean) / std, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.uint8])
def test_features_are_standardised(dtype):
    x = (torch.rand(50, 4, dtype=torch.float64) * 200).to(dtype)
    numbers = x.double()
    scale = Scale(mean=numbers.mean(0), std=numbers.std(0).numpy())
    out = scale(x, training=True, generator=stream("unused"))
    assert out.dtype == (dtype if dtype.is_floating_point else torch.float32)
    assert torch.allclose(out.double().mean(0), torch.zeros(4).double(), atol=1e-5)
    assert torch.allclose(out.double().std(0), torch.ones(4).double(), atol=1e-5)


def test_transforms_are_compared_and_named_by_their_settings():
    one, two = ImageTransform(mean=0.5, pad=4), ImageTransform(mean=(0.5,), pad=4)
    assert one == two
    assert identify(one) == identify(two) != identify(ImageTransform(mean=0.5))
    assert identify(one_by_one).endswith("one_by_one")
    assert "0x" not in identify(one_by_one)
    assert identify(None) == "None"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"std": 0.0}, r"std must be positive.*got: 0\.0; remedy: features that are constant"),
        ({"std": (1.0, -1.0)}, r"std must be positive.*got: -1\.0"),
        ({"mean": float("nan")}, "mean must be finite"),
        ({"mean": ()}, "mean must be finite"),
        ({"mean": "0.5"}, "mean must be finite"),
        ({"pad": -1}, "pad must be a whole number"),
        ({"pad": 1.5}, "pad must be a whole number"),
        ({"flip": 1}, "flip must be True or False"),
    ],
)
def test_settings_that_cannot_be_used_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        ImageTransform(**settings)
