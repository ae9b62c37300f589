"""Tensors of a simulated GPU: they say they are on `cuda` and hold their numbers on the CPU.

A dispatch mode sees every operator. It runs those on simulated tensors on the numbers that they hold, refuses
what CUDA refuses, and notes in the ledger what CUDA would wait for and launch:
- tensors of two devices in one operator, apart from copies and CPU scalars;
- operators that bring a result to the host (`item`, `nonzero`, ..), and copies that block;
- operators that have no deterministic kernel, where deterministic ones are demanded;
- operands that a kernel does not take (kernels.py).
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from tests.cuda.ledger import LEDGER, MEMORY

SUBSTITUTES: dict[str, Callable[..., Any]] = {}
"""Operators without a CPU kernel, by name; they take and return simulated tensors."""

CHECKS: dict[str, Callable[..., None]] = {}
"""What CUDA's kernels refuse and CPU's take, by operator; called with its arguments."""

MIXED = {"copy_", "_to_copy", "_foreach_copy_", "set_", "index", "index_put_", "_index_put_impl_"}
"""Operators that take tensors of several devices."""

WAITS = {
    "_local_scalar_dense": ("item", 1),
    "bincount": ("bincount", 2),
    "nonzero": ("nonzero", 1),
    "masked_select": ("masked_select", 1),
    "_unique2": ("unique", 1),
    "unique_dim": ("unique", 1),
    "unique_consecutive": ("unique", 1),
    "equal": ("equal", 1),
}
"""Operators that wait for their result: what they are called in the ledger, and how often they wait."""

NOT_DETERMINISTIC = {"cumsum": "cumsum_cuda_kernel", "histc": "_histc_cuda", "put_": "put_"}
"""Operators without a deterministic kernel on CUDA for floating point, by torch's name in the error."""

NO_KERNEL = {
    "view", "detach", "alias", "t", "transpose", "slice", "select", "expand", "unsqueeze", "squeeze",
    "as_strided", "permute", "split", "split_with_sizes", "unbind", "_unsafe_view", "_reshape_alias", "chunk",
    "unfold", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided", "lift_fresh",
    "is_same_size", "is_pinned",
}  # fmt: skip
"""Operators that launch nothing: views and allocations."""

_pinned: dict[int, int] = {}
"""Bytes of pinned memory by address."""


class CUDARefuses(RuntimeError):
    """An operator that a real GPU would refuse."""


class SimulatedTensor(Tensor):
    """A tensor on a simulated GPU; `inner` has its values."""

    inner: Any  # a Tensor; torch has a method of the name

    @staticmethod
    def __new__(cls, inner: Tensor, index: int = 0) -> "SimulatedTensor":
        """Wrap a CPU tensor as one of GPU number `index`."""
        made: SimulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(),
            dtype=inner.dtype, layout=inner.layout, device=torch.device("cuda", index),
        )  # fmt: skip
        made.inner = inner
        MEMORY.add(inner.untyped_storage())
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"SimulatedTensor({list(self.shape)}, {self.dtype}, {self.device})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return SimulatedTensor, (self.inner, self.device.index)

    def data_ptr(self) -> int:
        """Return the address of the values."""
        return int(self.inner.data_ptr())

    def tolist(self) -> Any:
        """Return the values as Python numbers, for which the host waits."""
        LEDGER.wait("tolist")
        return self.inner.tolist()

    def numpy(self, **_: Any) -> Any:
        """Refuse, as a GPU tensor does."""
        raise TypeError(f"can't convert {self.device} device type tensor to numpy")

    def __tensor_flatten__(self) -> tuple[list[str], int]:
        return ["inner"], self.device.index

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], index: int, outer_size: Any, outer_stride: Any
    ) -> "SimulatedTensor":
        return SimulatedTensor(inner["inner"], index)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(func, args, kwargs or {})


class SimulationMode(TorchDispatchMode):
    """The mode that sees operators which make tensors on a GPU from nothing or from CPU tensors."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **(kwargs or {}))  # DTensor asks for the shape of a result, with fake tensors
        return run(func, args, kwargs or {})


def values(tree: Any) -> Any:
    """Return nested arguments with the CPU tensors that simulated ones hold."""
    return pytree.tree_map_only(SimulatedTensor, lambda tensor: tensor.inner, tree)


def run(func: Any, args: Any, kwargs: Any) -> Any:
    """Run an operator as a GPU would: on simulated tensors if it has some, or is to make one."""
    name = func._schema.name.split("::")[-1]
    tensors = [x for x in pytree.arg_tree_leaves(*args, **kwargs) if isinstance(x, Tensor)]
    simulated = [x for x in tensors if isinstance(x, SimulatedTensor)]
    if any(type(x) not in (Tensor, torch.nn.Parameter, SimulatedTensor) for x in tensors):
        return NotImplemented  # DTensor and other subclasses come back with what they hold
    asked = kwargs.get("device")
    asked = None if asked is None else torch.device(asked)
    if name in ("_pin_memory", "is_pinned") or kwargs.get("pin_memory"):
        return _run_pinned(func, name, args, kwargs)
    to_cuda = asked is not None and asked.type == "cuda"
    if not simulated and not to_cuda:
        return func(*args, **kwargs)
    if func.namespace == "dsv3":  # an operator of this project: its body decides
        from torch._library.custom_ops import OPDEFS

        with SimulationMode():  # type: ignore[no-untyped-call]
            return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
    index = _device_index(name, asked if to_cuda else None, simulated)
    _require_one_device(name, tensors, simulated)
    if name not in NO_KERNEL:
        LEDGER.launches[name] += 1
    if name in SUBSTITUTES:
        return SUBSTITUTES[name](*args, **kwargs)
    _note_waits(name, args, kwargs, asked)
    if name in CHECKS:
        CHECKS[name](*args, **kwargs)
    _require_deterministic(name, simulated)
    return _compute(func, args, kwargs, simulated, index, asked)


def _compute(func: Any, args: Any, kwargs: Any, simulated: list[Any], index: int, asked: Any) -> Any:
    """Compute on the numbers, and wrap results that a GPU would hold."""
    plain_args, plain_kwargs = values((args, kwargs))
    if asked is not None and asked.type == "cuda":
        plain_kwargs = {**plain_kwargs, "device": torch.device("cpu")}
    out = func(*plain_args, **plain_kwargs)
    if func.namespace in ("c10d", "_c10d_functional"):
        # A collective that writes to its arguments returns them.
        given = {id(tensor.inner): tensor for tensor in simulated}
        return pytree.tree_map_only(
            Tensor, lambda t: given[id(t)] if id(t) in given else SimulatedTensor(t, index), out
        )
    if asked is not None and asked.type != "cuda":
        return out
    out = pytree.tree_map_only(Tensor, lambda t: SimulatedTensor(t, index), out)
    return return_and_correct_aliasing(func, args, kwargs, out) if simulated else out


def _device_index(name: str, asked: torch.device | None, simulated: list[SimulatedTensor]) -> int:
    """Return the number of the result's GPU: the one asked for, that of the arguments, or the current."""
    if asked is not None and asked.index is not None:
        return asked.index
    found = {tensor.device.index for tensor in simulated}
    if len(found) > 1 and name not in MIXED:
        raise CUDARefuses(f"{name} got tensors on the GPUs {sorted(found)}")
    return min(found) if found and asked is None else torch.cuda.current_device()


def _require_one_device(name: str, tensors: list[Tensor], simulated: list[SimulatedTensor]) -> None:
    if not simulated or name in MIXED:
        return
    for tensor in tensors:
        if not isinstance(tensor, SimulatedTensor) and tensor.dim() > 0 and tensor.device.type == "cpu":
            raise CUDARefuses(
                "Expected all tensors to be on the same device, but found at least two devices, cuda and "
                f"cpu: {name} got a CPU tensor of shape {list(tensor.shape)}"
            )


def _require_deterministic(name: str, simulated: list[SimulatedTensor]) -> None:
    if name not in NOT_DETERMINISTIC or not torch.are_deterministic_algorithms_enabled():
        return
    if any(tensor.is_floating_point() for tensor in simulated):
        raise CUDARefuses(f"{NOT_DETERMINISTIC[name]} does not have a deterministic implementation")


def _note_waits(name: str, args: Any, kwargs: Any, asked: torch.device | None) -> None:
    """Note what makes the host wait: results that it reads, and copies that block."""
    if name in WAITS:
        LEDGER.wait(*WAITS[name])
    elif name == "repeat_interleave" and isinstance(args[-1], Tensor) and kwargs.get("output_size") is None:
        LEDGER.wait("repeat_interleave")
    elif name in ("index", "index_put_", "_index_put_impl_"):
        for index in args[1]:
            if index is not None and index.dtype in (torch.bool, torch.uint8):
                LEDGER.wait("index by a mask")
            if index is not None and not isinstance(index, SimulatedTensor):
                LEDGER.wait("upload of an index")
    elif name == "where":
        # torch.where copies a scalar, which is a CPU tensor here, to the GPU; masked_fill does not.
        for operand in args[1:]:
            if isinstance(operand, Tensor) and not isinstance(operand, SimulatedTensor):
                LEDGER.wait("upload of a scalar")
    elif name == "_to_copy" and asked is not None:
        _note_copy(args[0], asked.type == "cuda", bool(kwargs.get("non_blocking")))
    elif name == "copy_":
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        _note_copy(args[1], isinstance(args[0], SimulatedTensor), bool(non_blocking), args[0])
    elif name == "_foreach_copy_":
        non_blocking = args[2] if len(args) > 2 else kwargs.get("non_blocking", False)
        for target, source in zip(args[0], args[1], strict=True):
            _note_copy(source, isinstance(target, SimulatedTensor), bool(non_blocking), target)


def _note_copy(source: Tensor, to_cuda: bool, non_blocking: bool, target: Tensor | None = None) -> None:
    from_cuda = isinstance(source, SimulatedTensor)
    if from_cuda == to_cuda or source.device.type == "meta":
        return
    kind = "download" if from_cuda else "upload"
    on_host = target if from_cuda else source
    if not non_blocking:
        LEDGER.wait(kind)
    elif on_host is not None and not is_pinned(on_host):
        LEDGER.wait(f"{kind} with memory that is not pinned")


def is_pinned(tensor: Tensor) -> bool:
    """Return True for a CPU tensor whose memory was asked for as pinned."""
    address = tensor.data_ptr()
    return any(begin <= address < begin + size for begin, size in list(_pinned.items()))


def pin(address: int, size: int, flags: int = 0) -> int:
    """Stand in for cudaHostRegister."""
    _pinned[address] = size
    return 0


def unpin(address: int) -> int:
    """Stand in for cudaHostUnregister."""
    del _pinned[address]
    return 0


def _run_pinned(func: Any, name: str, args: Any, kwargs: Any) -> Any:
    """Make pinned memory, or tell if memory is pinned; a CPU build of torch has none."""
    if name == "is_pinned":
        return not isinstance(args[0], SimulatedTensor) and is_pinned(args[0])
    if name == "_pin_memory":
        pinned = args[0].clone()
    else:
        plain_args, plain_kwargs = values((args, {**kwargs, "pin_memory": False}))
        pinned = func(*plain_args, **plain_kwargs)
    storage = pinned.untyped_storage()
    pin(storage.data_ptr(), storage.nbytes())
    weakref.finalize(storage, _pinned.pop, storage.data_ptr(), None)
    return pinned
