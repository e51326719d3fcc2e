import copy
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from segprune.fold import fold_decoder
from segprune.model import SegFormer
from segprune.pruning.groups import Group, find_groups
from segprune.pruning.plan import Plan
from segprune.pruning.repair import repair
from tests.pruning.cutting import STEM, cut_copy, plan_of

KINDS = ("ffn", "qk", "v", "reduction", "stage", "decoder", "branch")


@pytest.fixture
def batches() -> list[Tensor]:
    return [torch.randn(2, 3, 64, 64).double(), torch.randn(1, 3, 64, 96).double()]


@pytest.fixture
def folded(small_model: SegFormer) -> SegFormer:
    return fold_decoder(small_model)


_FOUND: dict[
    tuple[str, bool], tuple[Group, ...]
] = {}  # tracing takes most of a second, and only the widths matter


def groups_of(model: SegFormer, *kinds: str) -> list[Group]:
    head = (model.spec.head, model.spec.folded)
    if head not in _FOUND:
        x = torch.zeros(1, 3, 64, 64).to(model.decode_head.classifier.weight)
        _FOUND[head] = find_groups(model, x, {STEM}, heads=True).groups
    return [group for group in _FOUND[head] if group.kind in kinds]


HEADS = ("mlp", "folded", "conv")


DenseOf = Callable[[str], SegFormer]


@pytest.fixture
def dense_of(small_model: SegFormer, conv_model: SegFormer) -> DenseOf:
    """The small network with each kind of head."""
    return {
        "mlp": small_model,
        "folded": fold_decoder(small_model),
        "conv": conv_model,
    }.__getitem__


@torch.no_grad()
def error(model: nn.Module, dense: nn.Module, batches: list[Tensor]) -> float:
    """Relative, of the logits."""
    wrong = sum(float((model(x) - dense(x)).square().sum()) for x in batches)
    return (wrong / sum(float(dense(x).square().sum()) for x in batches)) ** 0.5


def states_equal(first: nn.Module, second: nn.Module) -> bool:
    return all(
        torch.equal(t, second.state_dict()[name]) for name, t in first.state_dict().items()
    )


@pytest.mark.parametrize("head", HEADS)
def test_where_nothing_is_cut_nothing_changes(
    dense_of: DenseOf, batches: list[Tensor], head: str
) -> None:
    dense = dense_of(head)
    repaired = repair(copy.deepcopy(dense), dense, [], Plan({}), batches)
    for name, tensor in dense.state_dict().items():
        torch.testing.assert_close(repaired.state_dict()[name], tensor, rtol=1e-8, atol=1e-8)


CASES = [("folded", (kind,)) for kind in (*KINDS[:-1], "head")]
CASES += [("mlp", ("branch", "decoder")), ("conv", ("branch",)), ("conv", ("decoder",))]
CASES += [(head, (*KINDS, "head")) for head in HEADS]


@pytest.mark.parametrize(("head", "kinds"), CASES, ids=str)
def test_logits_come_nearer_to_the_dense_ones_on_images_never_seen(
    dense_of: DenseOf, batches: list[Tensor], head: str, kinds: tuple[str, ...]
) -> None:
    dense = dense_of(head)
    groups = groups_of(dense, *kinds)
    plan = plan_of(groups)
    pruned = cut_copy(dense, groups, plan)
    batches = [
        *batches,
        torch.randn(5, 3, 64, 64).double(),
    ]  # of noise there must be a little more than of pictures
    repaired = repair(pruned, dense, groups, plan, batches)
    others = [torch.randn(2, 3, 64, 64).double()]
    assert error(repaired, dense, batches) < 0.8 * error(pruned, dense, batches)
    assert error(repaired, dense, others) < error(pruned, dense, others)
    assert repaired.spec == pruned.spec
    shapes = {name: tensor.shape for name, tensor in pruned.state_dict().items()}
    assert {name: tensor.shape for name, tensor in repaired.state_dict().items()} == shapes


# Exact where what goes is a linear combination of what stays


@torch.no_grad()
def double_hidden(model: SegFormer) -> None:
    """The second half of every FFN's hidden channels says the same as the first."""
    for module in model.modules():
        if hasattr(module, "dwconv"):
            half = module.fc1.out_features // 2
            for layer in (module.fc1, module.dwconv):
                layer.weight[half:] = layer.weight[:half]
                layer.bias[half:] = layer.bias[:half]


@torch.no_grad()
def lower_rank(model: SegFormer, layer: str) -> None:
    """In each head, the last half of that layer's rows are combinations of the first."""
    for module in model.modules():
        if hasattr(module, "qk_scale"):
            linear = getattr(module, layer)
            dim = linear.out_features // module.num_heads
            weight, bias = (
                linear.weight.unflatten(0, (-1, dim)),
                linear.bias.unflatten(0, (-1, dim)),
            )
            mix = torch.randn(dim - dim // 2, dim // 2).double()
            weight[:, dim // 2 :] = mix @ weight[:, : dim // 2]
            bias[:, dim // 2 :] = bias[:, : dim // 2] @ mix.T


@torch.no_grad()
def double_decoder(model: SegFormer) -> None:
    half = model.spec.decoder_dim // 2
    for branch in model.decode_head.branches:
        branch.weight[half:] = branch.weight[:half]
    for tensor in model.decode_head.norm.state_dict().values():
        if tensor.dim():
            tensor[half:] = tensor[:half]


@torch.no_grad()
def double_branches(model: SegFormer) -> None:
    head = model.decode_head
    for branch, norm in zip(head.branches, head.branch_norms, strict=True):
        half = branch.out_features // 2
        for tensor in (branch.weight, *(t for t in norm.state_dict().values() if t.dim())):
            tensor[half:] = tensor[:half]


@torch.no_grad()
def double_reduction(model: SegFormer) -> None:
    """Half as many different reduced channels; gains stay as unequal as they are."""
    for module in model.modules():
        if getattr(module, "sr", None) is not None:
            half = module.sr.out_channels // 2
            module.sr.weight[half:] = module.sr.weight[:half]
            module.sr.bias[half:] = module.sr.bias[:half]


MAKE_DEPENDENT: dict[str, Callable[[SegFormer], None]] = {
    "ffn": double_hidden,
    "qk": lambda model: lower_rank(model, "q"),
    "v": lambda model: lower_rank(model, "v"),
    "decoder": double_decoder,
    "reduction": double_reduction,
}


@pytest.mark.parametrize("kind", MAKE_DEPENDENT)
def test_dependent_channels_go_without_a_trace(
    folded: SegFormer, batches: list[Tensor], kind: str
) -> None:
    check_dependent(folded, kind, MAKE_DEPENDENT[kind], batches)


def test_dependent_channels_of_a_branch_with_batch_norm_go_without_a_trace(
    conv_model: SegFormer, batches: list[Tensor]
) -> None:
    check_dependent(conv_model, "branch", double_branches, batches)


def check_dependent(
    dense: SegFormer,
    kind: str,
    make_dependent: Callable[[SegFormer], None],
    batches: list[Tensor],
) -> None:
    make_dependent(dense)
    groups = groups_of(dense, kind)
    first_half = {
        g.name: tuple(
            p * g.slots + i
            for p in range(g.parts)
            for i in range(g.slots // 2 + (kind == "reduction"))
        )
        for g in groups
    }
    plan = Plan(first_half)
    pruned = cut_copy(dense, groups, plan)
    repaired = repair(pruned, dense, groups, plan, batches, damping=1e-8)
    assert error(pruned, dense, batches) > 1e-3
    assert error(repaired, dense, batches) < 1e-5


@torch.no_grad()
def test_a_stage_whose_stream_has_few_directions_goes_without_a_trace(
    folded: SegFormer, batches: list[Tensor]
) -> None:
    """Equal gains in the patch embedding, so that its LayerNorm can be turned; half of all that is written twice."""
    stage = folded.encoder.stages[1]
    half = folded.spec.stages[1].width // 2
    stage.patch_embed.norm.weight.fill_(0.7)
    writers = [
        stage.patch_embed.proj,
        *(layer for b in stage.blocks for layer in (b.attn.proj, b.mlp.fc2)),
    ]
    for layer in writers:
        layer.weight[half:] = layer.weight[:half]
        layer.bias[half:] = layer.bias[:half]
    stage.patch_embed.norm.bias[half:] = stage.patch_embed.norm.bias[:half]
    groups = [
        group for group in groups_of(folded, "stage") if group.name == "encoder.stages.1.width"
    ]
    plan = Plan({groups[0].name: tuple(range(half + 1))})
    pruned = cut_copy(folded, groups, plan)
    repaired = repair(pruned, folded, groups, plan, batches, damping=1e-12)
    assert error(pruned, folded, batches) > 1e-2
    assert (
        error(repaired, folded, batches) < 1e-3
    )  # the closing LayerNorm's bias and padding leave something


# Layer by layer


def outputs(model: SegFormer, name: str, batches: list[Tensor]) -> Tensor:
    """All rows that the layer puts out."""
    seen: list[Tensor] = []
    hook = model.get_submodule(name).register_forward_hook(lambda m, i, out: seen.append(out))
    with torch.no_grad():
        for x in batches:
            model(x)
    hook.remove()
    return torch.cat(
        [
            out.flatten(0, -2) if out.dim() == 3 else out.movedim(1, -1).flatten(0, -2)
            for out in seen
        ]
    )


@pytest.mark.parametrize(
    ("kind", "reader"),
    [
        ("ffn", "encoder.stages.{}.blocks.0.mlp.fc2"),
        ("v", "encoder.stages.{}.blocks.0.attn.proj"),
        ("qk", "encoder.stages.{}.blocks.0.attn.proj"),
        ("reduction", "encoder.stages.{}.blocks.0.attn.proj"),
    ],
)
def test_the_reader_of_what_was_cut_says_more_nearly_what_it_said(
    folded: SegFormer, batches: list[Tensor], kind: str, reader: str
) -> None:
    """The first block of a stage alone is cut, so that what the reader reads is all that differs."""
    for stage in (0, 2):
        owner = f"encoder.stages.{stage}.blocks.0."
        groups = [group for group in groups_of(folded, kind) if group.name.startswith(owner)]
        plan = plan_of(groups)
        pruned = cut_copy(folded, groups, plan)
        repaired = repair(pruned, folded, groups, plan, batches)
        name = reader.format(stage)
        wanted = outputs(folded, name, batches)
        before = (outputs(pruned, name, batches) - wanted).square().sum()
        after = (outputs(repaired, name, batches) - wanted).square().sum()
        assert after < before


@pytest.mark.parametrize(
    ("head", "name"),
    [
        ("folded", "norm"),
        ("conv", "norm"),
        ("conv", "branch_norms.0"),
        ("conv", "branch_norms.3"),
    ],
)
def test_the_logits_do_not_move_when_the_statistics_of_batch_norm_do(
    dense_of: DenseOf, batches: list[Tensor], head: str, name: str
) -> None:
    """Behind the repair BatchNorm's running statistics are off those of the images by as much as they were before."""
    dense = dense_of(head)
    groups = groups_of(dense, "stage")
    plan = plan_of(groups, 0.4)
    pruned = cut_copy(dense, groups, plan)
    repaired = repair(pruned, dense, groups, plan, batches, damping=1e-9)
    observed = []
    for model in (dense, repaired):
        seen: list[Tensor] = []
        norm = model.decode_head.get_submodule(name)
        norm.register_forward_pre_hook(
            lambda m, inputs, seen=seen: seen.append(inputs[0].clone())
        )
        with torch.no_grad():
            for x in batches:
                model(x)
        rows = torch.cat([x.movedim(1, -1).flatten(0, -2) for x in seen])
        observed.append(
            (rows.mean(0) - norm.running_mean, rows.var(0, correction=0) / norm.running_var)
        )
    (shift, ratio), (new_shift, new_ratio) = observed
    torch.testing.assert_close(new_shift, shift)
    torch.testing.assert_close(new_ratio, ratio)


# Promises of the whole


def repaired_once(model: SegFormer, batches: list[Tensor], **settings: object) -> SegFormer:
    groups = groups_of(model, *KINDS)
    plan = plan_of(groups)
    return repair(cut_copy(model, groups, plan), model, groups, plan, batches, **settings)


def test_the_same_images_give_the_same_network(
    folded: SegFormer, batches: list[Tensor]
) -> None:
    assert error(repaired_once(folded, batches), repaired_once(folded, batches), batches) < 1e-9


def test_how_images_are_batched_does_not_matter(folded: SegFormer) -> None:
    x = torch.randn(6, 3, 64, 64).double()
    whole, single = repaired_once(folded, [x]), repaired_once(folded, list(x.split(1)))
    assert error(single, whole, [x]) < 1e-6


def test_neither_network_is_touched(folded: SegFormer, batches: list[Tensor]) -> None:
    groups = groups_of(folded, *KINDS)
    plan = plan_of(groups)
    pruned = cut_copy(folded, groups, plan).train()
    pruned.encoder.requires_grad_(False)
    before = copy.deepcopy(pruned), copy.deepcopy(folded)
    repaired = repair(pruned, folded, groups, plan, batches)
    assert states_equal(before[0], pruned)
    assert states_equal(before[1], folded)
    assert pruned.training
    assert not folded.training
    assert repaired.training  # as it was given
    frozen = {name for name, p in repaired.named_parameters() if not p.requires_grad}
    assert frozen == {
        name for name, _ in repaired.named_parameters() if name.startswith("encoder.")
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_precisions_are_repaired_too(
    folded: SegFormer, batches: list[Tensor], dtype: torch.dtype
) -> None:
    model = copy.deepcopy(folded).to(dtype)
    exact = repaired_once(copy.deepcopy(model).double(), batches)
    repaired = repaired_once(model, [x.to(dtype) for x in batches])
    assert {p.dtype for p in repaired.parameters()} == {dtype}
    assert error(copy.deepcopy(repaired).double(), exact, batches) < (
        1e-3 if dtype == torch.float32 else 0.1
    )


def test_progress_counts_blocks_and_head(folded: SegFormer, batches: list[Tensor]) -> None:
    steps: list[tuple[int, int]] = []
    repaired_once(folded, batches, progress=lambda done, total: steps.append((done, total)))
    assert steps == [(i, 7) for i in range(1, 8)]


def test_memory_does_not_grow_with_the_number_of_images_by_more_than_their_activations(
    folded: SegFormer,
) -> None:
    """No matrix of all rows is ever there: the largest tensor made belongs to one batch, however many there are."""

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.numel = max(self.numel, out.numel())
            return out

    sizes = []
    for count in (1, 2):
        with Largest() as largest:
            repaired_once(folded, list(torch.randn(count, 3, 32, 32).double().split(1)))
        sizes.append(largest.numel)
    assert sizes[0] == sizes[1]


# Refusals


def refusal(call: Callable[[], object]) -> str:
    with pytest.raises(ValueError, match=re.compile(r"^[A-Z][^\n]*\.$")) as caught:
        call()
    return str(caught.value)


def test_no_images_are_refused(folded: SegFormer) -> None:
    for batches in ([], [torch.zeros(0, 3, 64, 64).double()]):
        text = refusal(lambda batches=batches: repaired_once(folded, batches))
        assert (
            text
            == "Repair needs images, and there are none; give a few dozen, labels are not needed."
        )


def test_images_of_another_shape_are_refused(folded: SegFormer) -> None:
    text = refusal(lambda: repaired_once(folded, [torch.zeros(2, 64, 64).double()]))
    assert text == "The network takes images as B 3 H W, got shape (2, 64, 64)."


def test_values_that_are_not_finite_are_refused(folded: SegFormer) -> None:
    x = torch.zeros(1, 3, 64, 64).double()
    x[0, 1, 2, 3] = float("nan")
    text = refusal(lambda: repaired_once(folded, [x]))
    assert (
        text
        == "An image holds values that are not finite; check how the images are normalised."
    )


@pytest.mark.parametrize("damping", [0.0, -1.0, float("nan")])
def test_damping_not_above_zero_is_refused(
    folded: SegFormer, batches: list[Tensor], damping: float
) -> None:
    text = refusal(lambda: repaired_once(folded, batches, damping=damping))
    assert text == f"The repair's damping is {damping:g}; it must be above 0."


def test_networks_that_do_not_belong_together_are_refused(
    small_model: SegFormer, folded: SegFormer, batches: list[Tensor]
) -> None:
    groups = groups_of(folded, *KINDS)
    plan = plan_of(groups)
    pruned = cut_copy(folded, groups, plan)
    other = plan_of(groups, 0.5)
    wrong = [
        (pruned, small_model, groups, plan),
        (pruned, folded, groups, other),
        (pruned, folded, groups[1:], plan),
    ]
    for network, dense, some, what in wrong:
        text = refusal(lambda a=network, b=dense, c=some, d=what: repair(a, b, c, d, batches))
        assert text.startswith(
            "The pruned network is not what the plan makes of the dense one; give the network"
        )
