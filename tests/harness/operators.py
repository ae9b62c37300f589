"""Count PyTorch's operators while something runs."""

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Counter of operators by name without namespace, also of those that compiled code calls."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return True, so that compiled functions are run under this mode instead of traced."""
        return True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        self.names[name] += 1
        self.saw(name, args, result)
        return result

    def saw(self, name: str, args: Any, result: Any) -> None:
        """Look at an operator that has run; a subclass may want to know more than its name."""
