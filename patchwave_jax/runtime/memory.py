"""The memory of devices, and how much of a window is computed at once for it."""

import os
from typing import Any

from patchwave_jax.config import Config
from patchwave_jax.models.base import Execution, Memory
from patchwave_jax.models.context_parallel import Shards
from patchwave_jax.planning.hardware import usable_bytes
from patchwave_jax.runtime.distributed import process_min


def memory_of(device: Any) -> Memory:
    """What programs on `device` get; half of the machine's where the device does not tell.

    The same in all processes, which have to run the same program.
    """
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    size = usable_bytes(device) or machine / 2
    return Memory(process_min(size), device.platform in ("cpu", "tpu"))


def choose_execution(
    config: Config, rows: int, device: Any, shards: Shards | None = None
) -> Execution:
    """How to compute `rows` windows, or shares of them, on a device.

    What the configuration leaves at 0 is chosen for the device's memory.

    Raises:
      UserError: if what the configuration gives does not divide a device's share.
    """
    return config.model.execution(
        config.context_samples,
        config.causal,
        rows,
        memory_of(device),
        phase_chunk=config.run.phase_chunk,
        encode_chunk_patches=config.run.encode_chunk_patches,
        shards=shards,
    )
