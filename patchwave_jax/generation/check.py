"""The consistency check: log-probabilities of generation against those of the evaluation."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import UInt8

from patchwave_jax.evaluation import protocol
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.generation.sampler import Sampler
from patchwave_jax.generation.sampling_params import SamplingParams

CHECK_SAMPLES = 2000  # generated before and after the window slides
TOLERANCE_NATS = {"float32": 1e-3, "bfloat16": 0.3}  # between two orders of summation


@dataclasses.dataclass(frozen=True)
class Consistency:
    """Differences between the log-probabilities of generation and evaluation, in nats."""

    largest: float
    mean: float
    samples: int
    context_samples: int
    slides: int
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.largest <= self.tolerance

    def __str__(self) -> str:
        return (
            f"{'pass' if self.passed else 'FAIL'}: the largest difference of log-probabilities "
            f"between generation and evaluation is {self.largest:.2e} nats (mean {self.mean:.2e}, "
            f"allowed {self.tolerance:g}), over {self.samples:,} samples at a context of up to "
            f"{self.context_samples:,}, across {self.slides} slides of the window"
        )


def check(
    evaluator: Evaluator,
    params: Any,
    prompt: UInt8[np.ndarray, " T"],
    *,
    seed: int = 0,
    stride_patches: int | None = None,
) -> Consistency:
    """Generates from nothing and across a slide of the window, and scores it as evaluation does.

    `prompt` fills the context up to where generation begins, repeated if it is short.
    """
    config = evaluator.config
    sampler = Sampler(
        config,
        params,
        evaluator.mesh,
        num=evaluator.mesh.size,
        sampling=SamplingParams(seed=seed),
        stride_patches=stride_patches,
    )
    context, size = config.context_samples, config.window_unit
    block = config.model.latent_block or 1
    num_latents = config.model.latent_size if config.model.latent_block else 0
    before_slide = max(0, context - CHECK_SAMPLES) // block * block
    differences, slides = [], 0
    for first, end in ((0, min(CHECK_SAMPLES, context)), (before_slide, context + CHECK_SAMPLES)):
        codes = np.tile(np.resize(prompt, first), (sampler.num, 1))
        sampler.prime(codes, first)
        pieces, latents = [], np.zeros((sampler.num, 1 + end // block, num_latents), np.int32)
        while sampler.position < end:
            number = sampler.position // block
            pieces.append(sampler.run(end - sampler.position))
            own = sampler.latents[: sampler.num, : 1 + (sampler.position - 1) // block - number]
            latents[:, number : number + own.shape[1]] = own
        slides += sampler.window_start(end - 1) // (size * sampler.stride_patches)
        log_probs = np.concatenate([piece[1] for piece in pieces], 1)
        codes = np.concatenate([codes, *(piece[0] for piece in pieces)], 1)
        plan = protocol.plan([end] * sampler.num, config, sampler.stride_patches)
        windows = [_last_part(window, first, size) for window in plan if window.end > first]
        given = latents if num_latents else None
        for scored in evaluator.score(params, codes.__getitem__, windows, given):
            window = scored.window
            skipped = max(0, first - window.first)
            made = log_probs[window.clip, window.first + skipped - first : window.end - first]
            differences.append(np.abs(scored.log_probs[skipped:] - made))
    found = np.concatenate(differences)
    return Consistency(
        largest=float(found.max()),
        mean=float(found.mean()),
        samples=found.size,
        context_samples=context,
        slides=slides,
        tolerance=TOLERANCE_NATS[config.model.compute_dtype],
    )


def _last_part(window: protocol.Window, first: int, size: int) -> protocol.Window:
    """The part of a window that scores its samples from `first` on, in whole patches."""
    end = window.first + window.last_n * size
    last_n = min(window.last_n, -(-(end - first) // size))
    return window._replace(first=end - last_n * size, last_n=last_n)
