"""A device that is not the CPU, played on the CPU: for finding tensors made in the wrong place without a GPU.

`OtherDevice` is a mode in which tensors can lie on `OTHER`, whose name is that of a GPU. They are tensors in the CPU's
memory whose storage is noted down. What is asked for with `device=OTHER` or `.to(OTHER)` lies there, and so does what
is computed from it. Whatever PyTorch refuses with a GPU is refused here: an operation on tensors of both devices
(single numbers may come from the CPU), and NumPy. Stricter than PyTorch, indices have to lie where the tensor does:
from the CPU they would be copied each time.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode, resolve_name
from torch.utils._pytree import tree_leaves

OTHER = torch.device("cuda", 0)

# May read from one device and write to the other, and what modules ask before they do.
_COPIES = {
    Tensor.copy_,
    Tensor.data.__set__,
    Tensor.grad.__set__,
    torch._has_compatible_shallow_copy_type,
}
_TO_NUMPY = {Tensor.numpy, Tensor.__array__}
# Take no single number from another device.
_STRICT = {torch.cat, torch.stack, torch.where, torch.vstack, torch.hstack}


class OtherDevice(TorchFunctionMode):
    """Within it `OTHER` exists."""

    def __init__(self) -> None:
        super().__init__()
        self._there: dict[int, StorageWeakRef] = {}  # by the address of the storage
        self.calls = 0  # of operations on tensors that lie on the device

    def __enter__(self) -> OtherDevice:
        self._parse_to = torch._C._nn._parse_to

        # `module.to(tensor)` reads the tensor's device where no mode sees it.
        def parse_to(*args: Any, **kwargs: Any) -> Any:
            device, *rest = self._parse_to(*args, **kwargs)
            on_other = any(
                isinstance(value, Tensor) and self.lies_there(value) for value in args
            )
            return OTHER if on_other else device, *rest

        torch._C._nn._parse_to = parse_to
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        torch._C._nn._parse_to = self._parse_to
        super().__exit__(*error)

    def lies_there(self, x: Tensor) -> bool:
        with torch._C.DisableTorchFunction():
            if x.device.type == "meta":
                return False
            reference = self._there.get(x.untyped_storage().data_ptr())
            return reference is not None and not reference.expired()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        there = [x for x in tensors if self.lies_there(x)]
        on_other = bool(there)

        if func == Tensor.device.__get__:
            return OTHER if on_other else func(*args)
        if func in (Tensor.is_cuda.__get__, Tensor.is_cpu.__get__):
            return on_other == (func == Tensor.is_cuda.__get__)
        if func == Tensor.to or func == Tensor.cpu:
            return self._move(func, args, kwargs, on_other)
        if func in _TO_NUMPY and on_other:
            raise TypeError(f"can't convert {OTHER} device type tensor to numpy")

        # A device that is asked for decides; else the device of what goes in.
        if kwargs.get("device") is not None:
            on_other = torch.device(kwargs["device"]).type == OTHER.type
            kwargs["device"] = "cpu" if on_other else kwargs["device"]
        elif func not in _COPIES:
            self._check_same_device(func, tensors, there)
        self.calls += bool(there)

        result = func(*args, **kwargs)
        if on_other:
            self._note(result, inputs=tensors if func in _COPIES else [])
        return result

    def _move(self, func: Any, args: Any, kwargs: Any, on_other: bool) -> Tensor:
        """`x.to(…)` and `x.cpu()`: a copy where the device changes."""
        x, *rest = args
        target: torch.device | None = torch.device("cpu") if func == Tensor.cpu else None
        wanted = (
            rest.pop(0)
            if rest and not isinstance(rest[0], torch.dtype)
            else kwargs.pop("device", None)
        )
        if isinstance(wanted, Tensor):
            target = OTHER if self.lies_there(wanted) else wanted.device
            rest.insert(0, wanted.dtype)
        elif wanted is not None:
            target = torch.device(wanted)

        to_other = on_other if target is None else target.type == OTHER.type
        if target is not None and target.type == "meta":
            return x.to(target, *rest, **kwargs)
        result: Tensor = x.to("cpu", *rest, **kwargs)
        if (
            to_other != on_other
            and result.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
        ):
            result = result.clone()
        if to_other:
            self._note(result, inputs=[])
        return result

    def _check_same_device(self, func: Any, tensors: list[Tensor], there: list[Tensor]) -> None:
        here = [x for x in tensors if not self.lies_there(x) and x.numel() > 0]
        if func not in _STRICT:
            here = [x for x in here if x.dim() > 0]
        if there and here:
            shapes = ", ".join(str(tuple(x.shape)) for x in here)
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {resolve_name(func) or func} got some on {OTHER} "
                f"and some on the CPU, of shape {shapes}."
            )

    def _note(self, result: Any, inputs: list[Tensor]) -> None:
        for leaf in tree_leaves(result):
            if (
                isinstance(leaf, Tensor)
                and not any(leaf is x for x in inputs)
                and leaf.device.type != "meta"
            ):
                storage = leaf.untyped_storage()
                self._there[storage.data_ptr()] = StorageWeakRef(storage)
