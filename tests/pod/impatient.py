"""`patchwave_jax.train` with a heartbeat timeout of 10 seconds instead of 100."""

import functools

import jax

from patchwave_jax import train
from patchwave_jax.runtime import distributed

if __name__ == "__main__":
    jax.distributed.initialize = functools.partial(
        jax.distributed.initialize, heartbeat_timeout_seconds=10
    )
    distributed.run(train.main, agrees_to_stop=True)
