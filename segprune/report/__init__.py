"""The report page: results of a run as one HTML file that needs nothing else, beside the results.

`gather` reads what a folder holds, `examples` chooses and draws images, `render` makes the page of both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from segprune.checkpoint import Checkpoint, build, read
from segprune.data import DataChoices, open_source, score_whole_pool
from segprune.files import atomic_path
from segprune.inference.evaluate import EvalMode
from segprune.report.examples import choose_examples
from segprune.report.gather import Facts, Note, find_folders, gather
from segprune.report.render import Gallery, Language, render
from segprune.spec import Preprocessing, preprocessing_of

__all__ = ["PAGE", "Language", "find_folders", "write_report"]

PAGE = "report.html"
Progress = Callable[[int, int], None]


def write_report(
    folder: Path,
    *,
    lang: Language = "en",
    device: torch.device | str = "cpu",
    data: str = "",
    progress: Progress | None = None,
) -> Path:
    """Writes report.html into a folder of results, and returns its path. Raises ValueError where they cannot be read.

    `data` is where the data set lies now. If it cannot be found, the page is made without images and says so.
    """
    facts = gather(folder)
    gallery = _show_examples(facts, data, torch.device(device), progress)
    page = render(facts, gallery, lang)
    with atomic_path(folder / PAGE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return folder / PAGE


def _show_examples(
    facts: Facts, data: str, device: torch.device, progress: Progress | None
) -> Gallery:
    """Returns the images, or the reason why there are none."""
    settings = facts.settings
    if settings is None:
        return Gallery()
    data = data or str(settings.get("data") or "")
    if not data:
        return Gallery(note=Note("no_data", {}))
    # An exported file, say, is scored by its own runtime and not read here.
    paths = [path for path in (facts.before, facts.after) if path]
    for path in paths:
        if not Path(path).exists():
            return Gallery(note=Note("no_network", {"path": path}))

    # Anything may have changed since the run: files moved, labels edited.
    try:
        opened = [_read_network(path, settings) for path in paths]
        networks = [build(own).to(device).eval() for own in opened]
        expected = preprocessing_of(opened[0])
        source = open_source(data, settings.get("layout"))
        source = score_whole_pool(_choices(settings, expected).apply(source))
        samples = source.split(str(settings.get("split") or "val"))
        how = _eval_mode(settings)
        num_classes = networks[-1].spec.num_classes
        examples = choose_examples(
            networks, samples, num_classes, source.palette, how, device, progress
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        return Gallery(note=Note("no_images", {"data": data, "reason": str(error)}))
    return Gallery(tuple(examples), source.class_names, source.palette)


def _read_network(path: str, settings: Mapping[str, Any]) -> Checkpoint:
    """Returns the checkpoint, read as it was when the run began."""
    given = Path(str(settings.get("model_path"))).name == Path(path).name
    opened = read(path, dialect=settings.get("dialect") if given else None)
    # Pixels and labels as the user said, where he said anything.
    overruled: dict[str, Any] = {}
    for field in fields(Preprocessing):
        value = settings.get(field.name)
        if value is not None:
            overruled[field.name] = tuple(value) if isinstance(value, list) else value
    own = replace(opened.spec.preprocessing, **overruled)
    return replace(opened, spec=replace(opened.spec, preprocessing=own))


def _choices(settings: Mapping[str, Any], expected: Preprocessing) -> DataChoices:
    names = ("label_offset", "val_split", "val_share", "seed")
    given = {name: settings[name] for name in names if name in settings}
    return DataChoices(**given, expected=expected)


def _eval_mode(settings: Mapping[str, Any]) -> EvalMode:
    """Returns how images were put through the network; but with one view, which is enough to look at."""
    height, width = settings["input_shape"]
    mode = settings.get("mode", "letterbox")
    stride = settings.get("stride")
    return EvalMode(
        mode=mode,
        input_shape=(int(height), int(width)),
        stride=None if stride is None else tuple(stride),
    )
