"""Private APIs of PyTorch are called from dsv3/distributed/torch_private.py alone; its functional gather."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dsv3
from tests.harness.pool import Pool
from tests.parallel.worker_all_gather import gather, parts

PACKAGE = Path(dsv3.__file__).parent
ALLOWED = "distributed/torch_private.py"
OURS = ("self", "cls", "os", "sys")
"""Names whose private attributes are not torch's, such as `os._exit` and `sys._current_frames`."""
PUBLIC = ("_replace", "_make", "_asdict", "_fields", "_target_")
"""Attributes of named tuples and of configs, which are no private ones."""


def private_uses(source: str) -> Iterator[str]:
    """Yield the imports and attributes in `source` that are private to torch, or may be."""
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.startswith("torch.") and any(part.startswith("_") for part in name.split(".")):
                yield name
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.endswith("__"):
            is_ours = isinstance(node.value, ast.Name) and node.value.id in OURS
            if not is_ours and node.attr not in PUBLIC:
                yield ast.unparse(node)


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_one_file_alone_uses_private_apis_of_torch(path: Path) -> None:
    found = list(private_uses(path.read_text()))
    assert bool(found) is (str(path.relative_to(PACKAGE)) == ALLOWED), found


@pytest.mark.parametrize(
    "line",
    [
        "from torch._subclasses import FakeTensorMode",
        "from torch.utils import _pytree",
        "import torch._dynamo",
        "torch._foreach_add_(steps, 1)",
        "torch._functorch.config.donated_buffer = False",
        "mesh._unflatten(0, (2,), ('tp',))",
        "torch.cuda.memory._dump_snapshot(path)",
        "OPS = torch.ops._c10d_functional",
    ],
)
def test_a_private_use_is_seen(line: str) -> None:
    assert list(private_uses(line))


def test_the_file_imports_no_part_of_torch_distributed_until_it_is_needed() -> None:
    tree = ast.parse((PACKAGE / ALLOWED).read_text())
    modules = [node.module or "" for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert not [module for module in modules if module.startswith(("torch.distributed", "torch._C"))]


def test_commands_that_plan_and_launch_do_without_torch() -> None:
    modules = "dsv3.cli.application, dsv3.programs, dsv3.planning.plan, dsv3.distributed.watchdog"
    program = f"import sys, {modules}; print('torch' in sys.modules)"
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=PACKAGE.parent, check=True
    )
    assert run.stdout == "False\n"


def test_a_functional_gather_is_the_groups_own_and_gives_every_ranks_rows(pool: Pool) -> None:
    expected = [torch.cat(of_ranks) for of_ranks in zip(*map(parts, range(8)), strict=True)]
    for found, calls in pool.run(gather):
        assert calls == len(expected)
        for mine, right in zip(found, expected, strict=True):
            assert mine.dtype is right.dtype
            assert torch.equal(mine, right)
