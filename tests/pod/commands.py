"""Runs several commands in one process of a cluster: `commands.py "evaluate --x" "score --y"`."""

import importlib
import shlex
import sys

from patchwave_jax.runtime import distributed


def main() -> None:
    for line in sys.argv[1:]:
        name, *arguments = shlex.split(line)
        importlib.import_module(f"patchwave_jax.{name}").main(arguments)


if __name__ == "__main__":
    distributed.run(main)
