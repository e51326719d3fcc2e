"""Hugging Face data sets, made here with the library itself and read back as pictures."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from segprune.data import (
    EvalTransform,
    SampleError,
    SegmentationData,
    check_labels,
    open_source,
    readable,
    voc_palette,
)
from tests.data.drawn import SIZE, noise, write_image, write_mask

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def _cache_of_its_own_and_no_bars(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def image_of(row: int) -> np.ndarray:
    return noise(*SIZE, 3, seed=row)


def labels_of(row: int) -> np.ndarray:
    return noise(*SIZE, high=5, seed=100 + row)


def encoded(pixels: np.ndarray) -> dict[str, Any]:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "png")
    return {"bytes": data.getvalue(), "path": None}


def table_of(rows: range, image: str = "image", label: str = "label") -> Any:
    columns = {
        image: [encoded(image_of(k)) for k in rows],
        label: [encoded(labels_of(k)) for k in rows],
    }
    table = datasets.Dataset.from_dict(columns | {"id": list(rows)})
    return table.cast_column(image, datasets.Image()).cast_column(label, datasets.Image())


def saved(folder: Path, **columns: str) -> Path:
    splits = {
        "train": table_of(range(3), **columns),
        "validation": table_of(range(3, 5), **columns),
    }
    datasets.DatasetDict(splits).save_to_disk(folder)
    return folder


def check_rows(folder: Path, layout: str | None = None) -> None:
    source = open_source(folder, layout)
    assert (source.layout, source.root, source.palette) == ("hf", str(folder), voc_palette())
    for split, rows in (("train", range(3)), ("val", range(3, 5))):
        samples = source.split(split)
        assert len(samples) == len(rows)
        for row, sample in zip(rows, samples, strict=True):
            np.testing.assert_array_equal(sample.load()[0], image_of(row))
            np.testing.assert_array_equal(sample.load()[1], labels_of(row))


def test_a_folder_of_save_to_disk_is_recognised_and_read(tmp_path: Path) -> None:
    check_rows(saved(tmp_path / "set"))
    names = [sample.name for sample in open_source(tmp_path / "set").split("val")]
    assert names == ["validation_000000", "validation_000001"]


@pytest.mark.parametrize(
    "columns",
    [{"image": "img", "label": "annotation"}, {"image": "image", "label": "unheard_of"}],
)
def test_columns_of_other_names_are_found(tmp_path: Path, columns: dict[str, str]) -> None:
    check_rows(saved(tmp_path / "set", **columns))


@pytest.mark.parametrize("inside", ["", "data"])
def test_parquet_files_are_recognised_and_read(tmp_path: Path, inside: str) -> None:
    (tmp_path / "set" / inside).mkdir(parents=True)
    for split, rows in (("train", range(3)), ("validation", range(3, 5))):
        table_of(rows).to_parquet(tmp_path / "set" / inside / f"{split}-00000-of-00001.parquet")
    check_rows(tmp_path / "set")


def test_pictures_that_were_saved_as_plain_bytes_are_read(tmp_path: Path) -> None:
    for split, rows in (("train", range(3)), ("val", range(3, 5))):
        columns = {
            "image": [encoded(image_of(k))["bytes"] for k in rows],
            "mask": [encoded(labels_of(k)) for k in rows],
        }
        datasets.Dataset.from_dict(columns).save_to_disk(tmp_path / "set" / split)
    (tmp_path / "set/dataset_dict.json").write_text(json.dumps({"splits": ["train", "val"]}))
    check_rows(tmp_path / "set")


def test_an_imagefolder_whose_metadata_names_the_masks_is_recognised_and_read(
    tmp_path: Path,
) -> None:
    for split, rows in (("train", range(3)), ("validation", range(3, 5))):
        folder = tmp_path / "set" / split
        lines = []
        for row in rows:
            write_image(folder / f"{row}.png", image_of(row))
            write_mask(folder / f"{row}_mask.png", labels_of(row))
            lines.append(
                json.dumps({"file_name": f"{row}.png", "mask_file_name": f"{row}_mask.png"})
            )
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    check_rows(tmp_path / "set")


def test_one_table_alone_is_the_training_split(tmp_path: Path) -> None:
    table_of(range(3)).save_to_disk(tmp_path / "set")
    source = open_source(tmp_path / "set")
    assert len(source.split("train")) == 3
    message = r"has no val split \(it has train\); make one with train_test_split of datasets, name it val, and save_to_d"
    with pytest.raises(FileNotFoundError, match=message):
        source.split("val")


def test_a_hub_name_and_its_configuration_are_handed_to_the_library(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str | None]] = []

    def load(name: str, config: str | None = None) -> Any:
        asked.append((name, config))
        return datasets.DatasetDict(train=table_of(range(2)))

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert open_source("owner/name", "hf").root == "owner/name"
    sample = open_source("owner/name:full", "hf").split("train")[1]
    assert asked == [("owner/name", None), ("owner/name", "full")]
    assert str(sample) == "row 1, column image of train in owner/name:full"
    np.testing.assert_array_equal(sample.load()[1], labels_of(1))


def test_what_the_library_cannot_open_is_said_in_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def load(name: str, config: str | None = None) -> Any:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(
        ValueError,
        match=r"^owner/name could not be opened by datasets \(no network\); check the name or",
    ):
        open_source("owner/name", "hf")


def test_without_the_package_the_pip_command_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(tmp_path / "set")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ImportError) as raised:
        open_source(folder)
    assert str(raised.value) == (
        f'{folder} is to be opened by Hugging Face\'s datasets, which is not installed; pip install "datasets>=4,<6".'
    )


def test_class_names_come_from_classes_txt_or_id2label_json(tmp_path: Path) -> None:
    folder = saved(tmp_path / "set")
    assert open_source(folder).class_names == ()
    (folder / "id2label.json").write_text('{"0": "wall", "2": "sky"}')
    assert open_source(folder).class_names == ("wall", "", "sky")
    (folder / "id2label.json").write_text('["wall"]')
    with pytest.raises(
        ValueError,
        match=r"id2label\.json is not a table of names such as .*; correct or remove it\.",
    ):
        open_source(folder)
    (folder / "classes.txt").write_text("ground\n")
    assert open_source(folder).class_names == ("ground",)


@pytest.mark.parametrize(
    "columns", [{"image": "left", "label": "right"}, {"image": "image", "label": "id2"}]
)
def test_columns_that_cannot_be_told_are_listed(
    tmp_path: Path, columns: dict[str, str]
) -> None:
    table = table_of(range(2), **columns)
    if columns["image"] == "image":
        table = table.add_column("third", [encoded(labels_of(0))] * 2)
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "set")
    message = (
        rf"The columns of train of .*set are {columns['image']} \(Image\), .*, where one of images named image and "
        "one of masks named label are needed; rename them with rename_columns of datasets"
    )
    with pytest.raises(ValueError, match=message):
        open_source(tmp_path / "set")


def test_an_empty_split_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    splits = datasets.DatasetDict(
        train=table_of(range(2)), validation=table_of(range(2)).select([])
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, config: splits)
    with pytest.raises(
        ValueError, match=r"^validation of owner/name has no row; give a split with images\."
    ):
        open_source("owner/name", "hf").split("val")


def test_a_row_without_a_picture_or_with_a_broken_one_is_named(tmp_path: Path) -> None:
    columns = {
        "image": [encoded(image_of(0)), None, {"bytes": b"no picture", "path": None}],
        "label": [encoded(labels_of(k)) for k in range(3)],
    }
    table = datasets.Dataset.from_dict(columns)
    table = table.cast_column("image", datasets.Image()).cast_column("label", datasets.Image())
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "set")
    samples = open_source(tmp_path / "set").split("train")
    good, bad = readable(samples)
    assert good == samples[:1]
    where = f"column image of train in {tmp_path / 'set'}"
    assert (
        bad[0]
        == f"row 1, {where} holds no image; put one there, or leave the row out with `skip_bad`."
    )
    assert bad[1].startswith(f"row 2, {where} cannot be read as an image (")


def test_rows_are_served_by_worker_processes_too(tmp_path: Path) -> None:
    samples = open_source(saved(tmp_path / "set")).split("train")
    alone, shared = (
        list(DataLoader(SegmentationData(samples, 5, EvalTransform(SIZE)), num_workers=number))
        for number in (0, 1)
    )
    for one, other in zip(alone, shared, strict=True):
        assert one[0].equal(other[0])
        assert one[1].equal(other[1])


def test_the_label_check_names_the_row(tmp_path: Path) -> None:
    source = open_source(saved(tmp_path / "set"))
    assert check_labels(source, 5).num_images == {"train": 3, "val": 2}
    message = rf"Mask row 0, column label of train in {tmp_path / 'set'} holds the label 4, where 0\.\.2 and 255"
    with pytest.raises(ValueError, match=message):
        check_labels(source, 3)


def test_a_coloured_mask_is_refused_by_its_row(tmp_path: Path) -> None:
    columns = {"image": [encoded(image_of(0))], "label": [encoded(image_of(1))]}
    table = datasets.Dataset.from_dict(columns)
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "set")
    with pytest.raises(
        SampleError, match=r"Mask row 0, column label of train in .* has mode RGB and "
    ):
        open_source(tmp_path / "set").split("train")[0].load()
