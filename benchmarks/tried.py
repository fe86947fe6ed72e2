"""What was tried and is not in the package: `python -m benchmarks.tried --out=DIR`.

Trains the small recipe and, patched from here, the same with something that other systems do:
other optimizers, an average of the weights, other activations and initialisation, a deeper readout.
Each gets the same targets in the same batches, and is measured as in `benchmarks.ablations`.
Prints JSON and a Markdown table.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import optax
import optax.contrib
from flax import nnx

from benchmarks import ablations
from patchwave_jax import train
from patchwave_jax.errors import exits_cleanly
from patchwave_jax.models.patchwave.model import PatchWave
from patchwave_jax.training import step
from patchwave_jax.training.optimizer import make_schedule

CONSTANT = ablations.CHOICES["constant learning rate"]
Patch = contextlib.AbstractContextManager[Any]


def optimizer(make: Callable[[Any], optax.GradientTransformation]) -> Patch:
    """With one made from a schedule. Gradients are not clipped: these don't see their scale."""
    return mock.patch.object(
        step, "make_optimizer", lambda config, spent=None: make(make_schedule(config, spent))
    )


def readout(activation: Callable, *, layers: int = 1, scale: float = 1.0) -> Patch:
    """With another activation, residual layers behind the first, or larger initial weights."""
    start = PatchWave.__init__

    def init(self, config, *, rngs, **kwargs):
        start(self, config, rngs=rngs, **kwargs)
        self.readout.kernel[...] = self.readout.kernel[...] * scale
        width = config.readout_width
        self.more = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(layers - 1)])

    def hidden(self, states, skip, conditioning, key=None):
        x = self.norm(states if skip is None else states + skip).astype(states.dtype)
        x = activation(self.readout(self.head.readout_inputs(x, *conditioning)))
        for layer in self.more:
            x = x + activation(layer(x))
        return x

    return mock.patch.multiple(PatchWave, __init__=init, hidden=hidden)


@contextlib.contextmanager
def average(decay: float) -> Iterator[None]:
    """Validates an exponential average of the weights; its first steps weigh what there is."""
    update, validate = step.Step.update, train.Validator.validate
    mix, kept, steps = jax.jit(optax.incremental_update), None, 0

    def update_average(made, *args):
        nonlocal kept, steps
        state, metrics = update(made, *args)
        steps += 1
        new = 1 - min(decay, steps / (steps + 9))
        kept = mix(state["params"], state["params"] if kept is None else kept, new)
        return state, metrics

    def validate_average(validator, run, metrics, folder):
        own = run.state
        run.state = {**own, "params": kept}
        try:
            return validate(validator, run, metrics, folder)
        finally:
            run.state = own

    with (
        mock.patch.object(step.Step, "update", update_average),
        mock.patch.object(train.Validator, "validate", validate_average),
    ):
        yield


TRIED: dict[str, tuple[Callable[[], Patch], dict[str, Any]]] = {
    ablations.RECIPE: (contextlib.nullcontext, {}),
    "Lion, learning rate 8e-4": (
        lambda: optimizer(optax.lion),
        {"train.learning_rate": 8e-4, "train.final_learning_rate": 8e-6},
    ),
    "Muon, learning rate 4e-3": (lambda: optimizer(optax.contrib.muon), {}),
    "weights averaged, 0.9": (lambda: average(0.9), {}),
    "constant learning rate, weights averaged, 0.95": (lambda: average(0.95), CONSTANT),
    "readout with GELU": (lambda: readout(jax.nn.gelu), {}),
    "readout of two layers": (lambda: readout(jax.nn.relu, layers=2), {}),
    "readout initialised for ReLU": (lambda: readout(jax.nn.relu, scale=2**0.5), {}),
}


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Parses the command line, trains, prints."""
    args = ablations.make_parser("python -m benchmarks.tried", __doc__).parse_args(argv)
    rows = []
    for name, (patch, changes) in TRIED.items():
        folder = ablations.make_folder(args, name) / "seed0"
        with patch():
            last, _ = ablations.run(ablations.make_config(changes, args, 0), folder)
        rows.append({"variant": name, **last})
    print(json.dumps(rows, indent=1))
    print(f"\n| variant | bits after {args.steps * 32_000:,} targets |\n|---|--:|")
    for row in rows:
        print(f"| {row['variant']} | {row['nll_bits']:.3f} |")


if __name__ == "__main__":
    main()
