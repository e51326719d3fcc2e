"""fp16 that does not overflow: a network's graph in half precision, save for what passes half of fp16's range.

The graph is run in float32 on images, and the largest magnitude of every tensor in it is recorded. What makes or reads a
tensor, a weight among them, that passes `LARGEST` computes in float32, with casts around it; all else computes in half.
Runtimes make tensors of their own inside attention (the products of queries and keys) and LayerNorm (squares), so these
count as well.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

LARGEST = torch.finfo(torch.float16).max / 2
ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
LAYER_NORM = torch.ops.aten.layer_norm.default
CAST = torch.ops.aten.to.dtype


def halve(
    program: ExportedProgram, batches: Iterable[Tensor]
) -> tuple[fx.GraphModule, tuple[str, ...]]:
    """Returns the graph of a `Deployed` in half precision, and the names of the modules that compute in float32.

    Only what is inside `network` is halved: pixels minus their mean lose digits in half. Input and output keep their
    types. `batches` are what the graph takes.
    """
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = module.graph
    for node in list(graph.nodes):
        # What asserts the types of float32 is in the way of others.
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            graph.erase_node(node)

    magnitudes = _Magnitudes(module)
    with torch.no_grad():
        for batch in batches:
            magnitudes.run(batch)
    over = {node for node, largest in magnitudes.largest.items() if not largest <= LARGEST}

    # Float32 stays whatever makes or reads what passes the range.
    operations = [node for node in graph.nodes if node.op == "call_function"]
    inside = [node for node in operations if _name_module(node).startswith("network")]
    kept = [node for node in inside if over.intersection([node, *node.all_input_nodes])]
    half = set(inside) - set(kept)

    # A weight is stored in half if nothing reads it in float32; the network's own is left as it is.
    for node in graph.find_nodes(op="get_attr"):
        if half.issuperset(node.users):
            path, _, name = str(node.target).rpartition(".")
            owner = module.get_submodule(path)
            weight = getattr(owner, name).detach().half()
            setattr(owner, name, nn.Parameter(weight, requires_grad=False))
            half.add(node)

    for node in operations:
        _cast_inputs(node, half)
    graph.lint()
    names = dict.fromkeys(_name_module(node).removeprefix("network.") for node in kept)
    # A new module, without the checks of sizes that the exported one makes in Python.
    # TorchScript freezes networks in evaluation mode alone.
    return fx.GraphModule(module, graph).eval(), tuple(names)


class _Magnitudes(fx.Interpreter):
    """Runs a graph and records the largest magnitude of every tensor that it makes or reads."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.largest: dict[fx.Node, float] = {}

    def run_node(self, node: fx.Node) -> Any:
        result = super().run_node(node)
        tensors = [result]
        if node.target in (ATTENTION, LAYER_NORM):
            args, kwargs = self.fetch_args_kwargs_from_env(node)
            tensors.append(_find_hidden(args, kwargs))

        for tensor in tensors:
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                # Infinity and NaN pass the range too.
                largest = float(tensor.abs().max().nan_to_num(torch.inf))
                self.largest[node] = max(self.largest.get(node, 0.0), largest)
        return result


def _find_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Returns what runtimes compute on the way: products q kᵀ of attention, squares of LayerNorm."""
    if "scale" in kwargs:
        query, key = args[:2]
        return query @ key.transpose(-2, -1)  # B h N M
    x = args[0]
    return (x - x.mean(-1, keepdim=True)).square()


def _cast_inputs(node: fx.Node, half: set[fx.Node]) -> None:
    """Casts the node's floating inputs to what it computes in, where they come in the other type."""
    own = torch.float16 if node in half else torch.float32

    def cast(source: fx.Node) -> fx.Node:
        if not _is_float(source) or (source in half) == (node in half):
            return source
        with node.graph.inserting_before(node):
            return node.graph.call_function(CAST, (source, own))

    node.args = fx.map_arg(node.args, cast)
    node.kwargs = fx.map_arg(node.kwargs, cast)


def _is_float(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.float32


def _name_module(node: fx.Node) -> str:
    """Returns the innermost module that the operation belongs to, such as network.decode_head.classifier."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    return stack[-1][0] if stack else ""
