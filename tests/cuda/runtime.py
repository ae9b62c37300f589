"""torch.cuda on a simulated GPU: device, streams, events and memory; `install` turns the simulation on.

Streams run in order and at once, so a missing synchronization between two streams does not show.
"""

import importlib
import os
import threading
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from tests.cuda import attention, kernels
from tests.cuda.device import SimulatedTensor, SimulationMode, pin, unpin
from tests.cuda.ledger import LEDGER, MEMORY

CAPABILITY = tuple(int(n) for n in os.environ.get("SIMULATED_CAPABILITY", "9.0").split("."))
"""The compute capability; that of an H100 or H200 unless the environment names another."""

GPUS = int(os.environ.get("SIMULATED_GPUS", "8"))
"""GPUs that this process sees."""

TOTAL_MEMORY = 141 * 2**30

_current = 0


class SimulatedStream:
    """A stream; all work is done as soon as it is asked for."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", _current)
        self.stream_id = self.device_index = self.cuda_stream = 0

    def wait_stream(self, stream: Any) -> None:
        """Wait, on the device, for another stream."""

    def wait_event(self, event: Any) -> None:
        """Wait, on the device, for an event."""

    def record_event(self, event: Any = None) -> Any:
        """Return an event behind all work so far."""
        return event or SimulatedEvent()

    def synchronize(self) -> None:
        """Let the host wait."""
        LEDGER.wait("stream.synchronize")

    def query(self) -> bool:
        """Return True: all work is done."""
        return True

    def __enter__(self) -> "SimulatedStream":
        return self

    def __exit__(self, *_: object) -> None:
        return None


class SimulatedEvent:
    """An event."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def record(self, stream: Any = None) -> None:
        """Put the event behind all work so far."""

    def wait(self, stream: Any = None) -> None:
        """Wait, on the device, for the event."""

    def synchronize(self) -> None:
        """Let the host wait."""
        LEDGER.wait("event.synchronize")

    def query(self) -> bool:
        """Return True: all work is done."""
        return True

    def elapsed_time(self, end: Any) -> float:
        """Return milliseconds that mean nothing."""
        return 1.0


class _Parameters:
    """torch.backends.cuda.SDPAParams."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any, *others: Any) -> None:
        self.query, self.key, self.value, self.attn_mask = query, key, value, attn_mask
        self.is_causal = bool(others[1]) if len(others) > 1 else False


def install() -> None:
    """Simulate a GPU in this process from now on; guard.cpp has been loaded before torch."""
    _install_attention()
    kernels.register()
    cuda: Any = torch.cuda
    constants: dict[str, Any] = {
        "is_available": True,
        "is_initialized": True,
        "device_count": GPUS,
        "get_device_capability": CAPABILITY,
        "get_device_name": "NVIDIA H200 (simulated)",
        "mem_get_info": (TOTAL_MEMORY - 2**30, TOTAL_MEMORY),
        "_lazy_init": None,
        "manual_seed_all": None,
        "manual_seed": None,
        "empty_cache": None,
        "get_rng_state": None,
        "set_rng_state": None,
        "is_bf16_supported": True,
    }
    for name, answer in constants.items():
        setattr(cuda, name, lambda *_, answer=answer, **__: answer)
    cuda.set_device, cuda.current_device = set_gpu, lambda: _current
    cuda.current_stream = cuda.default_stream = SimulatedStream
    cuda.Stream, cuda.Event = SimulatedStream, SimulatedEvent
    cuda.stream = cuda.device = lambda *_: nullcontext()
    cuda.synchronize = lambda *_: LEDGER.wait("cuda.synchronize")
    cuda.memory_allocated = lambda *_: MEMORY.now
    cuda.max_memory_allocated = lambda *_: MEMORY.peak
    cuda.reset_peak_memory_stats = lambda *_: setattr(MEMORY, "peak", MEMORY.now)
    cuda.cudart = lambda: SimpleNamespace(cudaHostRegister=pin, cudaHostUnregister=unpin)
    torch.version.cuda = "13.0"
    Tensor.record_stream = lambda tensor, stream: None  # type: ignore[method-assign, assignment]
    torch._C._set_only_lift_cpu_tensors(True)
    if torch.distributed.is_available():
        _install_fsdp()
    SimulationMode().__enter__()  # type: ignore[no-untyped-call]
    _install_in_threads()


def _install_in_threads() -> None:
    """Simulate in every thread that starts from now on: a mode of PyTorch's is that of one thread."""
    run = threading.Thread.run

    def run_simulated(thread: threading.Thread) -> None:
        with SimulationMode():  # type: ignore[no-untyped-call]
            run(thread)

    threading.Thread.run = run_simulated  # type: ignore[method-assign, assignment]


def set_gpu(device: Any) -> None:
    """Make a GPU the current one of this process; RuntimeError where there is none of that number."""
    global _current
    index = device if isinstance(device, int) else torch.device(device).index or 0
    if index >= GPUS:
        raise RuntimeError(f"CUDA error: invalid device ordinal: {index} of {GPUS}")
    _current = index


def _install_attention() -> None:
    """Answer PyTorch's questions about attention before torch.nn.attention.bias copies the functions."""
    backends: Any = torch.backends.cuda
    backends.is_flash_attention_available = lambda: True
    backends.SDPAParams = _Parameters
    for name in ("cudnn", "flash", "efficient"):
        answer = getattr(attention, f"can_use_{name}")
        setattr(
            backends,
            f"can_use_{name}_attention",
            lambda p, debug=False, answer=answer: answer(p.query, p.key, p.value, p.attn_mask, p.is_causal),
        )
    attention.register()
    importlib.import_module(
        "torch.nn.attention.varlen"
    )  # defines the operators that attention.py substitutes
    # A mask that is a tensor subclass without values is made outside of the mode, which would take it for a
    # tensor.
    bias: Any = importlib.import_module("torch.nn.attention.bias")
    make = bias.CausalBias.__new__

    def make_outside(kind: type[Tensor], *arguments: Any, **options: Any) -> Tensor:
        with _disable_current_modes():
            made: Tensor = make(kind, *arguments, **options)
            return made

    bias.CausalBias.__new__ = staticmethod(make_outside)


def _install_fsdp() -> None:
    """FSDP frees and takes the storage of gathered weights: that of the numbers, here."""
    from torch.distributed.fsdp._fully_shard import _fsdp_param, _fsdp_param_group

    def held(tensor: Tensor) -> Tensor:
        return tensor.inner if isinstance(tensor, SimulatedTensor) else tensor

    def free(tensor: Tensor) -> None:
        if held(tensor).untyped_storage().size():
            held(tensor).untyped_storage().resize_(0)

    def allocate(tensor: Tensor) -> None:
        size = held(tensor).numel() * tensor.itemsize
        if held(tensor).untyped_storage().size() != size:
            held(tensor).untyped_storage().resize_(size)

    # _fsdp_param_group has a name of its own for the second.
    _fsdp_param.free_storage, _fsdp_param.alloc_storage = free, allocate
    _fsdp_param_group.alloc_storage = allocate  # type: ignore[attr-defined]
