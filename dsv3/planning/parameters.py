"""How many parameters a model has, by component."""

from collections.abc import Iterable
from dataclasses import dataclass

from dsv3.model.config import ModelConfig
from dsv3.planning import weights
from dsv3.planning.weights import Component, Weight


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of each component over the main model's layers; `mtp` is all of the MTP depths."""

    embedding: int
    head: int
    attention: int
    dense_ffn: int
    router: int
    experts: int
    shared_experts: int
    norms: int
    mtp: int

    @property
    def total(self) -> int:
        """All of them: shared embedding and head once."""
        return sum(vars(self).values())


def count(config: ModelConfig) -> ParameterCounts:
    """Parameters by component, selection biases (buffers) left out."""
    main = weights.main_model(config)
    names = [c.value for c in Component if c is not Component.mtp_projection]
    counts = {name: numel(w for w in main if w.component.value == name) for name in names}
    return ParameterCounts(**counts, mtp=sum(map(numel, weights.mtp_modules(config))))


def total(config: ModelConfig) -> int:
    """Parameters with the MTP depths, shared embedding and head once."""
    return count(config).total


def total_without_mtp(config: ModelConfig) -> int:
    """Parameters of the main model: what a released checkpoint's size is named after."""
    return numel(weights.main_model(config))


def active(config: ModelConfig) -> int:
    """Parameters one token uses: top_k routed experts and everything else, both embeddings, no MTP."""
    moe_layers = config.num_layers - config.num_dense_layers
    idle = config.moe.num_experts - config.moe.top_k
    return total_without_mtp(config) - moe_layers * idle * expert(config)


def expert(config: ModelConfig) -> int:
    """Parameters of one routed expert: gate, up and down."""
    return 3 * config.dim * config.moe.hidden_dim


def attention_per_layer(config: ModelConfig) -> int:
    """Parameters of one layer's attention without the norms of its latents."""
    return numel(w for w in weights.block(config, dense=False) if w.component is Component.attention)


def biases(config: ModelConfig) -> int:
    """Selection biases: fp32 buffers, one an expert in every MoE layer, the MTP depths' too."""
    return config.num_moe_layers * config.moe.num_experts if config.moe.selection_bias else 0


def numel(of: Iterable[Weight]) -> int:
    """Numbers in several weights."""
    return sum(weight.numel for weight in of)
