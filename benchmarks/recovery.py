"""What fine-tuning after pruning recovers, and with which settings: dense b0s, pruned, fine-tuned in several ways.

    python -m benchmarks.recovery DIR [--seeds 1 2 3] [--studies teacher hard rate parts head freeze]

For each seed a data set is drawn into DIR (2000 pictures to learn from, 200 to score, 64×64), a b0 is trained from
scratch on it and pruned, and the pruned network is fine-tuned for a share of the dense network's steps, once for each
setting of a study; all settings of a study start from the same file and see the same pictures. The mIoU is that of the
last step, not of the best epoch, as a share of the dense one's. What DIR already has is not computed again.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import segprune
from segprune import L1Pruner, SegFormer
from segprune.cli.console import keep_freed_memory
from segprune.data import CLASS_NAMES, CONTEXT_CLASS_NAMES, open_source, write_shapes
from segprune.fold import fold_decoder
from segprune.inference.evaluate import EvalMode, evaluate
from segprune.pruning.options import RateOf
from segprune.spec import standard_spec
from segprune.training.distill import Distillation
from segprune.training.loop import train
from segprune.training.options import TrainOptions
from segprune.training.state import Splits

SIZE, NUM_TRAIN, NUM_VAL = (64, 64), 2000, 200
DENSE_LR = 1e-3
DENSE = TrainOptions(
    len(CLASS_NAMES),
    input_shape=SIZE,
    epochs=8,
    batch_size=16,
    lr=DENSE_LR,
    scale=(0.75, 1.5),
    num_workers=1,
    eval_every=99,
    amp="no",
    tf32=False,
)


@dataclass(frozen=True)
class Setting:
    """One way to prune and fine-tune; `share` is of the dense network's steps, `lr` of its rate."""

    name: str
    rate: float = 0.5
    rate_of: RateOf = "params"
    share: float = 0.1
    lr: float = 0.5
    keep_decoder: bool = False
    changes: tuple[tuple[str, Any], ...] = ()
    distillation: Distillation | None = None


TAUGHT = Distillation()


def weights_of(distillation: Distillation | None) -> dict[str, Any]:
    """Returns the weights as options of training."""
    if distillation is None:
        return {}
    return {
        f"distill_{name}": getattr(distillation, name)
        for name in ("pixel", "channel", "feature")
    }


HARD = Setting(
    "", rate=0.9, rate_of="macs"
)  # on these pictures a rate of the parameters takes what does nothing
HARD_TAUGHT = replace(HARD, distillation=TAUGHT)
STUDIES: dict[str, tuple[Setting, ...]] = {
    "teacher": (
        Setting("labels alone"),
        Setting("with the teacher", distillation=TAUGHT),
        Setting("labels alone, rate 0.7", rate=0.7, share=0.25),
        Setting("with the teacher, rate 0.7", rate=0.7, share=0.25, distillation=TAUGHT),
    ),
    "hard": (
        replace(HARD, name="labels alone, 90 % of MACs"),
        replace(HARD_TAUGHT, name="with the teacher, 90 % of MACs"),
        replace(HARD, name="labels alone, 90 % of MACs, 25 % of steps", share=0.25),
        replace(HARD_TAUGHT, name="with the teacher, 90 % of MACs, 25 % of steps", share=0.25),
    ),
    "rate": tuple(
        replace(HARD_TAUGHT, name=f"learning rate × {lr:g}", lr=lr)
        for lr in (0.1, 0.25, 0.5, 1.0, 2.0)
    ),
    "parts": (
        replace(HARD, name="pixels alone", distillation=Distillation(channel=0, feature=0)),
        replace(HARD, name="channels alone", distillation=Distillation(pixel=0, feature=0)),
        replace(HARD, name="features alone", distillation=Distillation(pixel=0, channel=0)),
        replace(HARD, name="pixels and channels", distillation=Distillation(feature=0)),
    ),
    "weights": tuple(
        replace(HARD, name=f"{name}, learning rate × 1", lr=1.0, distillation=distillation)
        for name, distillation in (
            ("labels alone", None),
            ("pixels 1", Distillation(channel=0, feature=0)),
            ("pixels 1, features 1", Distillation(channel=0)),
            ("pixels 3", Distillation(pixel=3, channel=0, feature=0)),
            ("channels 0.1", Distillation(pixel=0, channel=0.1, feature=0)),
            ("channels 0.3", Distillation(pixel=0, channel=0.3, feature=0)),
            ("channels 1", Distillation(pixel=0, channel=1, feature=0)),
            ("pixels 1, channels 0.3", Distillation(channel=0.3, feature=0)),
            ("pixels 1, channels 0.3, features 1", Distillation(channel=0.3)),
        )
    ),
    "head": (
        replace(HARD_TAUGHT, name="folded head"),
        replace(HARD_TAUGHT, name="original head", keep_decoder=True),
    ),
    "freeze": (
        replace(HARD_TAUGHT, name="trained all at once"),
        replace(
            HARD_TAUGHT,
            name="encoder frozen in the first of four epochs",
            changes=(("freeze_epochs", 1),),
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--studies", nargs="*", default=list(STUDIES), choices=list(STUDIES))
    flags = parser.parse_args()
    keep_freed_memory()  # as the commands do
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    rows: dict[tuple[str, str], list[tuple[float, float, float]]] = {}
    for seed in flags.seeds:
        bench = Bench(flags.folder / str(seed), seed, accelerator)
        for study in flags.studies:
            for setting in STUDIES[study]:
                before, after = bench.recovered(setting)
                rows.setdefault((study, setting.name), []).append(
                    (bench.dense_miou, before, after)
                )
                print(
                    f"seed {seed}, {setting.name}: dense {bench.dense_miou:.4f}, {before:.4f} -> {after:.4f}",
                    flush=True,
                )
    print(f"\nMeans over seeds {flags.seeds} (lowest and highest):\n")
    print("| study | setting | dense | pruned | fine-tuned | of dense |")
    print("|---|---|---|---|---|---|")
    for (study, name), values in rows.items():
        columns = zip(*values, strict=True)
        shares = [100 * after / dense for dense, _, after in values]
        cells = [spread(column, ".3f") for column in columns] + [spread(shares, ".1f") + " %"]
        print(f"| {study} | {name} | {' | '.join(cells)} |")


def spread(values: Any, form: str) -> str:
    return f"{statistics.mean(values):{form}} ({min(values):{form}}–{max(values):{form}})"


class Bench:
    """One seed's data, dense network and results."""

    def __init__(
        self, folder: Path, seed: int, accelerator: Accelerator, *, context: bool = False
    ) -> None:
        self.folder, self.seed, self.accelerator = folder, seed, accelerator
        self.num_classes = len(CONTEXT_CLASS_NAMES if context else CLASS_NAMES)
        if not (folder / "shapes").is_dir():
            write_shapes(
                folder / "shapes",
                num_train=NUM_TRAIN,
                num_val=NUM_VAL,
                size=SIZE,
                seed=seed,
                context=context,
            )
        source = open_source(folder / "shapes")
        self.splits = Splits(source.split("train"), source.split("val"))
        path = folder / "dense.pth"
        if not path.is_file():
            torch.manual_seed(seed)
            model = self.new("b0")
            train(model, self.dense_config, self.splits, accelerator=accelerator)
            segprune.save(model, path)
        self.dense = segprune.load(path)
        self.dense_miou = self.cached("dense", lambda: [self.score(self.dense)])[0]

    @property
    def dense_config(self) -> TrainOptions:
        return replace(DENSE, num_classes=self.num_classes, seed=self.seed)

    def new(self, variant: str) -> SegFormer:
        spec = standard_spec(variant, self.num_classes)
        return SegFormer(replace(spec, numerics=replace(spec.numerics, drop_path=0.0)))

    def score(self, model: torch.nn.Module) -> float:
        model.to(self.accelerator.device)
        how = EvalMode(input_shape=SIZE)
        device = self.accelerator.device
        return evaluate(
            model, self.splits.val, self.num_classes, how, device=device, batch_size=20
        ).miou

    def cached(self, name: str, compute: Any) -> list[float]:
        path = self.folder / "results.json"
        known = json.loads(path.read_text()) if path.is_file() else {}
        if name not in known:
            known[name] = compute()
            path.write_text(json.dumps(known, indent=1))
        return known[name]

    def config(self, epochs: int, lr: float) -> TrainOptions:
        """Of fine-tuning; `lr` as a share of the dense network's."""
        return replace(self.dense_config, epochs=epochs, lr=lr * DENSE_LR)

    def recovered(self, setting: Setting) -> tuple[float, float]:
        """mIoU after pruning and after fine-tuning."""
        before, after = self.cached(
            repr(replace(setting, name="")), lambda: list(self._fine_tuned(setting))
        )
        return before, after

    def _fine_tuned(self, setting: Setting) -> Iterator[float]:
        pruner = L1Pruner(
            self.dense,
            setting.rate,
            rate_of=setting.rate_of,
            keep_decoder=setting.keep_decoder,
            repair=False,
        )
        model = pruner.prune(torch.empty(1, 3, *SIZE, device="meta"))
        yield self.score(model)
        # Of a part of the images, so that an encoder can be frozen for one of them.
        epochs = 4
        steps = round(setting.share * DENSE.epochs * (NUM_TRAIN // DENSE.batch_size) / epochs)
        part = Splits(self.splits.train[: steps * DENSE.batch_size], self.splits.val)
        changes = weights_of(setting.distillation) | dict(setting.changes)
        config = replace(self.config(epochs, setting.lr), **changes)
        teacher = None if setting.distillation is None else fold_decoder(self.dense)
        train(model, config, part, accelerator=self.accelerator, teacher=teacher)
        yield self.score(model)


if __name__ == "__main__":
    main()
