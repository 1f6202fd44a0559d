"""Style augmentation changes the style, equally in every class, and depends only on the seed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cxrbatch.training.augment import StyleAugmentation, match_histogram, match_spectrum, scramble
from cxrbatch.training.batches import EpochImages
from cxrbatch.training.recipes import Augmentation
from cxrbatch.types import ModelInputSpec
from training_images import draw


def images(count: int, kind: int = 2) -> list[np.ndarray]:
    rng = np.random.default_rng(5)
    return [draw(kind, rng, 96) for _ in range(count)]


def test_model_inputs_have_the_asked_size_whatever_comes_in() -> None:
    change = StyleAugmentation(64, look=0.9, turn=0.5, invert=0.5, thumbnail=0.5)
    rng = np.random.default_rng(0)
    for shape in ((40, 90), (96, 96), (200, 33), (1, 50)):
        for _ in range(8):
            model_input = change(rng.integers(0, 256, shape).astype(np.uint8), images(1)[0], rng)
            assert model_input.shape == (64, 64) and model_input.dtype == np.uint8


def test_the_same_seed_gives_the_same_model_input_and_another_does_not() -> None:
    change, image, other = StyleAugmentation(64, look=0.8), *images(2)
    one, same, different = (change(image, other, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert not np.array_equal(one, different)


def test_the_input_is_never_written_to() -> None:
    image, other = images(2)
    before = image.copy()
    for seed in range(20):
        StyleAugmentation(64, look=1.0)(image, other, np.random.default_rng(seed))
    np.testing.assert_array_equal(image, before)


def test_a_borrowed_grey_scale_is_borrowed_and_keeps_the_order_of_greys() -> None:
    image = images(1)[0]
    dark = (images(1, 0)[0] // 4).astype(np.uint8)
    matched = match_histogram(image, dark, 1.0)
    assert abs(float(matched.mean()) - float(dark.mean())) < 6
    np.testing.assert_array_equal(match_histogram(image, dark, 0.0), image)
    order = np.argsort(image.ravel(), kind="stable")
    assert (np.diff(matched.ravel()[order].astype(int)) >= 0).all()


def test_a_borrowed_sharpness_changes_detail_and_leaves_coarse_forms() -> None:
    rng = np.random.default_rng(0)
    image = images(1)[0]
    noisy = np.clip(image + rng.normal(0, 30, image.shape), 0, 255).astype(np.uint8)
    rougher = match_spectrum(image, noisy, 1.0).astype(float)
    assert np.diff(rougher, axis=1).std() > 1.5 * np.diff(image.astype(float), axis=1).std()
    coarse = (slice(None, None), slice(None, None))
    blocks = lambda x: x[coarse].reshape(6, 16, 6, 16).mean((1, 3))  # noqa: E731
    assert np.abs(blocks(rougher) - blocks(image.astype(float))).max() < 12


@pytest.mark.parametrize("look", [0.0, 1.0])
def test_look_is_how_much_the_style_changes(look: float) -> None:
    change = StyleAugmentation(96, look=look, flip=0, rotation=0, crop=0, aspect=1.0, thumbnail=0)
    image, other = images(2)
    moved = [np.abs(change(image, other, np.random.default_rng(s)).astype(int) - image).mean() for s in range(12)]
    if look:
        assert np.median(moved) > 10
    else:  # what is left is the frame: some images are placed smaller
        assert np.median(moved) < 1


def test_on_another_image_the_middle_stays_and_the_edges_are_the_others() -> None:
    image, other = np.full((64, 64), 200, np.uint8), np.full((90, 70), 40, np.uint8)
    change = StyleAugmentation(64, look=0, flip=0, crop=0, aspect=1, rotation=0, thumbnail=0, surroundings=1)
    model_inputs = [change(image, other, np.random.default_rng(seed)) for seed in range(20)]
    assert all((model_input[20:44, 20:44] > 150).all() for model_input in model_inputs)
    assert np.median([model_input[0, 0] for model_input in model_inputs]) == 40


def test_a_scrambled_image_keeps_its_size_and_none_of_its_places() -> None:
    image = np.random.default_rng(0).integers(0, 256, (60, 48)).astype(np.uint8)
    pieces = 0
    for seed in range(40):
        taken = scramble(image, np.random.default_rng(seed))
        assert taken.shape == image.shape and taken.dtype == np.uint8
        same = (taken == image).mean()
        assert same < 0.2, seed
        pieces += np.array_equal(np.sort(taken.ravel()), np.sort(image.ravel())) and same < 0.15
    assert 8 < pieces < 32  # half of them are the same greys in other places


def test_only_what_should_pass_is_scrambled_and_then_should_not() -> None:
    arrays = [np.full((40, 40), 90, np.uint8), images(1)[0]]
    labels, order = [0, 1], np.array([0, 1] * 60)
    for chance, fewest, most in ((0.0, 60, 60), (0.5, 15, 45), (1.0, 0, 0)):
        look = Augmentation(kind="none", scramble=chance)
        seen = [
            EpochImages(arrays, labels, order, ModelInputSpec(40, "pad", "bilinear"), look, (1, 0))[i]
            for i in range(120)
        ]
        passing = [model_input for model_input, label in seen if label == 1]
        assert fewest <= len(passing) <= most
        assert all((model_input == 90).all() for model_input, _ in seen[::2])  # the other class is left as it is
        assert all(torch.equal(model_input, passing[0]) for model_input in passing)
