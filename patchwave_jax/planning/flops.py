"""FLOPs that a configuration can't do without, counted from its fields."""

from patchwave_jax.config import Config


def useful_flops(config: Config, part: str = "all") -> float:
    """Of one training step on one row, or of one of its parts: encoder, transformer, head.

    The attention's products are folded, of a causal model's scores half count, nothing is
    computed twice, and a step is three times its forward pass. Without the adaptive predictors.
    """
    model, patches = config.patch_model, config.patches
    dense = config.objective == "dense"
    inputs = (model.embedding_width if model.input == "embedding" else 1, *model.filters)
    kernels = [model.kernel_size * a * b for a, b in zip(inputs, model.filters, strict=False)]
    flatten = model.final_frames * model.filters[-1] * model.width
    skips = sum(model.filters) * model.width if model.skip_connections else 0
    folded = model.num_heads * model.width
    scores = (patches + 1 if dense else 2 * patches) / 2 * folded
    block = 2 * model.width * folded + 2 * scores + 2 * model.width * model.mlp_width
    outputs = 256 if model.head == "softmax" else 3 * model.mixture_components
    readout = model.readout_width * (model.width + outputs)
    if dense:  # every layer at every target
        encoder, tokens = sum(kernels) + flatten + skips, 1
    else:  # every layer at its own stride, in every patch
        frames, encoder = model.patch_samples, patches * flatten + skips
        for kernel, stride in zip(kernels, model.strides, strict=True):
            frames = (frames - model.kernel_size) // stride + 1
            encoder += patches * frames * kernel
        tokens = patches
    parts = {"encoder": encoder, "transformer": model.num_layers * tokens * block, "head": readout}
    macs = sum(parts.values()) if part == "all" else parts[part]
    return 6.0 * macs * config.targets_per_row
