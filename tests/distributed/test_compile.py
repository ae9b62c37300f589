"""torch.compile with each wrapper: what is traced computes what one process computes, uncompiled.

`aot_eager` traces forward and backward as inductor does and then runs PyTorch's own kernels; code for CPU
takes minutes a layout, which benchmarks/parity_matrix.py spends (docs/parity.md).
"""

import pytest

from dsv3.parallel.compile import has_compiler
from dsv3.parallel.degrees import Degrees
from tests.distributed.comparing import assert_equal
from tests.distributed.layouts import SINGLES
from tests.distributed.pool import Pool
from tests.distributed.training import GLOBAL_BATCH, Trace, configured, train, train_config

TRACED = ["compile=on", "compile.backend=aot_eager"]


@pytest.fixture(scope="module")
def single() -> Trace:
    trace = train([], None, 2, 2)
    assert trace is not None
    return trace


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [("dp_shard", "selective"), ("tp", "none"), ("cp", "full"), ("pp", "none")],
)
def test_traced_layers_train_alike_under_every_wrapper(
    pool: Pool, single: Trace, layout: str, recompute: str
) -> None:
    degrees: Degrees = SINGLES[layout]
    microbatch = GLOBAL_BATCH // degrees.data_parallel // 2
    config = configured(["parallel=fsdp", f"recompute={recompute}", *TRACED], microbatch)
    assert_equal(pool.run(train_config, config, degrees, 2, microbatch, "sgd"), single)


@pytest.mark.skipif(not has_compiler(), reason="compile=on needs a C++ compiler on CPU")
def test_compiled_code_trains_alike() -> None:
    """Of two layers, one dense and one with experts: each other layer would be compiled anew."""
    few = ["model.num_layers=2", "model.mtp_depths=0"]
    compiled, alone = train([*few, "compile=on"], None, 2, 2), train(few, None, 2, 2)
    assert compiled is not None
    assert alone is not None
    assert_equal([compiled], alone)
