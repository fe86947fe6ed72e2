"""The mesh of devices, and the shardings of arrays on it.

Its axis `data` splits a batch's rows; it may have an axis `context`, whose devices share each row
(see `patchwave_jax.models.context_parallel`). Parameters are replicated.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from patchwave_jax.config import Config
from patchwave_jax.errors import UserError
from patchwave_jax.models.context_parallel import AXIS, Shards


def make_mesh(context_devices: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """All devices (or `devices`), `context_devices` of them for each row.

    Raises:
      UserError: if that does not divide the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    if count % context_devices:
        raise UserError(
            f"config.run.context_devices {context_devices} does not divide the {count} devices"
        )
    # `jax.make_mesh` splits an axis of chips on v5e only: 16 x 16 of a v6e-256 not into 64 x 4.
    grid = create_device_mesh(
        (count // context_devices, context_devices), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, ("data", AXIS), axis_types=(AxisType.Auto,) * 2)


def context_shards(config: Config, mesh: Mesh) -> Shards | None:
    """How the devices along `context` share a row; None if each row is on one device.

    Raises:
      UserError: if they can't share it evenly.
    """
    count = mesh.shape.get(AXIS, 1)
    if count == 1:
        return None
    axes = config.model.shared_axes(config.context_samples, config.causal)
    if not axes:
        raise UserError(
            f"config.run.context_devices is {count}, but only windows of the patch model with "
            "config.objective='dense' can be shared; set it to 1"
        )
    for name, total in axes.items():
        if total % count:
            raise UserError(
                f"config.run.context_devices {count} does not divide the {total} {name} of a row; "
                "use a divisor of both"
            )
    return Shards(count)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def by_rows(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec("data"))


def one_device(mesh: Mesh) -> Any:
    """A device whose memory can be queried: of this process, if it has one."""
    devices, own = list(mesh.devices.flat), jax.process_index()
    return next((device for device in devices if device.process_index == own), devices[0])
