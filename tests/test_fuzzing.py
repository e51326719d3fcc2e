"""A few damaged and hostile inputs of every kind; benchmarks/fuzz.py runs thousands."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

from tests.fuzzing import HARMED, REFUSALS, Case, list_targets

TARGETS = list_targets()


@pytest.mark.parametrize("name", TARGETS)
def test_what_is_damaged_or_hostile_is_read_or_refused_in_one_sentence(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    target, sentences = TARGETS[name], []

    @settings(
        max_examples=25,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(target.cases)
    def read(case: Case) -> None:
        try:
            target.read(case.data, tmp_path / "files")
        except REFUSALS as refusal:
            sentences.append(str(refusal))

    read()
    assert all(sentences)
    assert not (tmp_path / HARMED).exists()
    assert [path.name for path in tmp_path.iterdir()] == ["files"]


def test_every_kind_is_accepted_as_it_is(tmp_path: Path) -> None:
    """Without damage nothing is refused, so that the inputs above reach what they are to try."""
    from tests import fuzzing

    fuzzing.read_spec(fuzzing.PLAIN, tmp_path)
    fuzzing.read_wrapper(fuzzing.CONTENT, tmp_path)
    fuzzing.read_config(fuzzing.CONFIG, tmp_path)
    fuzzing.read_pickle(fuzzing.CONTENT, tmp_path)
    fuzzing.read_run(fuzzing.RUN, tmp_path)
    fuzzing.read_file((".safetensors", fuzzing._safetensors()), tmp_path)
