"""Which classes a config may name: a stored config is data and must not choose what runs."""

import importlib
import inspect
from collections.abc import Sequence

from dsv3.runtime.errors import UserError

TRUSTED = ("dsv3", "torch.optim")


def check_target(target: str, key: str, allow: Sequence[str] = (), settings: Sequence[str] = ()) -> None:
    """Raise UserError unless `target` names a class of a trusted module that takes all `settings`.

    Two steps, because a dotted path may leave its package through an import (`dsv3.x.os.system`):
    the path must be module.Class with the module inside a trusted package, and the class must have
    been defined in a trusted package.
    """
    trusted = (*TRUSTED, *allow)
    module, _, name = target.rpartition(".")
    if not _inside(module, trusted) or not name.isidentifier():
        raise UserError(
            f"{key}={target} is refused: only classes of {', '.join(trusted)} are built; "
            "to allow another module, type run.allow_targets=[module] on the command line"
        )
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        raise UserError(f"{key}={target} does not exist: name a class as package.module.Class") from None
    if not isinstance(found, type) or not _inside(found.__module__, trusted):
        raise UserError(f"{key}={target} is refused: it is not a class that {', '.join(trusted)} defines")
    refused = [name for name in settings if not _takes(found, name)]
    if refused:
        raise UserError(f"{key}={target} is not possible: it takes no {', '.join(refused)}")


def _takes(kind: type, name: str) -> bool:
    try:
        taken = inspect.signature(kind).parameters
    except ValueError:  # a class written in C may not say
        return True
    return name in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())


def _inside(module: str, packages: Sequence[str]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)
