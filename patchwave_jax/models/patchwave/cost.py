"""What the patch model costs: memory for the chunks it computes at once, and useful FLOPs."""

from typing import Any

import jax.numpy as jnp

from patchwave_jax.errors import UserError
from patchwave_jax.models.base import Execution, Memory
from patchwave_jax.models.context_parallel import Shards

ON_CHIP_BYTES = 100e6  # for a CPU's caches and a TPU's vector memory


def execution(
    model: Any,
    context_samples: int,
    causal: bool,
    rows: int,
    memory: Memory,
    *,
    phase_chunk: int = 0,
    encode_chunk_patches: int = 0,
    shards: Shards | None = None,
) -> Execution:
    """Chunks of the dense form of `rows` segments, or shares of them, on a device with `memory`.

    A third of the memory is for the encoder's activations. The Transformer's, kept for one chunk of
    phases, take not much more than fits on the chip of a CPU or a TPU, and up to a 24th of a GPU's
    memory. A chunk that is given (not 0) is kept.

    Raises:
      UserError: if what is given does not divide a device's share.
    """
    most = ON_CHIP_BYTES if memory.on_chip else memory.bytes / 24
    patches, phases = context_samples // model.patch_samples, model.patch_samples
    bytes_each = jnp.dtype(model.compute_dtype).itemsize
    scores = patches if causal else 2 * patches  # and weights; half if causal
    layer = model.num_heads * (2 * model.width + scores) + 8 * model.width + model.mlp_width
    token = model.num_layers * layer + 2 * model.readout_width + 512
    phase = rows * patches * token * bytes_each
    patch = rows * model.patch_samples * 3 * sum(model.filters) * bytes_each
    if shards:
        patches, phases = patches // shards.count, phases // shards.count
    for name, chunk, total in (
        ("phase_chunk", phase_chunk, phases),
        ("encode_chunk_patches", encode_chunk_patches, patches),
    ):
        if chunk and total % chunk:
            raise UserError(
                f"config.run.{name} {chunk} does not divide the {total} of a device; "
                "use a divisor of it, or 0 to have it chosen"
            )
    return Execution(
        phase_chunk or largest_divisor(phases, most / phase),
        encode_chunk_patches or largest_divisor(patches, memory.bytes / 3 / patch),
        shards,
    )


def largest_divisor(total: int, most: float) -> int:
    """The largest divisor of `total` that is at most `most`, or 1."""
    return max(d for d in range(1, total + 1) if total % d == 0 and d <= max(1, most))


def useful_flops(model: Any, context_samples: int, causal: bool) -> dict[str, float]:
    """FLOPs of a training step on one row, of `encoder`, `transformer` and `head`.

    Attention is folded, of a causal model's scores half count, nothing is computed twice, and a
    step is three times its forward pass. The adaptive predictors are not counted.
    """
    patches = context_samples // model.patch_samples
    inputs = (model.embedding_width if model.input == "embedding" else 1, *model.filters)
    kernels = [model.kernel_size * a * b for a, b in zip(inputs, model.filters, strict=False)]
    flatten = model.final_frames * model.filters[-1] * model.width
    skips = sum(model.filters) * model.width if model.skip_connections else 0
    folded = model.num_heads * model.width
    scores = (patches + 1 if causal else 2 * patches) / 2 * folded
    block = 2 * model.width * folded + 2 * scores + 2 * model.width * model.mlp_width
    outputs = 256 if model.head == "softmax" else 3 * model.mixture_components
    readout = model.readout_width * (model.width + outputs)
    if causal:  # every layer at every target
        encoder, tokens, targets = sum(kernels) + flatten + skips, 1, context_samples
    else:  # every layer at its own stride, in every patch
        frames, encoder = model.patch_samples, patches * flatten + skips
        for kernel, stride in zip(kernels, model.strides, strict=True):
            frames = (frames - model.kernel_size) // stride + 1
            encoder += patches * frames * kernel
        tokens, targets = patches, 1
    macs = {"encoder": encoder, "transformer": model.num_layers * tokens * block, "head": readout}
    return {name: 6.0 * count * targets for name, count in macs.items()}
