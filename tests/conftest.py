"""What all tests share: eight simulated devices, and small models with random weights."""

import dataclasses
import os
import sys
import tempfile
from importlib.metadata import version

# Tests compile the same programs again and again: all processes of a run share them.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _CACHE = tempfile.TemporaryDirectory(prefix="patchwave_jax_tests_")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _CACHE.name
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"

# Most of the time is XLA compiling programs that then run for a moment. A process that does not
# know one of its flags aborts, so newer versions of jaxlib get the oldest flag only.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1"
    if version("jaxlib").startswith("0.10.")
    else "--xla_backend_optimization_level=0",
)

import checked_signatures  # noqa: F401
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shared_programs
from flax import nnx
from scipy.signal import lfilter

from patchwave_jax.data import quantisers
from patchwave_jax.evaluation import evaluator
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.patchwave.model import PatchWave
from patchwave_jax.models.samplernn import SampleRNNConfig
from patchwave_jax.models.wavenet import WaveNetConfig

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", os.environ["JAX_COMPILATION_CACHE_DIR"])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)

SMALL = PatchWaveConfig(
    patch_samples=60,
    kernel_size=5,
    filters=(8, 8),
    strides=(2, 3),
    width=16,
    num_layers=2,
    num_heads=2,
    head_size=16,
    mlp_width=32,
    readout_width=32,
    embedding_width=8,
    mixture_components=3,
    predictor_taps=16,
)
OURS = dataclasses.replace(SMALL, input="embedding", skip_connections=True, head="logistic_mixture")
ADAPTIVE = dataclasses.replace(
    OURS,
    adaptive_taps=(4, 16),
    adaptive_windows=(60, 80),
    adaptive_block_samples=20,
    denoiser_taps=4,
    denoiser_window=50,
)
PLANNED = dataclasses.replace(ADAPTIVE, plan_block_samples=20)
OTHER_PATCH = dataclasses.replace(
    SMALL, patch_samples=96, kernel_size=3, strides=(3, 2, 2), filters=(8, 8, 4)
)

WAVENET = WaveNetConfig(
    cycles=2,
    cycle_layers=3,
    residual_channels=8,
    dilation_channels=8,
    skip_channels=16,
    end_channels=12,
)
SAMPLERNN = SampleRNNConfig(frame_sizes=(4, 2, 2), width=16, embedding_width=8, segment_samples=32)
CLIP_LENGTHS = (9 * 60 + 17, 60 - 1, 4 * 60 + 1, 1)  # longer, shorter than four patches of SMALL


def random_model(config: PatchWaveConfig, *, causal: bool, quantiser="mulaw", seed=0) -> PatchWave:
    """A model whose parameters, biases and norms included, are all away from their start."""
    model = PatchWave(config, causal=causal, quantiser=quantiser, rngs=nnx.Rngs(seed))
    graphdef, params = nnx.split(model)
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.2, x.shape), x.dtype), params)
    return nnx.merge(graphdef, params)


def random_codes(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def smooth_codes(rows: int, samples: int, seed: int = 0) -> np.ndarray:
    """Codes of decaying resonances in a little noise, which linear prediction makes sense of."""
    rng = np.random.default_rng(seed)
    wave = np.stack(
        [
            lfilter([1.0], np.poly(0.98 * np.exp([1j * f, -1j * f, 2j * f, -2j * f])).real, noise)
            for f, noise in zip(
                rng.uniform(0.1, 0.5, rows), rng.normal(size=(rows, samples)), strict=True
            )
        ]
    )
    wave *= 8_000 / np.abs(wave).max(-1, keepdims=True)
    return quantisers.get("mulaw").encode(wave.astype(np.int16))


@pytest.fixture(autouse=True, scope="session")
def _fast():
    """Programs are shared, and smaller batches than usual: most of them would be padding."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluator, "BATCH_SAMPLES", 500)
        shared_programs.share(patch)
        yield


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


QUICK = (  # how the ids of tests marked `quick` begin
    "data/test_audio.py",
    "data/test_index.py",
    "data/test_quantisers.py",
    "data/test_windows.py",
    "evaluation/test_protocol.py",
    "generation/test_sampler.py::test_cached_equals_patch_form_across_slides[ours]",
    "generation/test_sampler.py::test_draws",
    "generation/test_sampler.py::test_impossible",
    "models/test_heads.py",
    "models/test_megabyte.py::test_logits",
    "models/test_patchwave.py::test_dense_form_equals_patch_form[ours]",
    "models/test_sashimi.py::test_s4_layer",
    "models/test_wavenet_samplernn.py::test_logits",
    "test_checkpoint.py::test_a",
    "test_checkpoint.py::test_nothing",
    "test_checkpoint.py::test_reading",
    "test_config.py::test_a",
    "test_config.py::test_the",
    "test_hostile.py::test_a_c",
    "test_train.py::test_chunks",
    "test_train.py::test_overfits_one_batch[dense]",
    "test_train.py::test_schedules",
    "training/test_nonfinite_guard.py::test_a_",
)


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if item.nodeid.removeprefix("tests/").startswith(QUICK):
            item.add_marker(pytest.mark.quick)


def pytest_addoption(parser) -> None:
    parser.addoption("--kills", type=int, help="how often tests/crash kills, in all")


def as_on(platform):
    """Instead of `lax.platform_dependent`: what `platform` runs."""

    def choose(*args, default, **others):
        return others.get(platform, default)(*args)

    return choose


@pytest.fixture
def without_gcsfs(monkeypatch):
    """As if it were not installed."""
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    for name in ("gs", "gcs"):
        monkeypatch.delitem(sys.modules["fsspec.registry"]._registry, name, raising=False)
