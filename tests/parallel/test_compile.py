"""torch.compile under each wrapper: compiled layers compute what one uncompiled process computes.

`aot_eager` traces forward and backward as inductor does and then runs PyTorch's own kernels. Generating code
for CPU takes minutes per layout; benchmarks/parity_matrix.py does that (docs/parity.md).
"""

import math

import pytest

from dsv3.parallel.compile import has_compiler
from dsv3.planning.layout import ParallelDims
from tests.harness.pool import Pool
from tests.parallel.parity_layouts import SINGLES
from tests.parallel.tiny_training import GLOBAL_BATCH, Trace, configured, train
from tests.parallel.trace_comparison import assert_close, assert_equal, train_on

pytestmark = pytest.mark.slow

TRACED = ["compile=on", "compile.backend=aot_eager"]
# A dense layer, and an MTP depth whose layer has experts: each layer is traced by itself.
FEW = ["model.num_layers=1"]


@pytest.fixture(scope="module")
def single() -> Trace:
    trace = train(FEW, None, 2, 2)
    assert trace is not None
    return trace


@pytest.mark.parametrize(
    ("layout", "recompute"),
    [("dp_shard", "selective"), ("tp", "none"), ("cp", "full")],
)
def test_traced_layers_train_alike_under_every_wrapper(
    pool: Pool, single: Trace, layout: str, recompute: str
) -> None:
    degrees: ParallelDims = SINGLES[layout]
    microbatch = GLOBAL_BATCH // degrees.data_parallel // 2
    config = configured(["parallel=fsdp", f"recompute={recompute}", *FEW, *TRACED], microbatch)
    assert_equal(train_on(pool, config, degrees, 2, microbatch), single)


def test_traced_layers_train_alike_in_fp8_where_a_schedule_splits_the_backward_pass(pool: Pool) -> None:
    """FP8, because in fp32 compiled code would overwrite no saved activation."""
    chosen = ["precision=fp8", "model.moe.forced_balance=true"]
    plain = train(chosen, None, 1, 1)
    assert plain is not None
    config = configured([*chosen, "parallel=fsdp", "parallel.schedule=ZBVZeroBubble", *TRACED], 1)
    for traced in train_on(pool, config, SINGLES["pp"], 1, 1)[:2]:
        assert traced.metrics[0]["loss"] == pytest.approx(plain.metrics[0]["loss"], rel=1e-3)
        assert_close(traced.gradients[0], plain.gradients[0], 2.0**-5)
        assert math.isnan(traced.metrics[0]["fp8_broken_tiles"])


@pytest.mark.skipif(not has_compiler(), reason="compile=on needs a C++ compiler on CPU")
def test_compiled_code_trains_alike() -> None:
    compiled, alone = train([*FEW, "compile=on"], None, 2, 2), train(FEW, None, 2, 2)
    assert compiled is not None
    assert alone is not None
    assert_equal([compiled], alone)
