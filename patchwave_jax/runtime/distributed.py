"""Several processes that run one command together: how they start, share batches, and stop.

On Cloud TPU, GKE and Slurm (`srun`) JAX detects the cluster. Elsewhere three variables define it:
`JAX_COORDINATOR_ADDRESS=HOST:PORT`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. All processes run the
same program; each reads and places its own rows of every batch, and only the first prints and
writes. Without a cluster there is one process, and nothing here communicates.
"""

import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import UInt8

from patchwave_jax.errors import UserError, exits_cleanly

_COUNT, _ID, _ADDRESS = "JAX_NUM_PROCESSES", "JAX_PROCESS_ID", "JAX_COORDINATOR_ADDRESS"


def run(main: Callable[[], None], *, agrees_to_stop: bool = False) -> None:
    """Runs a command in all processes of a cluster, or alone.

    With `agrees_to_stop`, `stop_agreed` reports SIGTERM; otherwise it ends the process. A process
    that fails exits at once, without waiting for the others, which would wait for it in turn.
    """
    keep_compilations()
    jax.config.update("jax_enable_preemption_service", agrees_to_stop)
    exits_cleanly(start)()
    if jax.process_count() == 1:
        main()
        return
    code: Any = 0
    try:
        try:
            main()
        except SystemExit as end:
            code = end.code
        if not code:
            wait_for_all("end")
    except BaseException:
        traceback.print_exc()
        print(
            f"error: process {jax.process_index()} of {jax.process_count()} failed, and the others "
            "will stop; the same command resumes from the last checkpoint",
            file=sys.stderr,
        )
        code = 1
    if code:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def start() -> None:
    """Joins the processes of a cluster; only the first one keeps its standard output.

    Raises:
      UserError: if the variables that define the cluster are incomplete or wrong.
    """
    given = {name: os.environ[name] for name in (_COUNT, _ID) if name in os.environ}
    if given.get(_COUNT) == "1":
        return
    numbers: dict[str, Any] = {}
    if given:
        for name in (_ADDRESS, _COUNT, _ID):
            if not os.environ.get(name):
                raise UserError(f"{name} is not set, but {next(iter(given))} is; set all or none")
        for name, text in given.items():
            if not text.isdecimal():
                raise UserError(f"{name} must be a number, got {text!r}")
        if int(given[_ID]) >= int(given[_COUNT]):
            raise UserError(f"{_ID} is {given[_ID]}, but {_COUNT} is only {given[_COUNT]}")
        numbers = {"num_processes": int(given[_COUNT]), "process_id": int(given[_ID])}
    try:
        jax.distributed.initialize(**numbers)
    except ValueError as error:
        if "coordinator_address should be defined" not in str(error):
            raise
        return  # no cluster
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def own_rows(mesh: Mesh, total: int) -> list[int]:
    """Rows of a batch of `total` rows that this process' devices hold, in ascending order."""
    held = NamedSharding(mesh, PartitionSpec("data")).addressable_devices_indices_map((total,))
    return sorted({row for index in held.values() if index for row in range(total)[index[0]]})


def place_rows(mesh: Mesh, rows: UInt8[np.ndarray, "b T"], total: int) -> Any:
    """A global batch of `total` rows for a jitted function, from this process' own `rows`."""
    if jax.process_count() == 1:
        return rows  # jit shards them
    own, sharding = own_rows(mesh, total), NamedSharding(mesh, PartitionSpec("data"))

    def shard(index: Any) -> np.ndarray:
        wanted = range(total)[index[0]]
        first = own.index(wanted[0])
        return np.array(rows[first : first + len(wanted)])

    return jax.make_array_from_callback((total, *rows.shape[1:]), sharding, shard)


def to_host(tree: Any) -> Any:
    """Global arrays in this host's memory. Collective: all processes must call it."""

    def gather(x: Any) -> Any:
        split = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if split else jax.device_get(x)

    return jax.tree.map(gather, tree)


def process_min(value: float) -> float:
    """The minimum of `value` over all processes. Collective: all processes must call it."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.process_allgather(np.float32(value)).min())


def from_first(value: float) -> float:
    """The first process' `value`. Collective: all processes must call it."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.broadcast_one_to_all(np.float32(value)))


def all_agree(value: bool) -> bool:
    """Whether `value` is true in every process. Collective: all processes must call it."""
    return process_min(float(value)) == 1


def wait_for_all(name: str) -> None:
    """A barrier called `name`: returns when all processes have reached it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def stop_agreed(step: int, stopping: Callable[[], bool]) -> bool:
    """Whether to stop after `step`: a signal to any process stops all of them at the same step."""
    if jax.process_count() == 1:
        return stopping()
    return multihost_utils.reached_preemption_sync_point(step)


def keep_compilations() -> None:
    """Has JAX cache compiled programs in `~/.cache/patchwave_jax/compiled`, for faster starts.

    `JAX_COMPILATION_CACHE_DIR` names another place, `JAX_ENABLE_COMPILATION_CACHE=0` turns it off.
    """
    if jax.config.jax_compilation_cache_dir is None:  # pyright: ignore
        folder = Path.home() / ".cache/patchwave_jax/compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
