"""`patchwave_jax.train`, for which a process is dead after 10 seconds of silence and not 100."""

import functools

import jax

from patchwave_jax import train
from patchwave_jax.runtime import distributed

if __name__ == "__main__":
    jax.distributed.initialize = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=10
    )
    distributed.run(train.main, agrees_to_stop=True)
