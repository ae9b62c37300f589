"""What each pipeline stage holds: its layers, and the embedding, head and MTP depths at the ends."""

from collections.abc import Sequence
from dataclasses import dataclass

from dsv3.model.config import ModelConfig
from dsv3.parallel.config import Schedule
from dsv3.parallel.stages import split_layers
from dsv3.planning import weights
from dsv3.planning.weights import Weight


@dataclass(frozen=True)
class Pipelining:
    """The schedule, the virtual stages of a rank and the user's split, as far as pp > 1 needs them."""

    schedule: Schedule = Schedule["1F1B"]
    per_rank: int = 1
    split: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: its number and count, its layers (True: dense), and what it holds besides."""

    index: int
    stages: int
    dense: tuple[bool, ...]
    mtp_depths: int

    @property
    def block_kinds(self) -> list[bool]:
        """Its layers and those of its MTP depths, which are never dense."""
        return [*self.dense, *[False] * self.mtp_depths]

    @property
    def is_first(self) -> bool:
        """Whether it holds the embedding."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it holds the head."""
        return self.index == self.stages - 1

    @property
    def embeds(self) -> int:
        """How often a microbatch is looked up in its embedding: for the first layer and each MTP depth."""
        return int(self.is_first) + self.mtp_depths

    @property
    def predictions(self) -> int:
        """How often a microbatch passes its head."""
        return int(self.is_last) * (1 + self.mtp_depths)


def stages(config: ModelConfig, count: int, split: Sequence[int] | None = None) -> list[Stage]:
    """The stages of all ranks in order, balanced or with the first layers that `split` names."""
    layers = split_layers(config, count, None if split is None else list(split))
    last = count - 1
    return [
        Stage(
            number,
            count,
            tuple(layer < config.num_dense_layers for layer in its_layers),
            config.mtp_depths if number == last else 0,
        )
        for number, its_layers in enumerate(layers)
    ]


def stage_groups(config: ModelConfig, stage: Stage) -> list[list[Weight]]:
    """A stage's weights as parallel/fsdp.py groups them: first what belongs to no block, then the blocks.

    The last stage keeps a copy of the embedding for its MTP depths (DESIGN section 7).
    """
    root: list[Weight] = []
    if stage.embeds:
        root += weights.embedding(config)
    if stage.is_last:
        root += weights.output(config)
    root += stage.mtp_depths * weights.mtp_join(config)
    return [root, *(weights.block(config, dense) for dense in stage.block_kinds)]
