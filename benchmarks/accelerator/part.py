"""The cases of one part: `python -m benchmarks.accelerator.part PART FILE`.

Every case gets a line of FILE when it begins, and another with what it found.
"""

import argparse
import json
import os
import time
from pathlib import Path

import jax

from benchmarks.accelerator import correctness, speed
from benchmarks.accelerator.common import Found

PARTS = {
    function.__name__: function
    for function in (
        speed.device, correctness.correctness, speed.convolutions, speed.predictors, speed.steps,
        speed.generation, speed.pipeline, correctness.parity,
    )
}  # fmt: skip


def main() -> None:
    """Runs the cases of one part."""
    parser = argparse.ArgumentParser("python -m benchmarks.accelerator.part", description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("file", type=Path)
    parser.add_argument("--skip", action="append", default=[])
    parser.add_argument("--only")
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    if cache := os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", cache)

    def tell(row: Found) -> None:
        with args.file.open("a") as file:
            file.write(json.dumps(row) + "\n")

    for name, run in PARTS[args.part](args.small):
        if name in args.skip or (args.only and name != args.only):
            continue
        tell({"case": name, "error": "not finished"})
        begin = time.monotonic()
        try:
            found = run()
        except Exception as error:
            found = {"error": f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"}
        tell({"case": name, **found, "took_seconds": round(time.monotonic() - begin, 1)})


if __name__ == "__main__":
    main()
