"""Networks that a tracer misreads are cut right, or not at all; never wrongly without a word."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import prune as masks

from segprune.pruning import groups
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import Plan
from segprune.pruning.prepare import prepare
from segprune.pruning.pruner import Pruner
from segprune.pruning.surgery import cut
from segprune.pruning.verify import check_cut

X = torch.zeros(1, 3, 12, 12)  # zeros hide nothing: noise takes their place


class Between(nn.Module):
    """An operation, or a module, between a layer of 32 channels and one that reads `width`."""

    def __init__(self, between: Callable[[Tensor], Tensor], width: int = 32) -> None:
        super().__init__()
        self.stem, self.write = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 32, 3)
        self.read, self.out = nn.Conv2d(width, 48, 3), nn.Conv2d(48, 5, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(F.relu(self.write(F.relu(self.stem(x)))))
        return self.out(F.relu(self.read(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = (nn.Conv2d(n, 16, 3, padding=1) for n in (3, 16, 16))
        self.wide, self.out = nn.Conv2d(16, 64, 3), nn.Conv2d(64, 5, 1)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.relu(self.wide(self.b(F.relu(self.a(self.stem(x)))))))


class MapNorm(nn.LayerNorm):
    """A LayerNorm for maps, as many code bases have one."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Recurrent(nn.Module):
    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.stem, self.write, self.layer = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), layer
        self.fc1, self.fc2 = nn.Linear(12, 64), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.write(F.relu(self.stem(x))).flatten(2).mT
        return self.fc2(F.relu(self.fc1(self.layer(tokens)[0])))


def prune(model: nn.Module) -> tuple[Pruner, nn.Module, str]:
    """The pruner, the network that it pruned, and what it warned of."""
    pruner = Pruner(model.eval(), 0.3, round_to=1, scope="local")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        pruned = pruner.prune(X)
    return pruner, pruned, " ".join(str(warning.message) for warning in caught)


def misread() -> dict[str, nn.Module]:
    order = torch.randperm(32)
    return {
        "flip": Between(lambda x: x.flip(1)),
        "roll": Between(lambda x: x.roll(5, 1)),
        "slice": Between(lambda x: x[:, :16], 16),
        "strided": Between(lambda x: x[:, ::2], 16),
        "index": Between(lambda x: x[:, order]),
        "gather": Between(lambda x: x.index_select(1, order)),
        "shuffle": Between(lambda x: x.unflatten(1, (4, 8)).transpose(1, 2).flatten(1, 2)),
        "sort": Between(lambda x: x.sort(1)[0]),
        "mean": Between(lambda x: x - x.mean(1, keepdim=True)),
        "circle": Between(lambda x: x.diff(dim=1), 31),
    }


@pytest.mark.parametrize("name", misread())
def test_channels_that_tracing_misreads_are_kept_and_named(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "MAX_STEPS", 300)
    model = misread()[name]
    pruner, pruned, warned = prune(model)
    assert "Left as it is" in warned
    assert "first write" in warned
    assert pruned.write.out_channels == 32
    assert pruned.read.out_channels < 48

    # What the plan says is what was removed.
    before, after = (sum(p.numel() for p in net.parameters()) for net in (model, pruned))
    assert pruner.plan.removed["params"] == pytest.approx(1 - after / before, abs=1e-6)


@pytest.mark.parametrize(
    "between",
    [
        nn.BatchNorm2d(32),
        nn.BatchNorm2d(32, affine=False),
        MapNorm(32),
        MapNorm(32, elementwise_affine=False),
        MapNorm(32, bias=False),
        nn.ConvTranspose2d(32, 32, 2, stride=2),
        nn.Conv2d(32, 32, 3, groups=32),
        torch.sigmoid,
        lambda x: x * x.mean((2, 3), keepdim=True),
        lambda x: F.normalize(x, dim=1),
    ],
)
def test_what_tracing_reads_right_is_cut_without_a_word(between: Callable) -> None:
    _, pruned, warned = prune(Between(between))
    assert not warned
    assert pruned.write.out_channels < 32


def test_layers_that_share_a_weight_keep_it() -> None:
    _, pruned, warned = prune(Tied())
    assert pruned.a.weight is pruned.b.weight
    assert "Conv2d (2, first" in warned
    assert pruned.wide.out_channels < 64


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_a_layer_whose_weight_is_computed_is_left_alone(name: str) -> None:
    computed = getattr(nn.utils.parametrizations, name)(nn.Conv2d(32, 32, 3))
    _, pruned, warned = prune(Between(computed))
    assert "ParametrizedConv2d (1, first between)" in warned
    assert pruned.between.out_channels == 32
    assert pruned.read.out_channels < 48


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM, nn.RNN])
def test_what_a_recurrent_layer_reads_is_left_alone(
    kind: type[nn.RNNBase], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(groups, "MAX_STEPS", 300)
    grouping = groups.find_groups(Recurrent(kind(16, 12, batch_first=True)), X, {"stem"})
    assert "write" not in {group.name for group in grouping.groups}
    assert {"write", "layer"} & grouping.unsupported.keys()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.*:DeprecationWarning")
def test_a_scripted_layer_is_no_traceback() -> None:
    scripted = torch.jit.script(nn.Conv2d(32, 32, 1))
    _, pruned, _ = prune(Between(scripted))
    assert pruned.write.out_channels == 32
    assert pruned(X).shape == (1, 5, 6, 6)


def test_a_network_that_fails_on_its_inputs_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=r"Between does not run .*inputs"):
        Pruner(Between(torch.relu), 0.3).prune(torch.zeros(1, 4, 12, 12))


def test_a_network_that_cannot_be_copied_is_refused_with_the_remedy() -> None:
    masked = nn.Conv2d(32, 32, 3)
    masks.l1_unstructured(masked, "weight", 0.5)
    with pytest.raises(ValueError, match=r"Between cannot be copied .*prune\.remove"):
        Pruner(Between(masked), 0.3).prune(X)


def test_a_cut_that_differs_is_refused_with_the_layer_s_name() -> None:
    """Behind everything else: a group that says the wrong positions."""
    model = Between(torch.relu).eval()
    prepared = prepare(model, X, {"stem"}, PruneOptions())
    group = next(group for group in prepared.groups if group.name == "write")
    wrong = tuple(
        replace(member, positions=31 - member.positions) if member.side == "in" else member
        for member in group.members
    )
    prepared = replace(prepared, groups=(replace(group, members=wrong),))
    plan = Plan({"write": tuple(np.arange(20).tolist())})
    with pytest.raises(ValueError, match=r"something else in read .*ignored_layers"):
        check_cut(prepared, plan, cut(prepared, plan))
