"""NLL of a trained model on a split: `python -m patchwave_jax.evaluate --workdir=DIR --split=test`.

Prints nats and bits per sample with the quantiser, the number of targets and the context they
had. The protocol is that of `patchwave_jax.sliding`.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from patchwave_jax import sliding
from patchwave_jax.data.build import ensure_built
from patchwave_jax.data.index import open_split
from patchwave_jax.data.manifest import default_data_dir
from patchwave_jax.errors import exits_cleanly


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m patchwave_jax.evaluate", description=__doc__)
    parser.add_argument("--workdir", required=True, help="the run's directory")
    parser.add_argument("--split", default="validation", help="train, validation or test")
    parser.add_argument("--step", type=int, help="checkpoint; default: the best on validation")
    parser.add_argument(
        "--stride_patches",
        type=int,
        help="patches a window advances by; default: half the context ('dense'), 1 ('last')",
    )
    parser.add_argument("--clip_samples", type=int, help="cut recordings into clips of this length")
    parser.add_argument(
        "--max_targets", type=int, default=0, help="about so many, spread evenly; 0: all"
    )
    parser.add_argument("--data_dir", help="where the dataset is; default: as in training")
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    args = parser.parse_args(argv)

    evaluator, params, step = sliding.load(args.workdir, args.step)
    data = evaluator.config.data
    data_dir = args.data_dir or data.data_dir or default_data_dir()
    ensure_built(data.dataset, data_dir)
    split = open_split(data_dir, data.dataset, args.split)
    result = sliding.evaluate_split(
        evaluator,
        params,
        split,
        stride_patches=args.stride_patches,
        clip_samples=args.clip_samples,
        max_targets=args.max_targets,
    )
    print(f"{data.dataset} {args.split}, step {step}: {result}")
    if args.json:
        record = dataclasses.asdict(result) | {"split": args.split, "step": step}
        record |= {"dataset": data.dataset, "manifest_hash": split.manifest_hash}
        args.json.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
