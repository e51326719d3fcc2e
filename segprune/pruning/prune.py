"""`segprune.prune`: a network pruned in one call, with what was decided and how much it removed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from segprune.checkpoint.hf_memory import is_theirs, read_huggingface, to_huggingface
from segprune.model import SegFormer
from segprune.pruning.budget import Search
from segprune.pruning.options import PruneOptions
from segprune.pruning.plan import Plan
from segprune.pruning.pruner import Pruner
from segprune.pruning.pruner_l1 import L1Pruner
from segprune.stats import Counts, count


@dataclass(frozen=True)
class Pruned:
    """A pruned network. `plan`: the channels kept, None where nothing was to be removed.

    `search`: with `max_drop`, all that was tried. `before` and `after` are parameters and MACs of the network as given
    and as pruned; None for what is not a SegFormer as its spec builds it. `notes`: what was done without being asked
    for, such as drawing synthetic images, in sentences.
    """

    network: nn.Module
    plan: Plan | None
    before: Counts | None
    after: Counts | None
    search: Search | None = None
    config: Any = None  # of the network of transformers that was given
    notes: tuple[str, ...] = ()

    def to_huggingface(self) -> nn.Module:
        """Returns the network in a class of transformers' kind: called, trained and saved like theirs."""
        if not isinstance(self.network, SegFormer):
            raise ValueError(
                f"{type(self.network).__name__} is no SegFormer, so no class of transformers' kind holds it."
            )
        return to_huggingface(self.network, self.config)


def prune(
    model: nn.Module,
    pruning_rate: float | str | Mapping[str, float] | None = None,
    *,
    images: Iterable[Any] = (),
    options: PruneOptions | None = None,
    progress: Callable[[int, int], None] | None = None,
    example_inputs: Any = None,
    ignored_layers: Iterable[nn.Module] = (),
    **changes: Any,
) -> Pruned:
    """Returns `model` pruned by the share `pruning_rate` of its parameters; the network given is left as it was.

    `images`: batches of images B 3 H W without labels, uint8 or normalised, for the plan and the repair; synthetic ones
    if none are given, which `notes` says. `repair` False: neither. The other arguments are those of `Pruner`, and
    `changes` are single options of `PruneOptions`. Prints nothing.

    >>> from segprune.spec import standard_spec
    >>> pruned = prune(SegFormer(standard_spec("b0", 8)), 0.5, repair=False)
    >>> round(1 - pruned.after.parameters / pruned.before.parameters, 1)
    0.5
    """
    pruner = make_pruner(
        model,
        pruning_rate,
        ignored_layers,
        images=images,
        options=options,
        progress=progress,
        **changes,
    )
    return with_counts(pruner, pruner.prune(example_inputs))


def with_counts(pruner: Pruner, network: nn.Module, search: Search | None = None) -> Pruned:
    """Returns what a pruner made, counted before and after."""
    shape = pruner.options.input_shape
    # A network of transformers is given back in their kind of class; here it is ours.
    config = getattr(pruner.given, "config", None) if is_theirs(pruner.given) else None
    network = read_huggingface(network) or network

    # Both are counted from specs, which only a SegFormer has.
    before, after = (
        count(net.spec, shape) if isinstance(net, SegFormer) else None
        for net in (pruner.model, network)
    )
    return Pruned(network, pruner.plan, before, after, search, config, pruner.notes)


def make_pruner(
    model: nn.Module, *arguments: Any, options: PruneOptions | None = None, **others: Any
) -> Pruner:
    """Returns an `L1Pruner`, whose `_collect_ignored_layers` users may edit, for l1; else a plain `Pruner`."""
    method = others.get("pruning_method") or (options or PruneOptions()).pruning_method
    kind = L1Pruner if method == "l1" else Pruner
    return kind(model, *arguments, options=options, **others)
