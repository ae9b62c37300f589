"""Impossible numbers are refused with the key that is wrong; the defaults are the report's."""

from dataclasses import replace
from typing import Any

import pytest

from dsv3.config.optimizer import AdamWConfig
from dsv3.config.training import (
    BalanceConfig,
    DeepSeekV3Config,
    MTPLossConfig,
    StepsConfig,
    TrainConfig,
    WarmupCosineConfig,
    WSDConfig,
)
from dsv3.errors import InvalidValue


def refused(node: Any, **changes: Any) -> None:
    with pytest.raises(InvalidValue) as error:
        replace(node, **changes).validate()
    assert error.value.key == next(iter(changes))


def test_defaults_are_possible() -> None:
    nodes: list[Any] = [AdamWConfig(), WarmupCosineConfig(), WSDConfig(), StepsConfig(), DeepSeekV3Config()]
    others: list[Any] = [BalanceConfig(), MTPLossConfig(), TrainConfig()]
    for node in [*nodes, *others]:
        node.validate()


def test_optimizer_numbers_are_in_range() -> None:
    refused(AdamWConfig(), lr=-1e-3)
    refused(AdamWConfig(), betas=(0.9, 1.0))
    refused(AdamWConfig(), betas=(-0.1, 0.9))
    refused(AdamWConfig(), eps=0.0)
    refused(AdamWConfig(), weight_decay=-0.1)


def test_schedule_numbers_are_in_range() -> None:
    refused(DeepSeekV3Config(), warmup_steps=-1)
    refused(DeepSeekV3Config(), total_steps=0)
    refused(WarmupCosineConfig(), final=1.5)
    refused(WSDConfig(), decay=-0.1)
    refused(WSDConfig(), final=-0.1)
    refused(StepsConfig(), factor=3.0)
    refused(StepsConfig(), at=[0.9, 0.8])
    refused(StepsConfig(), at=[0.8, 1.0])
    refused(StepsConfig(), warmup_steps=-1)


def test_loss_and_balance_numbers_are_in_range() -> None:
    refused(BalanceConfig(), bias_speed=-0.1)
    refused(BalanceConfig(), bias_until=1.1)
    refused(BalanceConfig(), loss_weight=-1.0)
    refused(MTPLossConfig(), weight=-1.0)
    refused(MTPLossConfig(), final_weight=-1.0)
    refused(MTPLossConfig(), switch_at=-0.5)


@pytest.mark.parametrize(
    "key",
    [
        *["steps", "stop_after", "global_batch_size", "microbatch_size", "sequence_length"],
        *["clip_norm", "log_every", "evaluate_tokens", "generate_seconds"],
    ],
)
def test_counts_of_the_loop_are_above_zero(key: str) -> None:
    refused(TrainConfig(), **{key: 0})


@pytest.mark.parametrize(
    "key", ["checkpoint_every", "evaluate_every", "generate_every", "collect_garbage_every", "seed"]
)
def test_zero_means_never_and_less_is_refused(key: str) -> None:
    never: Any = {key: 0}
    replace(TrainConfig(), **never).validate()
    refused(TrainConfig(), **{key: -1})
