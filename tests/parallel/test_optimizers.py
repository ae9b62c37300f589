"""Every optimizer on every kind of sharding: the steps of one process, and its state through checkpoints."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dsv3.config.optimizer import OptimizerConfig, RMSpropConfig, SGDConfig
from dsv3.config.precision import MomentType
from dsv3.config.registry import SCHEMAS
from dsv3.planning.layout import ParallelDims
from dsv3.planning.parameter_groups import is_frozen
from dsv3.planning.parameters import every_weight
from dsv3.planning.plan import state_bytes
from dsv3.planning.sharding import shard_shape
from tests.harness.pool import Pool
from tests.parallel.tiny_training import GLOBAL_BATCH, Trace, configured, train
from tests.parallel.trace_comparison import assert_close, assert_equal, train_on
from tests.parallel.worker_optimizers import Compared, State, compare_steps, state_sizes, take_steps

# Fewer experts than shards, so that they are sliced, and a matrix of 20 rows, which 8 ranks cut unevenly.
FEW = [
    *["precision=fp32", "model.num_layers=2", "model.mtp_depths=0", "model.moe.num_experts=4"],
    *["model.moe.num_groups=1", "model.moe.top_k_groups=1", "model.attention.qk_rope_head_dim=4"],
]
FSDP, HSDP = ParallelDims(dp_shard=8), ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=2)
# Optimizers whose step needs other ranks.
OF_MATRICES = ("muon", "adafactor")
EXACT = 1e-6


def every_optimizer() -> dict[str, OptimizerConfig]:
    """Each choice of the group, with decay where it has any, and the choices with more state."""
    chosen: dict[str, OptimizerConfig] = {}
    for name, node in SCHEMAS.items():
        group, _, choice = name.partition("/")
        if group == "optimizer":
            changes: dict[str, Any] = {"lr_scale": {"embedding.*": 0.5}}
            if "weight_decay" in {f.name for f in fields(node)}:
                changes |= {"weight_decay": 0.1, "no_decay": ["*norm.weight", "embedding.*"]}
            chosen[choice] = replace(node(), **changes)
    chosen["sgd, momentum"] = SGDConfig(momentum=0.9, nesterov=True)
    chosen["rmsprop, all"] = RMSpropConfig(momentum=0.9, centered=True)
    return chosen


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """Files of one process's tensors after two steps and after a third, and its checkpoint between them."""
    folder = tmp_path_factory.mktemp("single")
    config = configured(["parallel=none", *FEW], 2)
    for name, resumes in (("two", False), ("three", True)):
        torch.save(take_steps(config, None, every_optimizer(), folder / "run", resumes), folder / name)
    return folder / "two", folder / "three", folder / "run"


# One of each kind of state goes on to every other axis: elementwise moments, a counter per tensor, sums over
# matrices, none. All of them step on shards of every kind.
OF_EVERY_KIND = (*OF_MATRICES, "adamw", "asgd", "sgd", "sgd, momentum")


def differences(ranks: list[Compared]) -> list[tuple[str, float]]:
    """Return the tensors, with their errors, that differ from one process's."""
    return sorted({item for rank in ranks for item in rank.errors.items() if not item[1] < EXACT})


def planned_sizes(chosen: dict[str, OptimizerConfig], degrees: ParallelDims) -> dict[str, int]:
    """Return the planned bytes of state on the first rank, of the optimizers that have any."""
    model = configured(["parallel=none", *FEW], 2).model
    states = {name: state_bytes(node, MomentType.fp32, 4) for name, node in chosen.items()}
    sizes = {
        name: sum(state.optimizer_bytes(w, shard_shape(w, degrees)) for w in every_weight(model))
        for name, state in states.items()
    }
    return {name: size for name, size in sizes.items() if size}


def test_every_optimizer_steps_as_one_process_does_and_goes_on_on_other_layouts(
    pool: Pool, single: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    """One process, a layout of shards and one of every other axis take up what another has saved."""
    chosen, (two, three, _) = every_optimizer(), single
    some = {name: chosen[name] for name in OF_EVERY_KIND}
    fsdp, hsdp = (configured(["parallel=fsdp", *FEW], microbatch) for microbatch in (1, 2))
    for config, degrees, taken, expected, resumes in (
        (fsdp, FSDP, chosen, two, False),
        (hsdp, HSDP, some, three, True),
    ):
        ranks = pool.run(compare_steps, config, degrees, taken, tmp_path, expected, resumes)
        assert differences(ranks) == []
        assert ranks[0].sizes == planned_sizes(taken, degrees)
    alone = take_steps(configured(["parallel=none", *FEW], 2), None, chosen, tmp_path, resumes=True)
    right: State = torch.load(three)
    assert alone.keys() == right.keys()
    assert_close(alone, right, EXACT)


@pytest.mark.parametrize(
    "degrees", [ParallelDims(dp_shard=4, tp=2), ParallelDims(pp=2, cp=2, tp=2, ep=2)], ids=str
)
def test_what_goes_over_whole_matrices_is_that_of_one_process_on_every_axis(
    pool: Pool, single: tuple[Path, Path, Path], degrees: ParallelDims
) -> None:
    chosen = {name: node for name, node in every_optimizer().items() if name in OF_MATRICES}
    config = configured(["parallel=fsdp", *FEW], 2)
    assert differences(pool.run(compare_steps, config, degrees, chosen, None, single[0])) == []


GROUPS = [
    *[
        "precision=fp32",
        "optimizer=muon",
        "optimizer.no_decay=[*norm.weight,head.*]",
        "+optimizer.lr_scale={head.*:0.5}",
    ],
    "optimizer.frozen=[embedding.*,layers.0.*,layers.1.*,layers.2.ffn.router.*,mtp.*.experts.*]",
]


@pytest.fixture(scope="module")
def grouped() -> Trace:
    """The trace of one process with parameter groups and frozen parts."""
    trace = train(GROUPS, None, 3, 2, "configured")
    assert trace is not None
    return trace


@pytest.mark.parametrize(
    ("degrees", "overrides"),
    [
        (ParallelDims(dp_shard=2, cp=2, tp=2, ep=4), ["recompute=selective"]),
        (ParallelDims(dp_replicate=2, dp_shard=2, tp=2, ep=2), []),
        # The first stage is frozen as a whole.
        (ParallelDims(pp=2, dp_shard=2, ep=2), []),
        (ParallelDims(pp=2, cp=2), ["parallel.schedule=Interleaved1F1B"]),
        (ParallelDims(pp=2, dp_shard=2), ["parallel.schedule=ZBVZeroBubble"]),
    ],
    ids=str,
)
def test_groups_and_frozen_parts_train_as_in_one_process(
    pool: Pool, grouped: Trace, degrees: ParallelDims, overrides: list[str]
) -> None:
    microbatch = GLOBAL_BATCH // degrees.data_parallel // 2
    config = configured(["parallel=fsdp", *GROUPS, *overrides], microbatch)
    traces = train_on(pool, config, degrees, 3, microbatch, "configured")
    assert_equal(traces, grouped)


def test_what_is_frozen_stays_and_everything_else_moves(grouped: Trace) -> None:
    before = train(GROUPS, None, 0, 2, "configured")
    assert before is not None
    stays = {name for name, tensor in grouped.state.items() if torch.equal(tensor, before.state[name])}
    patterns = configured(GROUPS, 2).optimizer.frozen
    frozen = {name for name in grouped.state if is_frozen(name, patterns)}
    assert stays == frozen
    assert "layers.2.ffn.router.selection_bias" in frozen
    assert set(grouped.gradients[0]) == {name for name in grouped.state if "bias" not in name} - frozen


def test_the_comparison_is_not_vacuous(single: tuple[Path, Path, Path]) -> None:
    """Every tensor of every optimizer moves between the second step and the third."""
    two, three = torch.load(single[0]), torch.load(single[1])
    assert {name.split(" ", 1)[1].rpartition(" ")[0] for name in two} == set(every_optimizer())
    # ASGD averages from its millionth step on.
    still = {name.split(" ", 1)[1] for name, tensor in two.items() if torch.equal(tensor, three[name])}
    assert still == {"asgd mu"}


def test_the_plan_counts_the_state_of_every_optimizer(single: tuple[Path, Path, Path]) -> None:
    assert state_sizes(torch.load(single[0])) == planned_sizes(every_optimizer(), ParallelDims())
