"""How much of a dense step is computed at once, for the memory that a device has."""

import os
from typing import Any

import jax.numpy as jnp

from patchwave_jax.config import Config
from patchwave_jax.errors import UserError
from patchwave_jax.models.context_parallel import Shards
from patchwave_jax.planning.hardware import usable_bytes
from patchwave_jax.runtime.distributed import process_min

ON_CHIP_BYTES = 100e6  # for a CPU's caches and a TPU's vector memory


def choose_chunks(
    config: Config, rows: int, device: Any, shards: Shards | None = None
) -> tuple[int, int]:
    """`(phase_chunk, chunk_patches)` of the dense form for `rows` segments, or shares, on a device.

    What the configuration leaves at 0 is chosen for the device's memory, of which a third is for
    the encoder's activations (half of the machine's counts where the device does not tell). The
    Transformer's, kept for one chunk of phases, take not much more than fits on the chip of a CPU
    or a TPU, and up to a 24th of a GPU's memory.

    Raises:
      UserError: if what the configuration gives does not divide a device's share.
    """
    if config.is_baseline:
        return 1, config.patches
    model, run = config.patch_model, config.run
    memory = usable_bytes(device) or _machine_bytes() / 2
    memory = process_min(memory)  # all processes have to run the same program
    most = ON_CHIP_BYTES if device.platform in ("cpu", "tpu") else memory / 24
    patches, phases = config.patches, model.patch_samples // config.train.hop
    bytes_each = jnp.dtype(model.compute_dtype).itemsize
    scores = patches if config.objective == "dense" else 2 * patches  # and weights; half if causal
    layer = model.num_heads * (2 * model.width + scores) + 8 * model.width + model.mlp_width
    token = model.num_layers * layer + 2 * model.readout_width + 512
    phase = rows * patches * token * bytes_each
    patch = rows * model.patch_samples * 3 * sum(model.filters) * bytes_each
    if shards:
        patches, phases = patches // shards.count, phases // shards.count
    for name, chunk, total in (
        ("phase_chunk", run.phase_chunk, phases),
        ("encode_chunk_patches", run.encode_chunk_patches, patches),
    ):
        if chunk and total % chunk:
            raise UserError(f"config.run.{name} {chunk} does not divide a device's {total}")
    return (
        run.phase_chunk or largest_divisor(phases, most / phase),
        run.encode_chunk_patches or largest_divisor(patches, memory / 3 / patch),
    )


def _machine_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def largest_divisor(total: int, most: float) -> int:
    return max(d for d in range(1, total + 1) if total % d == 0 and d <= max(1, most))
