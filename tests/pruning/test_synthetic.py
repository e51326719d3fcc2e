import torch

from segprune.data.leaves import draw_leaves
from segprune.data.transforms import normalise
from segprune.model import SegFormer
from segprune.pruning.synthetic import synthetic_images


def test_images_come_in_batches_of_the_size_asked_for_and_are_the_same_each_time(
    small_model: SegFormer,
) -> None:
    calls: list[tuple[int, int]] = []
    batches = synthetic_images(
        small_model, (64, 96), count=10, progress=lambda *step: calls.append(step)
    )
    assert [tuple(batch.shape) for batch in batches] == [(8, 3, 64, 96), (2, 3, 64, 96)]
    assert batches[0].dtype == torch.float64
    assert calls[-1] == (40, 40)
    again = synthetic_images(small_model, (64, 96), count=10)
    assert all(torch.equal(one, other) for one, other in zip(batches, again, strict=True))


def test_those_are_chosen_whose_statistics_are_the_ones_the_network_remembers(
    small_model: SegFormer,
) -> None:
    """A norm that saw bright images only gets bright ones."""
    norm = small_model.decode_head.norm
    assert norm.running_mean is not None
    assert norm.running_var is not None
    every = torch.stack(
        [normalise(draw_leaves(0, index, (64, 64))) for index in range(32)]
    ).double()
    bright = every[every.mean((1, 2, 3)).argsort()[-8:]]
    with torch.no_grad():
        fused = small_model.decode_head.fused(small_model.encoder(bright)).double()
        norm.running_mean.copy_(fused.mean((0, 2, 3)))
        norm.running_var.copy_(fused.var((0, 2, 3)))

    (chosen,) = synthetic_images(small_model, (64, 64), count=8)
    assert float(chosen.mean()) > float(every.mean()) + 0.3
