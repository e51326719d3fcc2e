"""Where the time of a forward pass goes: the share of each kind of operation, dense, folded and pruned.

    python -m benchmarks.operations [--variants b0 b2 b5] [--rate 0.5] [--shape 512 512] [--passes 5] [--cuda]

Random weights with trained-like statistics, 150 classes, batch 1, up to logits of the input's size. Times are PyTorch's
profiler's, of the operations themselves and not what they call, as a share of all.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.trained_like import fill
from segprune import L1Pruner, SegFormer, count
from segprune.cli.console import keep_freed_memory
from segprune.fold import fold_decoder
from segprune.spec import standard_spec

NUM_CLASSES = 150
KINDS = {  # by a part of the operation's name; the first that fits counts
    "conv1x1": "products",
    "depthwise": "depth-wise",
    "conv": "convolutions",
    "mm": "products",
    "scaled_dot_product": "attention",
    "softmax": "attention",
    "layer_norm": "normalisation",
    "batch_norm": "normalisation",
    "gelu": "activations",
    "relu": "activations",
    "clamp": "activations",
    "upsample": "upsampling",
    "add": "sums",
    "": "copies and the rest",
}
COLUMNS = tuple(dict.fromkeys(KINDS.values()))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variants", nargs="+", default=["b0", "b2", "b5"])
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--shape", type=int, nargs=2, default=[512, 512])
    parser.add_argument("--passes", type=int, default=5)
    parser.add_argument("--cuda", action="store_true")
    flags = parser.parse_args()
    keep_freed_memory()  # as the commands do
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {flags.shape[0]}×{flags.shape[1]}, batch 1\n"
    )
    print(f"| network | MACs (G) | ms | {' | '.join(COLUMNS)} |")
    print("|---|---|---|" + "---|" * len(COLUMNS))
    for variant in flags.variants:
        torch.manual_seed(0)
        dense = fill(SegFormer(standard_spec(variant, NUM_CLASSES))).eval()
        assert isinstance(dense, SegFormer)
        pruned = L1Pruner(dense, flags.rate, repair=False).prune(
            torch.empty(1, 3, *flags.shape, device="meta")
        )
        networks = {
            "dense": dense,
            "folded": fold_decoder(dense),
            f"pruned {flags.rate:g}": pruned,
        }
        for name, network in networks.items():
            assert isinstance(network, SegFormer)
            spent = _spent(network, flags)
            whole = sum(spent.values())
            shares = " | ".join(f"{100 * spent[kind] / whole:.0f} %" for kind in COLUMNS)
            macs = count(network.spec, tuple(flags.shape)).macs / 1e9
            print(f"| {variant} {name} | {macs:.1f} | {whole:.0f} | {shares} |", flush=True)


def _spent(network: nn.Module, flags: argparse.Namespace) -> Counter[str]:
    """Milliseconds of one pass by kind of operation."""
    device = torch.device("cuda" if flags.cuda else "cpu")
    network = network.to(device)
    x = torch.randn(1, 3, *flags.shape, device=device)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if flags.cuda else [])]
    spent: Counter[str] = Counter()
    with torch.inference_mode():
        for _ in range(2):
            network(x)
        with profile(activities=activities, record_shapes=True) as profiler:
            for _ in range(flags.passes):
                network(x)
    for event in profiler.key_averages(group_by_input_shape=True):
        time = event.self_device_time_total if flags.cuda else event.self_cpu_time_total
        spent[_kind(event)] += time / 1e3 / flags.passes
    return spent


def _kind(event: Any) -> str:
    name = event.key.removeprefix("aten::")
    shapes = event.input_shapes
    if "conv" in name and len(shapes) > 1 and len(shapes[1]) == 4:
        if shapes[1][1] == 1:
            name = "depthwise"
        elif shapes[1][2:] == [1, 1]:
            name = "conv1x1"
        else:
            name = "convolution"
    return next(kind for part, kind in KINDS.items() if part in name)


if __name__ == "__main__":
    main()
