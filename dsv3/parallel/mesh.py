"""The device mesh of a layout: one named axis a degree."""

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dsv3.parallel.degrees import Degrees

DATA_AXES = ("dp_replicate", "dp_shard")


def build_mesh(degrees: Degrees, device_type: str) -> DeviceMesh:
    """The mesh over all ranks, data-parallel axes outermost."""
    sizes = tuple(getattr(degrees, axis) for axis in DATA_AXES)
    return init_device_mesh(device_type, sizes, mesh_dim_names=DATA_AXES)
