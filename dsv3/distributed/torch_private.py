"""Call the private APIs of PyTorch: every use in dsv3 goes through a function of this file.

Each function says why no public API does, and its block the versions that it was seen to work with. After an
update of torch, this file is the one to check. It imports `torch` alone at module level; torch.distributed
comes with the functions that need it.
"""

from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

if TYPE_CHECKING:
    from torch.autograd.graph import Node
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

T = TypeVar("T", bound=Tensor)

# Tensors and operators. torch 2.13 on CPU.

DispatchMode = TorchDispatchMode
"""Base of a mode that sees every operator call; torch has no public one."""


def map_tensors(kind: type[Tensor], function: Callable[[Any], Any], tree: Any) -> Any:
    """Return nested tuples, lists and dicts with `function` applied to each tensor of class `kind`.

    torch's trees are private; operators take and return these nestings.
    """
    from torch.utils._pytree import tree_map_only

    return tree_map_only(kind, function, tree)


def make_wrapper_tensor(kind: type[T], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> T:
    """Return a tensor of the subclass `kind` without storage: other tensors that it holds have the values.

    The documented way to write a tensor subclass, under a private name.
    """
    made: T = torch.Tensor._make_wrapper_subclass(kind, shape, dtype=dtype, device=device)
    return made


def view_base(x: Tensor) -> Tensor | None:
    """Return the tensor that `x` is a view of, None where it is none; the attribute is documented nowhere."""
    return x._base


def writes_arguments(operator: torch._ops.OpOverload) -> bool:
    """Return True where an operator changes an argument in place; only its private schema says so."""
    return operator._schema.is_mutable


def backward_reaches(node: "Node") -> bool:
    """Return True where the backward pass that runs goes on to `node`; a public API is missing.

    Call it within a backward function. RuntimeError for a leaf that torch.autograd.grad was given.
    """
    return torch._C._will_engine_execute_node(node)


def keep_saved_tensors_when_compiled() -> None:
    """Let a compiled backward pass run in two parts, for inputs and for weights, as some schedules split it.

    With donated buffers the first part would overwrite what the second one needs, and PyTorch refuses to run
    it twice. The switch is private, and holds for the process.
    """
    torch._functorch.config.donated_buffer = False


# Multi-tensor kernels: one launch for many tensors, as torch.optim uses. Public only within optimizers and
# clip_grad_norm_, which knows no tensors of several meshes. torch 2.13 on CPU.


def foreach_add_(tensors: list[Tensor], value: float) -> None:
    """Add `value` to each tensor in place."""
    torch._foreach_add_(tensors, value)


def foreach_subtract_(tensors: list[Tensor], others: list[Tensor]) -> None:
    """Subtract from each tensor the other of the same place, in place.

    A scalar tensor for all of them would be read by the host.
    """
    torch._foreach_sub_(tensors, others)


def foreach_mul_(tensors: list[Tensor], factor: Tensor) -> None:
    """Multiply each tensor by a scalar tensor in place."""
    torch._foreach_mul_(tensors, factor)


def foreach_copy_(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy each source into the target of the same place, with a cast where the dtypes differ."""
    torch._foreach_copy_(targets, sources)


def takes_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether `step` leaves parameters and state as they are where the optimizer's `found_inf` is 1.

    GradScaler asks this private attribute, which the fused optimizers set, before it sets `found_inf`.
    """
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def foreach_norm(tensors: list[Tensor]) -> tuple[Tensor, ...]:
    """Return the 2-norm of each tensor as a scalar."""
    return torch._foreach_norm(tensors)


# Attention on CUDA. torch 2.13, shapes on meta tensors; not yet run on a GPU.


def cudnn_attention(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor | None, ...]]:
    """Attend by cuDNN: (output, log-sum-exp [B, H, queries, 1] fp32, further tensors for the backward pass).

    Shapes [B, H, tokens, head dim]. scaled_dot_product_attention is public, but has no log-sum-exp, without
    which two results cannot be merged; PyTorch's ring attention calls the same operator.
    """
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q, k, v, None, True, 0.0, causal, False, scale=scale
    )
    return found[0], found[1], (found[6], found[7])


def cudnn_attention_backward(
    gradient: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    log_sum: Tensor,
    state: tuple[Tensor | None, ...],
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v; `state` is what cudnn_attention returned last."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        gradient, q, k, v, out, log_sum.contiguous(), *state, None, None, None,
        q.shape[2], k.shape[2], 0.0, causal, scale=scale,
    )  # fmt: skip
    return found


# CUDA's allocator. torch 2.13, not yet run on a GPU.


def record_memory_history(events: int | None) -> None:
    """Record the last `events` allocations of CUDA memory with their stacks; None ends the recording.

    Documented, under a private name. Without a limit the record grows for ever.
    """
    if events is None:
        torch.cuda.memory._record_memory_history(enabled=None)
    else:
        torch.cuda.memory._record_memory_history(max_entries=events, stacks="python")


def write_memory_snapshot(path: str) -> None:
    """Write the recorded allocations to `path`, a pickle that pytorch.org/memory_viz shows."""
    torch.cuda.memory._dump_snapshot(path)


# Device meshes and DTensors. torch 2.13 with gloo.


def unflatten_mesh(mesh: "DeviceMesh", axes: Mapping[str, int]) -> "DeviceMesh":
    """Return a mesh of one axis cut into `axes`, names with sizes, the first the outermost.

    All results have one root, as FSDP2 wants it of meshes that it combines; meshes made by the public
    init_device_mesh are roots of their own.
    """
    return mesh._unflatten(0, tuple(axes.values()), tuple(axes))


def connect_to_store(name: str) -> Any:
    """Return the store in which the ranks of the default process group have met, by another connection.

    gloo and NCCL wait for one another in their connection, and whoever shares it waits too. Keys begin with
    `name`. No public name leads to the store.
    """
    from torch.distributed.distributed_c10d import PrefixStore, _get_default_store

    store: Any = _get_default_store()
    return PrefixStore(name, store.clone())


def group_timeouts() -> dict[str, timedelta]:
    """Return by name and description the timeout of every process group of this rank, however it was made."""
    from torch.distributed.distributed_c10d import _world

    return {
        f"{group.group_name} {group.group_desc}": group._get_backend(device).options._timeout
        for group in _world.pg_map
        for device in group._device_types
    }


def set_group_timeouts(timeout: timedelta, besides: str) -> None:
    """Set the timeout of every process group of this rank but those that are described as `besides`.

    A DeviceMesh gives its groups the default of their backend (30 minutes, NCCL 10), whatever
    init_process_group was told, and DTensor and FSDP make groups of their own. Only private names list all
    groups, and set_timeout of a group is undocumented. A fake group has no timeout.
    """
    from torch.distributed.distributed_c10d import _set_pg_timeout, _world

    for group in list(_world.pg_map):
        if group.group_desc != besides and "fake" not in _world.pg_map[group][0]:
            _set_pg_timeout(timeout, group)


def local_shape_and_offset(tensor: "DTensor") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return shape and global offset of this rank's shard; the public API has neither for strided shards."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    return compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)


def local_shard(tensor: "DTensor") -> Tensor:
    """Return the very tensor that a DTensor holds; the public to_local() gives a view of it.

    FSDP2 looks for its extension functions on this object.
    """
    return tensor._local_tensor


# Collectives. torch 2.13 with gloo.

COLLECTIVES = torch.ops._c10d_functional
"""The operators behind torch.distributed's functional collectives.

They run on gloo and NCCL, are traced by torch.compile and seen by dispatch modes. The public functions have
no gradient, or wait at once.
"""

GATHER = "all_gather_into_tensor"


@cache
def shorten_gather_name() -> torch.library.Library:
    """Replace the functional all-gather of CPU tensors in this process; the result keeps it replaced.

    Avoids a race of PyTorch's gloo process groups that now and then breaks the memory of a rank. Each group
    has two threads, and after every collective both assign its name to one shared string, without a lock
    (ProcessGroupGloo::runLoop, torch 2.13). Up to 15 letters stay within the string and do no harm. A longer
    name lies on the heap, where two assignments at once free it twice: "malloc(): unaligned tcache chunk
    detected", a segmentation fault or a hang, once in some 100,000 collectives (docs/reliability.md). The one
    long name that we and DTensor send is ALLGATHER_COALESCED, of functional gathers; made otherwise the same
    gather is an ALLGATHER.
    """
    library = torch.library.Library("_c10d_functional", "IMPL")
    library.impl(GATHER, _gather, "CPU")
    return library


def _gather(x: Tensor, size: int, name: str) -> Tensor:
    """Return the rows of `x` [rows, ..] of all `size` ranks of group `name`, to be waited for."""
    from torch._C._distributed_c10d import _register_work, _resolve_process_group

    group = _resolve_process_group(name)  # type: ignore[arg-type]
    out = x.new_empty(x.shape[0] * size, *x.shape[1:])
    _register_work(out, group._allgather_base(out, x.contiguous()))
    return out


def wrap_waits(
    wrap: Callable[[Callable[..., Any]], Callable[..., Any]], functional: bool
) -> Callable[[], None]:
    """Replace the functions in which Python waits for a collective by `wrap` of them; return what undoes it.

    With `functional` those of the functional collectives too: code that torch.compile traces must not meet
    a wrapper there. No public hook tells of waits on gloo.
    """
    from torch._C._distributed_c10d import Work

    wait, wait_tensor = Work.wait, COLLECTIVES.wait_tensor
    Work.wait = wrap(wait)  # type: ignore[method-assign]
    if functional:
        COLLECTIVES.wait_tensor = wrap(wait_tensor)  # type: ignore[attr-defined]

    def undo() -> None:
        Work.wait = wait  # type: ignore[method-assign]
        COLLECTIVES.wait_tensor = wait_tensor  # type: ignore[attr-defined]

    return undo


def nccl_trace() -> bytes:
    """Return the collectives that NCCL's flight recorder remembers, a pickle; not every build records."""
    from torch._C import _distributed_c10d

    trace: bytes = _distributed_c10d._dump_nccl_trace()  # type: ignore[attr-defined]
    return trace


# Files of torch.distributed.checkpoint and torch.save. torch 2.13.


def chunk_location(file: str, offset: int, length: int) -> Any:
    """Return the entry of a DCP's metadata that says where a chunk lies: file name, byte offset and length.

    torch.distributed.checkpoint has no public class for it, and its reader wants this one.
    """
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    return _StorageInfo(file, offset, length)


def locate_saved_tensor(file: BinaryIO) -> tuple[Tensor, int]:
    """Return a tensor without its values and the byte offset of its storage, from an archive of torch.save.

    torch.load unpacks an archive to say where a storage begins; in fake mode it reads none and remembers it.
    """
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        stored = torch.load(file, weights_only=True)
        return stored, stored.untyped_storage()._checkpoint_offset
