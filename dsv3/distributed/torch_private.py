"""A way around a race in PyTorch's gloo process groups that now and then breaks the memory of a rank.

Each group has two threads, and after every collective both assign its name to one shared string, without a
lock (ProcessGroupGloo::runLoop, torch 2.13). Up to 15 letters stay within the string and do no harm; a longer
name lies on the heap, where two assignments at once free it twice: "malloc(): unaligned tcache chunk
detected", a segmentation fault or a hang, once in some 100,000 collectives (docs/reliability.md). The one
long name that we and DTensor send is ALLGATHER_COALESCED, of functional gathers; made otherwise the same
gather is an ALLGATHER.
"""

from functools import cache

import torch
from torch import Tensor

GATHER = "all_gather_into_tensor"


@cache
def gather_under_a_short_name() -> torch.library.Library:
    """Replace the functional gather of CPU tensors in this process; the result keeps it replaced."""
    library = torch.library.Library("_c10d_functional", "IMPL")
    library.impl(GATHER, _gather, "CPU")
    return library


def _gather(x: Tensor, size: int, name: str) -> Tensor:
    """Rows of `x` [rows, ..] of all `size` ranks of group `name`, once they have been waited for."""
    from torch._C._distributed_c10d import _register_work, _resolve_process_group

    group = _resolve_process_group(name)  # type: ignore[arg-type]
    out = x.new_empty(x.shape[0] * size, *x.shape[1:])
    _register_work(out, group._allgather_base(out, x.contiguous()))
    return out
