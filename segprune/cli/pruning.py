"""The flags of pruning: what each says, and which contradict each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from typer import Option

from segprune.cli.flags import Amp, Layout, LoaderProcesses, SkipBad, switch
from segprune.cli.machine import AUTO
from segprune.pruning.importance import METHODS, NEED_DATA
from segprune.pruning.patterns import parse_budgets

TRAINING_FLAGS = ("lr", "no_distill", "freeze_epochs", "scale", "amp")
DATA_FLAGS = ("layout", "skip_bad", "batch_size", "num_workers")
PLANNING_FLAGS = (
    *("pruning_rate", "rate_of", "budgets", "scope", "round_to"),
    *("max_rate", "rates", "sensitivity", "steps"),
)  # a finished plan leaves nothing to them
RANKING_FLAGS = ("sensitivity",)  # nor does another scope than global to these


@dataclass(frozen=True)
class PruneConfig:
    PANELS: ClassVar[Mapping[str, str]] = {
        "model_path": "The network",
        "pruning_method": "How much goes, and which channels",
        "plan_only": "A plan to look at and to edit",
        "images": "Repair, without labels",
        "steps": "In several steps",
        "depth": "What else may go, or may not",
        "data": "Scoring and fine-tuning",
        "cuda": "The run",
    }

    model_path: Annotated[
        str,
        Option(
            "--model_path",
            help="Trained checkpoint: .pth, .pt, .safetensors, a Hugging Face folder or hub name. "
            "Empty: random weights, which is only a dry run.",
        ),
    ] = ""
    num_classes: Annotated[
        int | None,
        Option("--num_classes", help="Channels of the logits, background included; read off the checkpoint, else 8."),
    ] = None
    phi: Annotated[str | None, Option("--phi", help="MiT variant b0 … b5; read off the checkpoint, else b2.")] = None
    input_shape: Annotated[
        tuple[int, int],
        Option("--input_shape", metavar="H W", help="Size for MACs, latency, scoring and fine-tuning."),
    ] = (512, 512)
    pruning_method: Annotated[
        str,
        Option(
            "--pruning_method",
            help="How channels are ranked: l1, l2, fpgm, lamp, bn by their weights; taylor, fisher, wanda by what they "
            "do on pictures, which need --data or --images; random is the control.",
        ),
    ] = "l1"
    pruning_rate: Annotated[
        float, Option("--pruning_rate", help="Share to remove, in [0, 1), of what --rate_of says; met within 0.01.")
    ] = 0.5
    rate_of: Annotated[
        str, Option("--rate_of", help="What the rate is a share of: params, macs, channels, latency.")
    ] = "params"
    budgets: Annotated[
        str, Option("--budgets", help="In place of a rate several at once, each met at least: params=0.5,macs=0.7.")
    ] = ""
    scope: Annotated[
        str,
        Option(
            "--scope",
            help="global: rank all channels together; local: every group loses the same share; isomorphic: every set "
            "of equal groups does.",
        ),
    ] = "global"
    round_to: Annotated[int, Option("--round_to", help="Widths stay multiples of it; 1: any width.")] = 8
    max_rate: Annotated[
        str,
        Option(
            "--max_rate",
            help="Share of a group that may go at most: 0.8, or by name stages.3=0.6,head=0.5. If not given: 0.9.",
        ),
    ] = ""
    rates: Annotated[
        str,
        Option(
            "--rates",
            help="Shares of the channels that go by name, as in stages.3=0.7,head=0.6; the rest makes up for "
            "--pruning_rate, or stays whole if that is not given.",
        ),
    ] = ""
    ignore: Annotated[
        str,
        Option(
            "--ignore",
            help="Layers and groups of a plan whose channels all stay, by name: stages.0.*,stages.1.blocks.0.mlp.ffn.",
        ),
    ] = ""
    sensitivity: Annotated[
        str, Option("--sensitivity", metavar="FILE", help="What `segprune scan` measured; weighs the groups.")
    ] = ""
    plan_only: Annotated[bool, switch("--plan_only", "Only decide: show the widths and save them as plan.json.")] = (
        False
    )
    plan: Annotated[
        str, Option("--plan", metavar="FILE", help="Carry out the widths of such a file, edited or not.")
    ] = ""
    images: Annotated[
        str,
        Option(
            "--images",
            help="Folder of pictures, without labels, for the repair and for methods that need some. If not given: "
            "the train part of --data.",
        ),
    ] = ""
    num_images: Annotated[int, Option("--num_images", min=1, help="So many of them are used.")] = 64
    repair: Annotated[
        bool | None,
        Option(
            "--repair/--no_repair",
            help="Re-solve what reads the cut channels from those pictures. If not given: where there are some.",
        ),
    ] = None
    steps: Annotated[
        int, Option("--steps", min=1, help="Prune in so many steps of equal size, each repaired by itself.")
    ] = 1
    step_epochs: Annotated[
        int, Option("--step_epochs", min=0, help="Fine-tune so many epochs between two steps, on --data.")
    ] = 0
    depth: Annotated[
        float,
        Option(
            "--depth",
            help="Share of the network that goes as whole attention or FFN branches, and blocks, before channels are "
            "cut; a part of the rate.",
        ),
    ] = 0.0
    heads: Annotated[bool, switch("--heads", "Whole attention heads may go too.")] = False
    keep_decoder: Annotated[bool, switch("--keep_decoder", "Do not fold the decode head.")] = False
    uniform: Annotated[
        bool, switch("--uniform", "Keep every stage uniform, so that stock transformers can hold the network: convert.")
    ] = False
    data: Annotated[
        str, Option("--data", help="Data set, in any layout of docs/data.md: score on its val part before and after.")
    ] = ""
    layout: Layout = None
    skip_bad: SkipBad = False
    epochs: Annotated[int, Option("--epochs", min=0, help="Fine-tune so many epochs on --data; 0: do not.")] = 0
    batch_size: Annotated[int, Option("--batch_size", min=1, help="Pictures per step, of fine-tuning and scoring.")] = 8
    lr: Annotated[
        float | None,
        Option(
            "--lr",
            help="Of fine-tuning. If not given: a tenth of what a file of ours was trained with from scratch, else "
            "what it was fine-tuned with, else 6e-5.",
        ),
    ] = None
    no_distill: Annotated[
        bool, switch("--no_distill", "Fine-tune on the labels alone; else the dense network is the teacher.")
    ] = False
    freeze_epochs: Annotated[
        int, Option("--freeze_epochs", help="Fine-tune only the decode head in the first so many epochs.")
    ] = 0
    scale: Annotated[
        tuple[float, float], Option("--scale", metavar="LOW HIGH", help="Random resizing while fine-tuning.")
    ] = (0.5, 2.0)
    num_workers: LoaderProcesses = None
    amp: Amp = AUTO
    cuda: Annotated[bool, switch("--cuda", "Use the GPU; without it the CPU.")] = False
    seed: Annotated[int, Option("--seed", help="Of random weights and of fine-tuning.")] = 11
    save_dir: Annotated[str, Option("--save_dir", help="Files go to SAVE_DIR/METHOD/PHI.")] = "logs_pruning"
    dialect: Annotated[str | None, Option("--dialect", help="Overrules the dialect that is recognised.")] = None


def needs_images(config: PruneConfig) -> bool:
    """Whether pictures, if there are some, are of use: to the repair, the method or the choice of branches."""
    will_repair = config.repair is not False and not config.plan_only
    return will_repair or config.pruning_method in NEED_DATA or config.depth > 0.0


def label(config: PruneConfig, given: frozenset[str]) -> str:
    """What was asked, for the name of the file: the rate, or which flag said it otherwise."""
    for name in ("plan", "budgets", "rates"):
        if getattr(config, name) and not (name == "rates" and "pruning_rate" in given):
            return name
    return f"{config.pruning_rate:g}"


def check_flags(config: PruneConfig, given: frozenset[str]) -> None:
    """ValueError for what is out of range, and for flags that contradict each other."""
    if config.pruning_method not in METHODS:
        raise ValueError(f"Unknown method {config.pruning_method!r}; --pruning_method knows {', '.join(METHODS)}.")
    if config.pruning_method in NEED_DATA and not (config.data or config.images):
        raise ValueError(
            f"--pruning_method {config.pruning_method} needs pictures; give them as --images DIR or --data, "
            "labels are not needed."
        )
    if not 0.0 <= config.pruning_rate < 1.0:
        raise ValueError(f"--pruning_rate is {config.pruning_rate:g}; it must be at least 0 and below 1.")
    if config.epochs and not config.data:
        raise ValueError("--epochs was given without --data; say what to fine-tune on.")
    if config.epochs and config.plan_only:
        raise ValueError("--epochs has no effect with --plan_only, which cuts nothing; leave one of them out.")
    for name in TRAINING_FLAGS:
        timed_in_it = name == "amp" and config.cuda
        if name in given and not config.epochs and not timed_in_it:
            raise ValueError(f"--{name} has no effect without --epochs; give the epochs to fine-tune.")
    for name in DATA_FLAGS:
        if name in given and not config.data:
            raise ValueError(f"--{name} has no effect without --data; give the data set to score on.")
    if "num_images" in given and not (config.data or config.images):
        raise ValueError("--num_images has no effect without --images or --data; say where the pictures lie.")
    for name in ("images", "num_images"):
        if name in given and not needs_images(config):
            raise ValueError(f"--{name} has no effect where nothing is repaired or ranked by pictures; leave it out.")
    if "repair" in given and config.plan_only:
        raise ValueError("--repair and --no_repair have no effect with --plan_only, which cuts nothing; leave it out.")
    if config.repair and not (config.data or config.images):
        raise ValueError("--repair needs pictures; give them as --images DIR or --data, labels are not needed.")
    _check_planning(config, given)
    _check_steps(config, given)


def _check_planning(config: PruneConfig, given: frozenset[str]) -> None:
    rates_alone = bool(config.rates) and not asked_rates(config, given)
    for name in (name for name in PLANNING_FLAGS if name in given):
        if config.plan:
            raise ValueError(f"--{name} has no effect with --plan, which says what stays; leave one of them out.")
        if rates_alone and name not in ("rates", "round_to", "steps"):
            raise ValueError(f"--{name} has no effect with --rates alone, which say all that goes; give a rate too.")
        if config.scope != "global" and name in RANKING_FLAGS:
            raise ValueError(f"--{name} has no effect with --scope {config.scope}, which ranks otherwise; drop one.")
    for name in ("pruning_rate", "rate_of"):
        if name in given and config.budgets:
            raise ValueError(f"--{name} contradicts --budgets, which names the rates by unit; leave one of them out.")
    if config.plan_only and config.plan:
        raise ValueError("--plan_only has no effect with --plan, which is decided already; leave one of them out.")


def _check_steps(config: PruneConfig, given: frozenset[str]) -> None:
    """Of pruning in several steps, training in between, and whole branches."""
    if config.step_epochs and not (config.steps > 1 and config.epochs):
        raise ValueError("--step_epochs has no effect without --steps 2 or more and --epochs; give both.")
    if config.steps > 1 and (config.plan_only or config.rates):
        raise ValueError("--steps has no effect with --plan_only or --rates; leave it out.")
    if not 0.0 <= config.depth < 1.0:
        raise ValueError(f"--depth is {config.depth:g}; it must be at least 0 and below 1.")
    too_much = [unit for unit, rate in asked_rates(config, given).items() if config.depth >= rate > 0.0]
    if config.depth and too_much:
        raise ValueError(f"--depth {config.depth:g} is a part of the rate of the {too_much[0]}; it must be below that.")
    if config.depth and (config.plan_only or config.plan or {"latency", "channels"} & set(asked_rates(config, given))):
        raise ValueError(
            "--depth goes with a rate of params or macs, and without --plan_only or --plan; leave one of them out."
        )
    if config.uniform and config.depth:
        raise ValueError("--depth takes out parts of blocks, which --uniform keeps; leave one of them out.")


def split_names(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def asked_rates(config: PruneConfig, given: frozenset[str]) -> Mapping[Any, float]:
    """Rates by unit; none where only --plan or --rates say what goes."""
    if config.budgets:
        return parse_budgets(config.budgets, "--budgets")
    if config.plan or (config.rates and "pruning_rate" not in given):
        return {}
    return {config.rate_of: config.pruning_rate}
