"""Build guard.cpp, the library that lets a CPU build of torch hold tensors of a simulated GPU; needs no
torch.

It is built once per version of torch and of its source, into pytest's cache folder of the project.
"""

import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import shutil
import subprocess
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
CACHE = Path(__file__).resolve().parents[2] / ".pytest_cache" / "d" / "simulated_cuda"
HEADER = "include/ATen/detail/CUDAHooksInterface.h"


def obstacle() -> str | None:
    """Return the reason why a GPU cannot be simulated here, None where it can."""
    version = importlib.metadata.version("torch")
    if shutil.which("g++") is None:
        return "simulating a GPU needs g++, which is not installed"
    if not (_torch_folder() / HEADER).is_file():
        return f"simulating a GPU needs torch's headers, and torch {version} has none"
    if (_torch_folder() / "lib" / "libtorch_cuda.so").exists():
        return f"a GPU is simulated on a CPU build of torch, and torch {version} is a build for CUDA"
    return None


def load_library() -> None:
    """Load the library, which is built where it is missing; call it before torch is imported."""
    ctypes.CDLL(str(build_library()))


def build_library() -> Path:
    """Return the built library."""
    version = importlib.metadata.version("torch")
    digest = hashlib.sha256(SOURCE.read_bytes() + f"{version} {_torch_folder()}".encode()).hexdigest()
    built = CACHE / f"guard-{digest[:16]}.so"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several pytest processes may ask at once
        if not built.exists():
            _compile(built)
    return built


def _compile(target: Path) -> None:
    torch, part = _torch_folder(), target.with_suffix(".part")
    options = ["-O1", "-std=c++20", "-shared", "-fPIC", "-w", f"-I{torch}/include", f"-L{torch}/lib"]
    libraries = ["-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch}/lib"]
    command = ["g++", *options, str(SOURCE), "-o", str(part), *libraries]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    part.rename(target)


def _torch_folder() -> Path:
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent
