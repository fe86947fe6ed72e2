"""A few short clips from a model during training, for WORKDIR/samples and TensorBoard."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType
from jaxtyping import Int16

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.evaluation.nll import LN2
from patchwave_jax.generation.clips import write_wav
from patchwave_jax.generation.sampler import Sampler
from patchwave_jax.generation.sampling_params import SamplingParams

CLIPS = 2


def make(
    config: Config,
    params: Any,
    workdir: str | os.PathLike[str],
    step: int,
    stopping: Callable[[], bool],
) -> Int16[np.ndarray, "B T"]:
    """Generates and writes clips without a prompt, with the run's seed; none if it is to stop."""
    total = max(1, round(config.run.sample_seconds * SAMPLE_RATE))
    needed = config.model.context_for(total, config.context_samples, config.causal)
    config = dataclasses.replace(config, context_samples=needed)
    # This host's devices only: others may already be at their next step.
    devices = jax.local_devices()[:CLIPS]
    mesh = jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)
    params, sampling = jax.device_get(params), SamplingParams(config.seed)
    sampler = Sampler(config, params, mesh, num=CLIPS, sampling=sampling)
    sampler.prime(np.zeros((CLIPS, 0), np.uint8), 0)
    pieces = []
    while sampler.position < total and not stopping():
        pieces.append(sampler.run(total - sampler.position))
    if sampler.position < total:
        return np.zeros((0, 0), np.int16)
    codes, log_probs = (np.concatenate(part, 1) for part in zip(*pieces, strict=True))
    pcm = quantisers.get(config.data.quantiser).decode(codes)
    folder = Path(workdir) / "samples"
    folder.mkdir(exist_ok=True)
    for clip, bits in enumerate(-log_probs.mean(1) / LN2):
        path = folder / f"step{step:08d}_{clip}.wav"
        write_wav(path, pcm[clip])
        told = {"step": step, "seed": config.seed, "stream": clip, "bits_per_sample": float(bits)}
        path.with_suffix(".json").write_text(json.dumps(told, indent=1) + "\n")
    return pcm
