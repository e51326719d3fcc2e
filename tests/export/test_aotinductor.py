"""A package compiled here, which takes longer than all other formats together."""

import shutil
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from segprune.data import draw_shapes, normalise
from segprune.export import export, open_exported
from segprune.export.runtimes import is_compiled
from segprune.export.torch_files import COMPILERS
from tests.exporting import tiny_network


@pytest.mark.skipif(not any(map(shutil.which, COMPILERS)), reason="no C++ compiler here")
def test_the_compiled_package_gives_the_networks_logits(tmp_path: Path) -> None:
    # Optimising, and headers compiled in advance for later, take most of the time.
    quick = {
        "aot_inductor.debug_compile": True,
        "aot_inductor.precompile_headers": False,
        "cpp_cache_precompile_headers": False,
    }
    network, path = tiny_network(), tmp_path / "it.pt2"
    with torch._inductor.config.patch(quick):
        manifest, difference = export(network, path, format="aotinductor", size=(64, 64))
    assert is_compiled(path)
    runtime = open_exported(path, trust=True)
    assert runtime.manifest == manifest
    assert runtime.name.startswith("AOTInductor")
    x = normalise(draw_shapes(3, "val", 0, (64, 64))[0])[None]
    with torch.no_grad():
        torch.testing.assert_close(runtime(x), network(x), rtol=1e-4, atol=1e-4)
    assert difference.agreement == 1.0


def test_without_a_compiler_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(
        ValueError,
        match=r"^The format aotinductor needs a C\+\+ compiler, and there is none here; install",
    ):
        export(tiny_network(), tmp_path / "it.pt2", format="aotinductor", size=(64, 64))
