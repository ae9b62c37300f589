"""Counts PyTorch's operators while something runs."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """How often each operator ran, by its name without namespace; those that compiled code calls too."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Whether compiled functions are run, not traced, under this mode."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names[name] += 1
        self.saw(name, args, result)
        return result

    def saw(self, name: str, args: Any, result: Any) -> None:
        """Called after each operator, for those who want to know more."""
