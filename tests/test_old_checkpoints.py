"""Checkpoints that an older version wrote: restored whole, they predict and train as they did.

`checkpoints_4ef3fc7.zip` holds runs of two steps by commit 4ef3fc7, the log-probabilities that it
gave some codes with them, and the loss of its next step.
"""

import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

from patchwave_jax.checkpoint import Checkpoints
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.evaluation.protocol import plan
from patchwave_jax.runtime.mesh import make_mesh
from patchwave_jax.training.step import make_step


@pytest.mark.parametrize("name", ["patchwave", "samplernn"])
def test_an_old_checkpoint_goes_on(name, tmp_path):
    with zipfile.ZipFile(Path(__file__).parent / "checkpoints_4ef3fc7.zip") as archive:
        archive.extractall(tmp_path)
    expected = np.load(tmp_path / "expected.npz")
    mesh = make_mesh(devices=jax.devices()[:1])
    with Checkpoints(tmp_path / name) as checkpoints:
        config = checkpoints.record(2).config
        step = make_step(config, mesh)
        state = checkpoints.restore(2, step.abstract_state)
    assert config.model.kind == name
    codes = expected["codes"]
    scored = Evaluator(config, mesh).score(
        state["params"], lambda _: codes, plan([codes.size], config, 1)
    )
    for window, log_probs, _ in scored:
        wanted = expected[name][window.first : window.end]
        np.testing.assert_allclose(log_probs, wanted, rtol=1e-5, atol=1e-5)
    rng = np.random.default_rng(1)  # two batches were trained on; the next is the third
    size = config.window_samples // config.segments
    rows = [rng.integers(0, 256, (2, size), dtype=np.uint8) for _ in range(3)][-1]
    state, metrics = step.update(state, rows)
    np.testing.assert_allclose(metrics["nll_nats"], expected[f"{name}_next_nats"], rtol=1e-5)
    assert int(state["step"]) == 3
