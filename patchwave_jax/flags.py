"""Command lines: a parser for most commands, and that of training, which the planner shares."""

import argparse
import sys
from pathlib import Path
from typing import Any, NamedTuple

from absl import flags
from ml_collections import config_flags

from patchwave_jax.config import Config
from patchwave_jax.config_dict import from_config_dict
from patchwave_jax.errors import UserError
from patchwave_jax.runtime import profiler

_CONFIGS = (
    "configs/demo.py, laptop.py, ctx128k.py, ctx512k.py, ctx1m.py (or ctx128k.py:dense ...), "
    "wavenet.py, samplernn.py, sashimi.py, megabyte.py"
)


def argument_parser(command: str, about: str | None, **options: Any) -> argparse.ArgumentParser:
    """The parser of `python -m patchwave_jax.COMMAND`, whose help begins with `about`."""
    return argparse.ArgumentParser(
        f"python -m patchwave_jax.{command}",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **options,
    )


class Command(NamedTuple):
    """What a command line asks for."""

    config: Config
    workdir: str
    profile_steps: profiler.Steps | None
    print_config: bool


def parse(argv: list[str], about: str | None) -> Command:
    """Parses the command line of training; `about` is the text of its `--help`.

    Raises:
      UserError: naming the flag or the configuration's field that is wrong.
    """
    values = flags.FlagValues()
    config = config_flags.DEFINE_config_file(
        "config",
        None,
        "A file in configs/, such as configs/ctx128k.py:dense. Its fields are listed in "
        "patchwave_jax/config.py; set one with --config.train.batch_size=8.",
        flag_values=values,
        sys_argv=argv,
    )
    workdir = flags.DEFINE_string(
        "workdir",
        None,
        "Directory of the run: a folder, or gs://BUCKET/DIR; default: runs/CONFIG.",
        flag_values=values,
    )
    profile_steps = flags.DEFINE_string(
        "profile_steps",
        None,
        "FIRST:LAST, such as 10:13: steps to trace into WORKDIR/profile, for TensorBoard or XProf.",
        flag_values=values,
    )
    print_config = flags.DEFINE_bool(
        "print_config", False, "Print the configuration, and exit.", flag_values=values
    )
    wants_help = flags.DEFINE_bool("help", False, "Show this message.", flag_values=values)
    try:
        rest = values(argv)[1:]
        tree = config.value
        if tree is not None:
            tree.to_dict()  # raises for a file that can't be loaded
    except Exception as error:  # from absl, ml_collections or the file itself
        given = [flag.removeprefix("--config=") for flag in argv if flag.startswith("--config=")]
        name = given[-1].split(":")[0] if given else ""
        if isinstance(error, OSError) and not Path(name).is_file():
            raise UserError(
                f"--config={name} is not a file; the built-in ones are {_CONFIGS}"
            ) from error
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        told = " ".join(lines if len(lines) < 4 else lines[-1:]) or type(error).__name__
        raise UserError(f"--config: {told}; see --help") from error
    if wants_help.value:
        print(f"{about}\n{values.get_help()}")
        sys.exit()
    if rest:
        raise UserError(f"unknown argument {rest[0]!r}; see --help")
    if tree is None:
        raise UserError(f"--config is missing; the built-in ones are {_CONFIGS}")
    name = Path(values["config"].config_filename).stem  # pyright: ignore
    steps = profiler.parse_steps(profile_steps.value) if profile_steps.value is not None else None
    return Command(
        from_config_dict(tree), workdir.value or f"runs/{name}", steps, bool(print_config.value)
    )
