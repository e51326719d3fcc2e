"""A data set opened, whatever its layout: recognised from the folder, or named.

A layout is a module with `find_root` (returns the root of such a set in or at a folder, else None), `open_root`
(returns the set opened) and `SIGNS` (what tells it, in words). They are tried in the order below, the most particular
first.
"""

from __future__ import annotations

import os
from pathlib import Path

from segprune.data import ade20k, camvid, cityscapes, folders, hf, lists, voc
from segprune.data.samples import Source

_MODULES = {
    "voc": voc,
    "cityscapes": cityscapes,
    "camvid": camvid,
    "ade20k": ade20k,
    "list": lists,
    "folders": folders,
    "hf": hf,
}
LAYOUTS: tuple[str, ...] = tuple(_MODULES)


def open_source(folder: str | os.PathLike[str], layout: str | None = None) -> Source:
    """Returns the data set in `folder`: a folder, a two-column list file, or with the layout hf a hub name.

    Raises ValueError for an unknown layout and for what fits two, FileNotFoundError where nothing is recognised, and
    ImportError where hf needs the package datasets.
    """
    if layout is not None and layout not in _MODULES:
        raise ValueError(
            f"The layout {layout!r} is unknown; choose one of {', '.join(LAYOUTS)}."
        )

    # A hub name is no path, so hf comes before the question whether the path exists.
    path = Path(folder)
    if layout == "hf":
        return hf.open_root(path if path.exists() else os.fspath(folder))
    if not path.exists():
        raise FileNotFoundError(
            f"{folder} does not exist; give a folder in one of the layouts {', '.join(LAYOUTS)}, or write a generated "
            "one with `segprune shapes DIR`."
        )
    if path.is_file():
        return _open_file(path, layout)

    # The first layout that fits is taken; a named one is tried alone.
    tried = LAYOUTS if layout is None else (layout,)
    for name in tried:
        # Folders of these two may mean something else, which is settled where the user names the layout.
        if name in ("ade20k", "camvid"):
            root = _MODULES[name].find_root(path, layout is not None)
        else:
            root = _MODULES[name].find_root(path)

        if root is not None:
            return _MODULES[name].open_root(root)

    # Nothing fits, so say what each layout would have been recognised by.
    signs = "; ".join(f"{name}: {_MODULES[name].SIGNS}" for name in tried)
    which = "in a known layout" if layout is None else f"in the layout {layout}"
    raise FileNotFoundError(
        f"{folder} holds no data set {which} (looked for {signs}); give such a folder, or write a generated one with "
        "`segprune shapes DIR`."
    )


def _open_file(path: Path, layout: str | None) -> Source:
    if layout not in (None, "list") or path.suffix.lower() not in lists.SUFFIXES:
        raise ValueError(
            f"{path} is a file, where a folder, or a list of images and masks that ends in "
            f"{', '.join(lists.SUFFIXES)}, is allowed; give one of those."
        )

    return lists.open_root(path)
