"""The scan: every part is cut by itself, and what is measured is what that does."""

from __future__ import annotations

import pytest
import torch

from segprune.model import SegFormer
from segprune.pruning.pruner import Pruner
from segprune.pruning.scan import HIGHEST, LOWEST, Finding, output_distance, scan, sensitivities


def num_parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_each_finding_measures_a_network_in_which_only_its_part_was_cut(
    small_model: SegFormer,
) -> None:
    before = {name: p.clone() for name, p in small_model.state_dict().items()}
    cut: list[SegFormer] = []
    findings = scan(small_model, lambda model: float(cut.append(model) or len(cut)), (0.5,))
    groups = {group.name: group for group in Pruner(small_model).prepare().groups}
    assert sorted(name for finding in findings for name in finding.names) == sorted(groups)
    assert [finding.loss for finding in findings] == list(range(1, len(cut) + 1))
    for finding, model in zip(findings, cut, strict=True):
        expected = Pruner(
            small_model, dict.fromkeys(finding.names, 0.5), round_to=1, repair=False
        ).prune()
        assert model.spec == expected.spec, finding.part
        assert num_parameters(model) < num_parameters(small_model)
    assert all(torch.equal(p, before[name]) for name, p in small_model.state_dict().items())


def test_the_distance_of_a_network_from_itself_is_nothing_and_grows_with_what_is_cut(
    small_model: SegFormer,
) -> None:
    torch.manual_seed(0)
    measure = output_distance(small_model, [torch.randn(n, 3, 64, 64).double() for n in (2, 1)])
    assert measure(small_model) == pytest.approx(0.0, abs=1e-6)
    losses = [
        measure(Pruner(small_model, rate, round_to=1, repair=False).prune())
        for rate in (0.2, 0.8)
    ]
    assert 0 < losses[0] < losses[1]


def test_sensitivities_are_relative_to_the_average_part_and_bounded() -> None:
    findings = [
        *(Finding("head", ("a",), rate, loss) for rate, loss in ((0.25, 1.0), (0.5, 3.0))),
        Finding("stages.0 ffn", ("b", "c"), 0.5, 6.0),
        Finding("stages.1 ffn", ("d",), 0.5, -1.0),
        *(Finding(f"stages.{i} qk", (f"e{i}",), 0.5, 0.0) for i in range(30)),
    ]
    found = sensitivities(findings)
    assert (found["b"], found["c"], found["d"]) == (HIGHEST, HIGHEST, LOWEST)
    assert found["a"] == pytest.approx(min(HIGHEST, 2.0 / (8.0 / 33)))


def test_a_scan_in_which_nothing_happens_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"Nothing in the scan changed the network's output; scan higher rates or",
    ):
        sensitivities([Finding("head", ("a",), 0.5, 0.0)])


def test_a_part_that_is_sensitive_is_spared(small_model: SegFormer) -> None:
    names = [group.name for group in Pruner(small_model).prepare().groups]
    spared = next(name for name in names if name.endswith("stages.2.blocks.0.mlp.ffn"))
    plain, careful = (
        Pruner(small_model, 0.5, round_to=1, repair=False, sensitivity=factors).make_plan()[0]
        for factors in ({}, {spared: 9.0})
    )
    assert len(careful.keep[spared]) > len(plain.keep[spared])


def test_a_scan_of_another_network_is_refused(small_model: SegFormer) -> None:
    mixed = {"encoder.stages.1.width": 2.0, "stages.9.width": 2.0}
    with pytest.raises(
        ValueError,
        match=r"The sensitivities are of another network: this one has no group stages\.9\.width; scan it",
    ):
        Pruner(small_model, 0.5, round_to=1, repair=False, sensitivity=mixed).make_plan()


def test_a_scan_may_name_what_is_protected_now(small_model: SegFormer) -> None:
    spared = {"encoder.stages.1.width": 2.0, "encoder.stages.2.blocks.0.mlp.ffn": 3.0}
    plan, _ = Pruner(
        small_model, 0.5, round_to=1, repair=False, sensitivity=spared, ignore=["stages.1"]
    ).make_plan()
    assert "encoder.stages.1.width" not in plan.keep
