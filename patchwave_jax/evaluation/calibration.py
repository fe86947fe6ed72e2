"""Calibration: of all codes with a predicted probability of 10%, does one in ten occur?"""

import dataclasses
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Float64

from patchwave_jax.evaluation import protocol
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.evaluation.measure import Targets

EDGES = 10.0 ** np.linspace(-6, 0, 25)  # of the bins of probability; lower ones fall into the first
TARGETS_PER_WINDOW = 2_000
WINDOWS = 16


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Over all codes of all targets, in bins of the predicted probability."""

    stated: Float64[np.ndarray, " bins"]  # mean probability in the bin
    cases: Float64[np.ndarray, " bins"]  # codes in the bin
    came: Float64[np.ndarray, " bins"]  # those that occurred: one for each target
    top_stated: float  # mean probability of the likeliest code
    top_right: float  # how often it occurred

    def __str__(self) -> str:
        return (
            f"Over {self.targets:,} samples, the likeliest code had a probability of "
            f"{self.top_stated:.1%} on average and occurred {self.top_right:.1%} of the time; "
            f"{self.error:.2%} of the probability is misplaced."
        )

    @property
    def targets(self) -> int:
        return int(self.came.sum())

    @property
    def occurred(self) -> Float64[np.ndarray, " bins"]:
        """Share of the codes in the bin that occurred."""
        return self.came / np.maximum(self.cases, 1)

    @property
    def error(self) -> float:
        """Probability mass on codes that occur less or more often than predicted."""
        gaps = np.abs(self.stated * self.cases - self.came)
        return float(gaps.sum() / self.came.sum() / 2)


def calibrate(evaluator: Evaluator, params: Any, targets: Targets) -> Calibration:
    """Calibration on a few windows spread over `targets`, at evenly spaced samples."""
    config, size = evaluator.config, evaluator.config.window_unit
    windows = protocol.plan([c.length for c in targets.clips], config, config.window_units)
    windows = windows[:: -(-len(windows) // WINDOWS)]
    per_window = config.context_samples // TARGETS_PER_WINDOW
    hop = max(d for d in range(1, size + 1) if size % d == 0 and d <= max(1, per_window))
    graphdef, _ = config.abstract_model()

    @jax.jit
    def probabilities(params, segments):
        logits = nnx.merge(graphdef, params).logits(segments, hop)
        return jax.nn.softmax(logits)

    bins = len(EDGES) - 1
    stated, cases, came = np.zeros((3, bins))
    top_stated, top_right, count = 0.0, 0, 0
    for window in windows:
        segment = protocol.segment(window, targets.codes(window.clip), config)
        places = np.arange(config.history, segment.size, hop)
        kept = places - config.history < window.end - window.first
        truth = segment[places][kept]
        table = np.asarray(probabilities(params, segment[None]))[0][kept].astype(np.float64)
        index = np.clip(np.searchsorted(EDGES, table, side="right") - 1, 0, bins - 1)
        own = np.arange(len(truth)), truth
        stated += np.bincount(index.ravel(), table.ravel(), bins)
        cases += np.bincount(index.ravel(), minlength=bins)
        came += np.bincount(index[own], minlength=bins)
        top_stated += table.max(1).sum()
        top_right += int((table.argmax(1) == truth).sum())
        count += len(truth)
    return Calibration(
        stated=stated / np.maximum(cases, 1),
        cases=cases,
        came=came,
        top_stated=top_stated / count,
        top_right=top_right / count,
    )
