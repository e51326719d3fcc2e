"""Samples served to torch, tables of labels, and the search for those that cannot be read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from segprune.data import (
    EvalTransform,
    Pair,
    SampleError,
    SegmentationData,
    TrainTransform,
    load_image,
    load_mask,
    normalise,
    open_source,
    readable,
    shift_labels,
)
from tests.data.drawn import SIZE, noise, write_image, write_mask, write_voc


def pairs_of(folder: Path, names: str = "ab") -> tuple[Pair, ...]:
    return open_source(write_voc(folder, tuple(names))).split("train")


def cut_short(sample: Pair) -> None:
    path = Path(str(sample))
    path.write_bytes(path.read_bytes()[:-200])


def test_the_data_set_serves_normalised_pixels_and_labels_below_num_classes(
    tmp_path: Path,
) -> None:
    samples = pairs_of(tmp_path)
    data = SegmentationData(samples, 3, EvalTransform(SIZE))
    pixels, labels = data[1]
    mask = load_mask(samples[1].mask).astype(np.int64)
    assert len(data) == 2
    assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
    assert torch.equal(pixels, normalise(load_image(samples[1].image)))
    assert mask.max() == 4
    assert torch.equal(labels, torch.from_numpy(np.where(mask >= 3, 255, mask)))


def test_what_the_data_set_draws_follows_from_seed_epoch_and_index_alone(
    tmp_path: Path,
) -> None:
    samples = pairs_of(tmp_path)
    one, again, other = (
        SegmentationData(samples, 8, TrainTransform((32, 32)), seed=s) for s in (1, 1, 2)
    )
    first = one[0]
    later = one[1]
    torch.rand(3)
    assert torch.equal(again[1][0], later[0])
    assert torch.equal(again[0][0], first[0])
    assert torch.equal(again[0][1], first[1])
    assert not torch.equal(other[0][0], first[0])
    again.set_epoch(1)
    assert not torch.equal(again[0][0], first[0])
    again.set_epoch(0)
    assert torch.equal(again[0][0], first[0])


def test_two_pictures_of_one_epoch_are_changed_differently(tmp_path: Path) -> None:
    data = SegmentationData(pairs_of(tmp_path)[:1] * 2, 8, TrainTransform((32, 32)))
    assert not torch.equal(data[0][0], data[1][0])


def test_pictures_of_unequal_sizes_and_smaller_than_the_crop_make_one_batch(
    tmp_path: Path,
) -> None:
    samples = pairs_of(tmp_path, "abc")
    for sample, size in zip(samples, ((3, 5), (20, 30), (70, 40)), strict=True):
        write_image(Path(sample.image), noise(*size, 3))
        write_mask(Path(sample.mask), noise(*size, high=5))
    pixels, labels = next(
        iter(DataLoader(SegmentationData(samples, 5, TrainTransform((64, 48))), batch_size=3))
    )
    assert (pixels.shape, labels.shape) == ((3, 3, 64, 48), (3, 64, 48))
    assert set(labels.unique().tolist()) == {0, 1, 2, 3, 4, 255}


def test_a_table_says_what_a_mask_s_values_mean(tmp_path: Path) -> None:
    image, mask = tmp_path / "image.png", tmp_path / "mask.png"
    write_image(image, noise(*SIZE, 3))
    values = write_mask(mask, noise(*SIZE))
    table = noise(256, seed=7)
    labels = Pair("x", image, mask, table.tobytes()).load()[1]
    assert labels.dtype == np.uint8
    np.testing.assert_array_equal(labels, np.vectorize(lambda value: table[value])(values))


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_corrupt_picture_is_named_in_one_sentence_with_and_without_workers(
    tmp_path: Path, num_workers: int
) -> None:
    samples = pairs_of(tmp_path, "abc")
    cut_short(samples[1])
    loader = DataLoader(
        SegmentationData(samples, 5, EvalTransform(SIZE)), num_workers=num_workers
    )
    with pytest.raises(SampleError) as raised:
        list(loader)
    assert str(raised.value).startswith(f"{samples[1]} cannot be read as an image (")
    assert str(raised.value).endswith("); replace it, or leave it out with `skip_bad`.")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_readable_samples_are_found_and_the_others_named(
    tmp_path: Path, num_workers: int
) -> None:
    samples = pairs_of(tmp_path, "abcdefghijklmnopqr")
    cut_short(samples[2])
    Path(samples[9].mask).unlink()
    write_mask(Path(samples[17].mask), noise(7, 7))
    seen: list[tuple[int, int]] = []
    state = torch.get_rng_state()
    good, bad = readable(
        samples, num_workers, progress=lambda done, total: seen.append((done, total))
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert good == tuple(
        sample for number, sample in enumerate(samples) if number not in (2, 9, 17)
    )
    assert [message.partition("; ")[2] for message in bad] == [
        "replace it, or leave it out with `skip_bad`.",
        "put it back, or leave it out with `skip_bad`.",
        "export the mask again at the image's size.",
    ]
    assert all(str(samples[number]) in bad[k] for k, number in ((0, 2), (2, 17)))
    assert str(samples[9].mask) in bad[1]
    assert seen == [(8, 18), (16, 18), (18, 18)]


def test_where_all_pictures_are_bad_the_first_is_told(tmp_path: Path) -> None:
    samples = pairs_of(tmp_path)
    for sample in samples:
        cut_short(sample)
    with pytest.raises(
        ValueError,
        match=r"^None of 2 images can be used; repair .* with this: .*a\.png cannot be read",
    ):
        readable(samples)


def test_of_no_samples_none_are_bad() -> None:
    assert readable(()) == ((), ())


def test_a_split_can_be_replaced_by_its_readable_samples(tmp_path: Path) -> None:
    source = open_source(write_voc(tmp_path, ("a", "b", "c")))
    cut_short(source.split("train")[1])
    less = source.with_split("train", readable(source.split("train"))[0])
    assert [sample.name for sample in less.split("train")] == ["a", "c"]
    assert (less, len(source.split("train"))) == (source, 3)
    with pytest.raises(FileNotFoundError, match=r"val\.txt is missing"):
        less.split("val")


def test_labels_are_shifted_after_the_layout_s_own_table(tmp_path: Path) -> None:
    source = open_source(write_voc(tmp_path, ("a",)))
    (pair,) = source.split("train")
    plain = pair.load_labels().astype(int)
    shifted = shift_labels(source, -2)
    np.testing.assert_array_equal(
        shifted.split("train")[0].load_labels(), np.where(plain < 2, 255, plain - 2)
    )
    again = shift_labels(shifted, -1).split("train")[0].load_labels()
    np.testing.assert_array_equal(again, np.where(plain < 3, 255, plain - 3))
    assert shift_labels(source, 0) is source
    for offset in (1, -255):
        with pytest.raises(
            ValueError, match=rf"`label_offset` is {offset}, where -254\.\.0 is allowed"
        ):
            shift_labels(source, offset)
