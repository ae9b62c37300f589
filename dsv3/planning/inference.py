"""Whether a model can be held at all: what evaluation and generation need at least."""

from dsv3.model.config import ModelConfig
from dsv3.parallel.degrees import Degrees
from dsv3.planning import parameters
from dsv3.planning.hardware import HardwareConfig
from dsv3.runtime.errors import UserError

# Parameters are fp32 whatever the precision; they are cast where they are used.
BYTES = 4
GIB = 2**30


def require_room(model: ModelConfig, degrees: Degrees, hardware: HardwareConfig) -> None:
    """UserError where a rank's share of the weights alone is more than its memory.

    A lower bound: it is even over all ranks but replicas, and leaves activations and caches out.
    """
    ranks = degrees.world_size // degrees.dp_replicate
    count, room = parameters.total(model), hardware.memory_bytes
    if room is None or count * BYTES <= ranks * room:
        return
    least = -(-count * BYTES // room)
    raise UserError(
        f"{count:,} parameters on {degrees.world_size:,} ranks of hardware={hardware.name} do not fit: the "
        f"weights alone take {count * BYTES / ranks / GIB:,.2f} GiB of a rank, which has {room / GIB:,.2f}\n"
        f"parallel=fsdp with {least:,} or more ranks shares them out; is it the right model=?"
    )
