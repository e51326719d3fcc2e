"""Pruner: prepare, score, decide, cut, repair. The steps, in order."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from segprune.checkpoint.hf_memory import (
    is_theirs,
    our_names,
    read_huggingface,
    to_huggingface,
    unwrap,
)
from segprune.fold import fold_decoder, unfold_decoder
from segprune.inference.drop import Drop
from segprune.model import DecodeHead, SegFormer
from segprune.pruning.budget import (
    Search,
    Trial,
    by_accuracy,
    by_curves,
    by_latency,
    by_rate,
    by_uniform_stages,
    by_widths,
    by_widths_and_curves,
    solve_by_curves,
)
from segprune.pruning.budget.latency import LatencyTable
from segprune.pruning.budget.rate import group_shares, reach, with_shares
from segprune.pruning.budget.work import time_costs
from segprune.pruning.coarser import with_factors
from segprune.pruning.groups import Group, group_names, is_protected
from segprune.pruning.images import normalise_batches
from segprune.pruning.importance import NEED_IMAGES, Scores, score_channels
from segprune.pruning.options import PruneOptions
from segprune.pruning.patterns import matching_names
from segprune.pruning.plan import Plan, keep_best, plan_record, plan_rows
from segprune.pruning.prepare import Prepared, check_published, may_fold, prepare, stock_spec
from segprune.pruning.repair import repair
from segprune.pruning.surgery import cut
from segprune.pruning.synthetic import synthetic_images
from segprune.pruning.verify import check_cut, leave_misread
from segprune.spec import list_kv_reductions
from segprune.timing import measure_latency

HIGHEST_RATE = 0.99  # that is tried where the most that can be removed is not known beforehand


class Pruner:
    """Removes a share of a network's parameters (or MACs, channels, latency) as whole channels, in one cut.

    The network may be a `SegFormer` or any module that holds parts of one, or none; what is not a stock SegFormer
    is traced with `example_inputs`, and attention that is not ours is left alone with a warning that names it.
    A stock SegFormer's decode head is folded first unless `keep_decoder`; what that saves counts towards the rate.
    Planned by what the repair leaves and then repaired, with synthetic images where none are given; neither with
    `repair` False.

    >>> from segprune.spec import standard_spec
    >>> pruned = Pruner(SegFormer(standard_spec("b0", 8)), 0.5, repair=False).prune()
    >>> 0.49 < 1 - sum(p.numel() for p in pruned.parameters()) / 3716200 < 0.51
    True
    """

    def __init__(
        self,
        model: nn.Module,
        pruning_rate: float | str | Mapping[str, float] | None = None,
        ignored_layers: Iterable[nn.Module] = (),
        *,
        images: Iterable[Any] = (),
        options: PruneOptions | None = None,
        latency_table: LatencyTable | None = None,
        progress: Callable[[int, int], None] | None = None,
        **changes: Any,
    ) -> None:
        """Raises ValueError for options that are not allowed, here or together.

        `pruning_rate`: the share to remove; see PruneOptions for other ways to say how much.
        `ignored_layers`: modules whose outputs are kept, with all inside them.
        `images`: batches of images B 3 H W, for the plan, the repair and methods that need some: pixels as uint8, or
        normalised as the network was trained. For a stock SegFormer synthetic ones are drawn if none are given, and
        `notes` says so.
        `options`: everything else, in one record; `changes` replace single options of it.
        `latency_table`: for a rate of the latency, times of steps measured before.
        `progress`: called with steps done and their number, while steps are timed and while the network is repaired.
        """
        if pruning_rate is not None:
            changes["pruning_rate"] = pruning_rate
        # A SegFormer of transformers takes the way of its folder: converted, with all its groups.
        self.given = unwrap(model)
        self.model = model = read_huggingface(self.given) or self.given
        self.ignored_layers = list(ignored_layers)
        self.images = normalise_batches(model, images)
        self.options = replace(options or PruneOptions(), **changes)
        self.latency_table = latency_table
        self.progress = progress
        self.plan: Plan | None = None  # what the last prune() decided
        self.record: dict[str, Any] | None = None  # what files hold of it
        self.notes: tuple[str, ...] = ()  # what was done without being asked for

        # What can be refused without running the network is refused here.
        if isinstance(model, SegFormer):
            check_published(model.spec, self.options)

    def prune(self, example_inputs: Any = None) -> nn.Module:
        """Returns a new, smaller network; the one given is left as it was. At rate 0 its decode head is folded.

        `example_inputs` (B 3 H W, or what the network takes) sets the size at which MACs are counted, and is needed
        for a network that is not a stock SegFormer.
        """
        if self.options.removes_nothing and not self.options.kv_factors:
            return self._give_back(self._fold_only())

        prepared = self.prepare(example_inputs)
        scores = self.score(prepared)
        self.plan = self.decide(prepared, scores)
        self.record = self.describe(prepared, self.plan)
        return self._give_back(self.cut_and_repair(prepared, self.plan))

    def _give_back(self, pruned: nn.Module) -> nn.Module:
        """Returns it as it was given: code that trains a network of transformers calls it with labels, for a loss."""
        if isinstance(pruned, SegFormer) and is_theirs(self.given):
            return to_huggingface(pruned, self.given.config)
        return pruned

    def _fold_only(self) -> nn.Module:
        """Returns a copy that computes the same; a stock SegFormer's head is folded, unless it is to be kept."""
        fold = may_fold(self.protected_names(), self.options) and not self.options.uniform
        if not fold or stock_spec(self.model) is None:
            return copy.deepcopy(self.model)
        assert isinstance(self.model, SegFormer)
        return fold_decoder(self.model)

    def search(
        self,
        score: Callable[[nn.Module, bool], Drop],
        on_trial: Callable[[Trial], None] | None = None,
        example_inputs: Any = None,
    ) -> Search:
        """Returns the smallest network that loses no more than `max_drop`, with all that were tried.

        `score` says what a network loses, on a part of the images or (True) on all; `on_trial` is given each trial
        when it was scored. ValueError with the least loss that was seen where every network loses more.
        """
        assert self.options.max_drop is not None
        prepared = self.prepare(example_inputs)
        decide = self.make_decider(prepared, self.score(prepared))
        search = by_accuracy(
            self.options,
            self._reach(prepared),
            decide,
            partial(self.cut_and_repair, prepared),
            score,
            on_trial,
        )
        self.plan = search.chosen.plan
        self.record = self.describe(prepared, self.plan)
        return search

    def _reach(self, prepared: Prepared) -> tuple[float, float]:
        """Returns what folding removes alone, and the most that can be removed, as far as it is known beforehand."""
        (unit,) = self.options.budgets
        if self.options.uniform:
            return 0.0, HIGHEST_RATE
        if unit != "latency":
            return reach(prepared, unit, self.options)

        # In turns, so that both see the machine in the same state.
        place = self._table().place
        dense, folded = measure_latency(
            [prepared.dense, prepared.model],
            prepared.input_shape,
            device=place.device,
            precision=place.precision,
        )
        return max(0.0, 1.0 - folded.median_ms / dense.median_ms), HIGHEST_RATE

    def prepare(self, example_inputs: Any = None) -> Prepared:
        """Returns a copy of the network, folded if it is to be, and the groups that may be cut in it."""
        prepared = prepare(self.model, example_inputs, self.protected_names(), self.options)
        if self.options.repair and not prepared.stock:
            raise ValueError(
                f"{type(self.model).__name__} is not a stock SegFormer; only those can be repaired."
            )
        prepared = leave_misread(prepared, self.options)

        # A factor for a group that is not there would have no effect.
        sensitivity = self.options.sensitivity or {}
        known = {group.name for group in (*prepared.groups, *prepared.protected)}
        unknown = sorted(set(sensitivity) - known)
        if unknown:
            raise ValueError(
                f"The sensitivities are of another network: this one has no group {unknown[0]}; scan it with the "
                "options that it is pruned with."
            )
        return prepared

    def score(self, prepared: Prepared) -> dict[str, Scores]:
        """Returns by group name a score per channel."""
        options = self.options
        needed = options.pruning_method in NEED_IMAGES
        return score_channels(
            prepared.model,
            prepared.groups,
            options.pruning_method,
            self.ensure_images(prepared) if needed else (),
            seed=options.seed,
        )

    def ensure_images(self, prepared: Prepared) -> list[Any]:
        """Draws synthetic images, once, where a stock SegFormer was given none, and says so in `notes`."""
        if not self.images and prepared.stock:
            assert isinstance(prepared.dense, SegFormer)
            self.images = synthetic_images(
                prepared.dense,
                prepared.input_shape,
                seed=self.options.seed,
                progress=self.progress,
            )
            number = sum(map(len, self.images))
            self.notes += (
                f"No `images` were given: {number} synthetic ones stood in for them. Real ones are better, and need "
                "no labels. With `repair` False nothing is repaired.",
            )
        return self.images

    def decide(self, prepared: Prepared, scores: Mapping[str, Scores]) -> Plan:
        """Returns which channels are kept; nothing is cut. The first that applies:

        uniform                   by_uniform_stages
        a plan, and images        by_widths_and_curves
        a plan                    by_widths
        latency among the rates   by_latency, around one of the next two
        curves allowed            by_curves
        else                      by_rate
        """
        if self.options.max_drop is not None:
            raise ValueError(
                "`max_drop` needs networks to be scored; call segprune.prune, or Pruner.search, which do."
            )

        # No channel is removed where only keys and values come from a coarser map.
        if self.options.removes_nothing:
            widest = np.array([group.slots for group in prepared.groups], dtype=np.int64)
            return with_shares(prepared, keep_best(prepared.groups, scores, widest))

        # A plan fixes the widths. Which channels fill them is open: with images that can be
        # measured.
        if self.options.plan is not None and not self.options.uniform:
            if self.options.lets_curves_choose and prepared.stock:
                images = self.ensure_images(prepared)
                return by_widths_and_curves(
                    prepared, scores, images, self.options, self.progress
                )
            return by_widths(prepared, scores, self.options)

        decider = self.make_decider(prepared, scores)
        return decider(self.options)

    def make_decider(
        self, prepared: Prepared, scores: Mapping[str, Scores]
    ) -> Callable[[PruneOptions], Plan]:
        """Returns what makes plans of options that differ from the pruner's in their rates alone.

        What the rate does not change is measured here, once: the curves, and the times of single steps.
        """
        # The classes of transformers allow few widths, so that these have a search of their
        # own.
        if self.options.uniform:
            return partial(by_uniform_stages, prepared, scores)

        solver = None
        if self._uses_curves(prepared):
            images = self.ensure_images(prepared)
            solver = solve_by_curves(prepared, scores, images, self.options, self.progress)

        # Latency is predicted, measured and corrected, around a solver for ordinary
        # budgets: the curves' if there are any, else the scores'.
        if "latency" in self.options.budgets:
            return partial(
                by_latency,
                prepared,
                scores,
                table=self._table(),
                progress=self.progress,
                solver=solver,
            )
        if solver is not None:
            return partial(by_curves, prepared, solver)
        return partial(by_rate, prepared, scores)

    def _table(self) -> LatencyTable:
        if self.latency_table is None:
            self.latency_table = LatencyTable(next(self.model.parameters()).device)
        return self.latency_table

    def _uses_curves(self, prepared: Prepared) -> bool:
        """Whether widths are decided by curves; ValueError where that is asked for and cannot be."""
        # Scores decide for other networks, unless curves were asked for by name.
        if self.options.plan_by == "curves" and not prepared.stock:
            raise ValueError(
                f"{type(self.model).__name__} is not a stock SegFormer; plan it by scores."
            )
        return self.options.may_use_curves and prepared.stock

    def cut_and_repair(self, prepared: Prepared, plan: Plan) -> nn.Module:
        """Returns a new network, cut as planned, and repaired if that is wanted."""
        pruned = cut(prepared, plan)
        check_cut(prepared, plan, pruned)
        pruned = self.repair(prepared, plan, pruned)

        # Stock classes know the published decode head alone.
        return (
            unfold_decoder(pruned)
            if self.options.uniform and isinstance(pruned, SegFormer)
            else pruned
        )

    def repair(self, prepared: Prepared, plan: Plan, pruned: nn.Module) -> nn.Module:
        """Returns the cut network repaired, unless that is switched off or the network is not a stock SegFormer."""
        if self.options.repair is False or not prepared.stock:
            return pruned

        assert isinstance(pruned, SegFormer)
        assert isinstance(prepared.model, SegFormer)
        images = self.ensure_images(prepared)

        # The aim is what the network puts out with the map that it was given with.
        reference = prepared.model
        if self.options.kv_factors:
            assert isinstance(prepared.dense, SegFormer)
            reference = with_factors(reference, list_kv_reductions(prepared.dense.spec))
        return repair(pruned, reference, prepared.groups, plan, images, progress=self.progress)

    def describe(self, prepared: Prepared, plan: Plan) -> dict[str, Any]:
        """Returns what files hold of a plan: by group what is kept, what it costs, and the loss expected."""
        costs = group_shares(prepared)
        if plan.decided_by == "curves":
            # The estimate by which the curves' plans save time.
            time = time_costs(prepared.rows, prepared.groups)
            costs["time"] = {
                group.name: time.share(g) for g, group in enumerate(prepared.groups)
            }
        return plan_record(plan, plan_rows(plan, prepared.groups, costs))

    def make_plan(self, example_inputs: Any = None) -> tuple[Plan, tuple[Group, ...]]:
        """Returns what `prune` would do, and the groups it could choose from; nothing is cut."""
        prepared = self.prepare(example_inputs)
        self.plan = self.decide(prepared, self.score(prepared))
        return self.plan, prepared.groups

    def _collect_ignored_layers(self) -> list[nn.Module]:
        """Layers whose outputs are never cut: the first convolution, the classifier, and what the user named."""
        ignored = list(self.ignored_layers)
        ignored += [m for m in self.model.modules() if isinstance(m, nn.Conv2d)][:1]
        ignored += [m.classifier for m in self.model.modules() if isinstance(m, DecodeHead)]
        return ignored

    def _always_protected(self) -> set[str]:
        # By identity, since `ignored_layers` are modules and everything later goes by name.
        inside: set[int] = set()
        for layer in self._collect_ignored_layers():
            inside |= {id(inner) for inner in layer.modules()}
        names = {name for name, module in self.model.named_modules() if id(module) in inside}

        # Layers of a converted network were named as they were given.
        if self.model is not self.given and not isinstance(self.given, SegFormer):
            theirs: set[str] = set()
            for name, module in self.given.named_modules():
                if id(module) in inside:
                    own = module.named_parameters(prefix=name, recurse=False)
                    theirs |= {parameter for parameter, _ in own}
            names |= {name.rpartition(".")[0] for name in our_names(self.given, theirs)}
        return names

    def protected_names(self) -> set[str]:
        """Returns modules whose outputs are kept, and groups that `ignore` names as such."""
        # A pattern may name modules or groups; `dict.fromkeys` removes duplicates and keeps
        # the order.
        names = [name for name, _ in self.model.named_modules() if name]
        known = list(dict.fromkeys([*names, *group_names(self.model)]))
        return matching_names(self.options.ignore, known, "ignore") | self._always_protected()

    def left_alone(self, prepared: Prepared) -> list[str]:
        """Returns the groups that could be cut but for `ignore`."""
        always = self._always_protected()
        return [group.name for group in prepared.protected if not is_protected(group, always)]
