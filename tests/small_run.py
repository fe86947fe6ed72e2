"""A small dataset and a working directory with an untrained model, for the commands' tests."""

import dataclasses
import hashlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import soundfile as sf
from conftest import SMALL
from flax import nnx

from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.config import Config, DataConfig, RunConfig, TrainConfig
from patchwave_jax.data.build import build

SIZE, PATCHES = SMALL.patch_samples, 4


def make_config(data_dir, **changes) -> Config:
    data = DataConfig(dataset="audio_folder", data_dir=str(data_dir))
    config = Config(
        objective="dense",
        context_samples=PATCHES * SIZE,
        model=dataclasses.replace(SMALL, input="embedding", head="logistic_mixture"),
        data=dataclasses.replace(data, quantiser=changes.pop("quantiser", "mulaw")),
        train=TrainConfig(batch_size=8, micro_batch_size=0),
        run=RunConfig(),
    )
    return dataclasses.replace(config, **changes)


def make_run(directory, config: Config) -> str:
    """A working directory with one checkpoint of an untrained model."""
    params = nnx.state(config.build_model(nnx.Rngs(config.seed)))
    with Checkpoints(directory, keep=1) as checkpoints:
        checkpoints.save(
            3,
            {"params": params, "opt_state": {"count": jnp.int32(3)}, "step": jnp.int32(3)},
            config=config,
            manifest_hash="",
            best_nats=None,
            flat_evals=0,
            validation_nats=2.0,
        )
    return str(directory)


def tones(samples: int, seed: int) -> np.ndarray:
    """Two decaying sines in a little noise."""
    rng, t = np.random.default_rng(seed), np.arange(samples) / 16_000
    pitches = rng.uniform(200, 1_000, 2)
    wave = sum(np.sin(2 * np.pi * f * t) for f in pitches) * np.exp(-3 * (t % 0.25))
    return np.round(5_000 * wave + rng.normal(0, 30, samples)).astype(np.int16)


def make_data(source, directory):
    """Twelve short files as an audio_folder dataset; returns where it is."""
    for i in range(12):
        sf.write(source / f"take{i}.wav", tones(2_100 + 40 * i, i), 16_000)
    build("audio_folder", source, directory)
    return directory


def tree_hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every file below `root` except locks, which name their process."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }
