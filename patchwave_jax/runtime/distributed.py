"""Several processes that run one command together: who is who, whose rows, and a common end.

On Cloud TPU, GKE and Slurm (`srun`) JAX finds out by itself. Elsewhere three variables say it:
`JAX_COORDINATOR_ADDRESS=HOST:PORT`, `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`. All processes compute
the same; each reads and places its own rows of every batch, and only the first prints and writes.
Without a cluster there is one process, and nothing here communicates.
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

    With `agrees_to_stop` SIGTERM is for `stop_agreed` to tell; else it ends the process. One that
    fails leaves at once, which the others notice: to wait for them were to wait for each other.
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
            f"error: process {jax.process_index()} of {jax.process_count()} ends, and the others "
            "will; the same command goes on from the last checkpoint",
            file=sys.stderr,
        )
        code = 1
    if code:
        sys.stdout.flush()
        os._exit(code if isinstance(code, int) else 1)


def start() -> None:
    """Joins the processes of a cluster; all but the first are silenced.

    Raises:
      UserError: if the variables that name them are incomplete or wrong.
    """
    given = {name: os.environ[name] for name in (_COUNT, _ID) if name in os.environ}
    if given.get(_COUNT) == "1":
        return
    numbers: dict[str, Any] = {}
    if given:
        for name in (_ADDRESS, _COUNT, _ID):
            if not os.environ.get(name):
                raise UserError(f"{name} is not set, but {next(iter(given))} is; set both or none")
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
        return  # there is no cluster
    if jax.process_index() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def is_first() -> bool:
    """Whether this is the process that prints and writes."""
    return jax.process_index() == 0


def own_rows(mesh: Mesh, total: int) -> list[int]:
    """Rows of a batch of `total` that this process' devices hold, in their order."""
    held = NamedSharding(mesh, PartitionSpec("data")).addressable_devices_indices_map((total,))
    return sorted({row for index in held.values() if index for row in range(total)[index[0]]})


def place_rows(mesh: Mesh, rows: UInt8[np.ndarray, "b T"], total: int) -> Any:
    """A batch of `total` rows, to be given to a jitted function, from this process' own `rows`."""
    if jax.process_count() == 1:
        return rows  # which a jitted function splits by itself
    own, sharding = own_rows(mesh, total), NamedSharding(mesh, PartitionSpec("data"))

    def piece(index: Any) -> np.ndarray:
        wanted = range(total)[index[0]]
        first = own.index(wanted[0])
        return np.array(rows[first : first + len(wanted)])

    return jax.make_array_from_callback((total, *rows.shape[1:]), sharding, piece)


def fetch(tree: Any) -> Any:
    """Arrays, whole, in the host's memory; all that hold parts of one have to ask."""

    def whole(x: Any) -> Any:
        split = isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)
        return multihost_utils.process_allgather(x, tiled=True) if split else jax.device_get(x)

    return jax.tree.map(whole, tree)


def process_min(value: float) -> float:
    """The smallest `value` of all processes; all have to call it."""
    if jax.process_count() == 1:
        return value
    return float(multihost_utils.process_allgather(np.float32(value)).min())


def all_agree(yes: bool) -> bool:
    """Whether it is so in every process; all have to ask."""
    return process_min(float(yes)) == 1


def wait_for_all(what: str) -> None:
    """Returns once all processes are at the same point."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def stop_agreed(step: int, stopping: Callable[[], bool]) -> bool:
    """Whether to stop after `step`: a signal to any process stops all of them at one step."""
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
