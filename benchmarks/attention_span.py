"""What a trained patch model loses if attention is cut to the newest tokens: JSON.

    python -m benchmarks.attention_span --workdir=DIR --tokens 1 4 16 64

The parameters stay as they were trained, and everything but attention sees what it saw: the value
of context to this network, on the same validation targets. In every layer a token attends to itself
and the `n - 1` tokens before it.
"""

import argparse
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax
import numpy as np

from patchwave_jax.data.index import open_split
from patchwave_jax.data.manifest import default_data_dir
from patchwave_jax.errors import UserError, exits_cleanly
from patchwave_jax.evaluation import evaluator, measure
from patchwave_jax.models.patchwave import transformer
from patchwave_jax.models.patchwave.config import PatchWaveConfig


def newest(count: int) -> Callable[[transformer.Folded, jax.Array], jax.Array]:
    """`attend_to_older` with only the newest `count` tokens in view."""

    def attend(folded: transformer.Folded, x: jax.Array) -> jax.Array:
        age = np.arange(x.shape[1])[:, None] - np.arange(x.shape[1])
        return transformer.attend(folded, x, x, (age >= 0) & (age < count))

    return attend


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Prints bits per sample for every number of tokens."""
    parser = argparse.ArgumentParser("python -m benchmarks.attention_span", description=__doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--max_targets", type=int, default=200_000)
    parser.add_argument("--data_dir", metavar="DIR", help="default: the run's")
    args = parser.parse_args(argv)
    loaded, params, step = evaluator.load(args.workdir)
    config = loaded.config
    if not isinstance(config.model, PatchWaveConfig) or not config.causal:
        raise UserError(f"--workdir={args.workdir} holds no causal patch model")
    data_dir = args.data_dir or config.data.data_dir or default_data_dir()
    split = open_split(data_dir, config.data.dataset, "validation")
    targets = measure.choose_targets(config, split, max_targets=args.max_targets)
    bits: dict[int, float] = {}
    num_targets = 0
    for count in args.tokens:
        with mock.patch.object(transformer, "attend_to_older", newest(count)):
            cut = evaluator.Evaluator(config, loaded.mesh)
            result = measure.result(measure.measure(cut, params, targets), targets)
        bits[count], num_targets = round(result.nll_bits, 4), result.targets
    found: dict[str, Any] = {
        "step": step,
        "targets": num_targets,
        "quantiser": config.data.quantiser,
        "context_samples": config.context_samples,
        "bits_by_tokens": bits,
    }
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
