"""`patchwave_jax.train` whose second process has a clock that runs a million times too fast."""

import time
import types

import jax

from patchwave_jax import train
from patchwave_jax.runtime import distributed


def monotonic() -> float:
    return time.monotonic() * (1e6 if jax.process_index() else 1)


if __name__ == "__main__":
    vars(train)["time"] = types.SimpleNamespace(monotonic=monotonic)
    distributed.run(train.main, agrees_to_stop=True)
