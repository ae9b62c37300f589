"""Training FLOPs a token, by both conventions in use, and the utilisation they give.

A token costs 6 FLOPs a matmul weight it meets (2 forward, 4 backward) and, a layer, 6 x heads x
(qk + v head dims) for every position it attends to. Peers disagree about those positions: `causal`
counts the half of the square that is computed, `full_square` (PaLM, arXiv 2204.02311, appendix B)
counts all of it. Recomputation is never counted: MFU, not HFU.
"""

from enum import Enum

from dsv3.model.config import ModelConfig
from dsv3.planning import weights


class FlopsConvention(Enum):
    """Which part of the attention square counts."""

    causal = "causal"
    full_square = "full_square"


def training_flops_per_token(
    config: ModelConfig,
    sequence_length: int,
    convention: FlopsConvention = FlopsConvention.causal,
    mtp: bool = True,
) -> int:
    """FLOPs a token, forward and backward, at `sequence_length` tokens; with MTP unless `mtp` is off.

    6 x active matmul weights (input embedding left out) + 3 x layers x heads x (qk + v head dims) x
    sequence (causal), twice the last term for the full square. An MTP depth adds its projection, its
    layer and another pass through the head.
    """
    depths = config.mtp_depths if mtp else 0
    attention = 3 * config.attention.heads * (config.attention.qk_head_dim + config.attention.v_head_dim)
    if convention is FlopsConvention.full_square:
        attention *= 2
    met = 6 * active_matmul_weights(config, depths)
    return met + (config.num_layers + depths) * attention * sequence_length


def active_matmul_weights(config: ModelConfig, mtp_depths: int) -> int:
    """Matmul weights that one token meets, the shared head once a prediction."""
    main = weights.met(weights.main_model(config), config)
    head = config.vocab_size * config.dim
    return main + sum(
        weights.met(module, config) + head for module in weights.mtp_modules(config)[:mtp_depths]
    )


def mfu(
    tokens_per_second: float, flops_per_token: float, peak_flops: float | None, devices: int
) -> float | None:
    """Model FLOPs utilisation from 0 to 1; None where the peak (FLOP/s a device) is unknown.

    `tokens_per_second` is that of all `devices` together.
    """
    return None if peak_flops is None else tokens_per_second * flops_per_token / (peak_flops * devices)
