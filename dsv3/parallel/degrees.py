"""How many ranks each axis has: as typed, and resolved (docs/parallelism.md)."""

from dataclasses import asdict, dataclass, fields

from dsv3.runtime.errors import require

KEY = "parallel.degrees"
AUTO = "auto"


@dataclass
class DegreesConfig:
    """Ranks an axis; `auto` fits world and model (filling.py), null is 1, for `dp_shard` what is left."""

    pp: int | str | None = None
    dp_replicate: int | str | None = None
    dp_shard: int | str | None = None
    cp: int | str | None = None
    tp: int | str | None = None
    ep: int | str | None = None

    def validate(self) -> None:
        """Refuse degrees below 1 and words other than auto."""
        for f in fields(self):
            value = getattr(self, f.name)
            right = value in (None, AUTO) or (isinstance(value, int) and value > 0)
            require(right, f.name, value, f"must be a number above 0, {AUTO} or null")

    @property
    def typed(self) -> dict[str, int]:
        """The degrees that are given as numbers, by axis."""
        return {axis: value for axis, value in vars(self).items() if isinstance(value, int)}

    def is_auto(self, axis: str) -> bool:
        """Whether `axis` is to fit world and model; `dp_shard` is also without a word."""
        return getattr(self, axis) == AUTO or (axis == "dp_shard" and self.dp_shard is None)


@dataclass(frozen=True)
class Degrees:
    """Resolved degrees; experts borrow a pipeline stage's dense ranks, so `ep` is no factor of the world."""

    pp: int = 1
    dp_replicate: int = 1
    dp_shard: int = 1
    cp: int = 1
    tp: int = 1
    ep: int = 1

    @property
    def world_size(self) -> int:
        """Ranks of all axes together."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.tp

    @property
    def splits_rows(self) -> bool:
        """Whether no rank has whole rows, whole heads and all layers."""
        return self.pp * self.cp * self.tp > 1

    @property
    def data_parallel(self) -> int:
        """Ranks that read different sequences."""
        return self.dp_replicate * self.dp_shard

    @property
    def dense_shards(self) -> int:
        """Ranks that a tensor-parallel part is sharded over."""
        return self.dp_shard * self.cp

    @property
    def whole_shards(self) -> int:
        """Ranks that parameters which every rank uses whole are sharded over; ep divides them."""
        return self.dp_shard * self.cp * self.tp

    @property
    def expert_shards(self) -> int:
        """Ranks one expert-parallel rank's experts are sharded over: what ep leaves of its ranks."""
        return self.whole_shards // self.ep

    def to_json(self) -> dict[str, int]:
        """The degrees by name."""
        return asdict(self)
