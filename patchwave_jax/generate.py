"""Generates audio from a trained model, of any length, from a prompt or from silence.

    python -m patchwave_jax.generate --workdir=DIR --seconds=10 --num=4 --out=DIR
    python -m patchwave_jax.generate --workdir=DIR --prompt=my.wav --prompt_seconds=4 \\
        --seconds=20 --temperature=0.95 --top_p=0.98 --seed=1 --out=DIR
    python -m patchwave_jax.generate --out=DIR --resume
    python -m patchwave_jax.generate --workdir=DIR --check

The WAV files can be played while they grow. Ctrl-C and SIGTERM leave them valid, and `--resume`
continues to the same audio as without the stop. The same seed gives the same audio on the same
machine; clip i draws from its own stream of random numbers, whatever the other clips are. (With
another `--num` matrix products round differently, which occasionally changes a draw.)
"""

import argparse
import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from patchwave_jax.data import audio, quantisers
from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.errors import UserError, exits_cleanly
from patchwave_jax.evaluation.evaluator import Evaluator, load
from patchwave_jax.flags import argument_parser
from patchwave_jax.generation.check import check
from patchwave_jax.generation.clips import Outputs, write_wav
from patchwave_jax.generation.prompts import Settings, encode, open_data, read_prompts
from patchwave_jax.generation.sampler import Sampler
from patchwave_jax.runtime import distributed
from patchwave_jax.runtime.signals import stop_requested
from patchwave_jax.runtime.storage import is_url
from patchwave_jax.runtime.workdir import as_path

REPORT_SECONDS = 10.0  # between lines of progress


def start(
    settings: Settings, out: Path, evaluator: Evaluator, params: Any, step: int
) -> tuple[Sampler, Outputs]:
    """A sampler primed with the prompts, and files that hold them."""
    config = evaluator.config
    prompts = read_prompts(settings, config)
    codes = encode(prompts, config.data.quantiser)
    sampler = make_sampler(settings, evaluator, params)
    shared = {
        "checkpoint": str(as_path(settings.workdir)),
        "step": step,
        "objective": config.objective,
        "context_samples": config.context_samples,
        "stride_patches": sampler.stride_patches,
        "quantiser": config.data.quantiser,
    }
    asked = dataclasses.asdict(settings)
    outputs = Outputs.create(out, asked, shared, [p.source for p in prompts], codes)
    for clip, prompt in enumerate(prompts):
        if prompt.original is not None:
            write_wav(outputs.path(clip, "_original.wav"), prompt.original)
    sampler.prime(codes, codes.shape[1])
    return sampler, outputs


def make_mesh(num: int) -> Mesh:
    """A mesh of this process' devices for `num` streams; on a CPU, of cores."""
    with contextlib.suppress(RuntimeError):  # JAX is already initialised
        if jax.config.jax_num_cpu_devices < 1:  # pyright: ignore
            jax.config.update("jax_num_cpu_devices", min(num, os.cpu_count() or 1))
    devices, kinds = jax.local_devices()[:num], (AxisType.Auto,)
    return jax.make_mesh((len(devices),), ("data",), axis_types=kinds, devices=devices)


def make_sampler(settings: Settings, evaluator: Evaluator, params: Any) -> Sampler:
    return Sampler(
        evaluator.config,
        params,
        evaluator.mesh,
        num=settings.num,
        sampling=settings.sampling(),
        stride_patches=settings.stride_patches,
    )


def resume(sampler: Sampler, outputs: Outputs, stopping: Callable[[], bool]) -> None:
    """Brings a sampler to the end of the files by repeating the computations that made them."""
    end = outputs.made
    at = sampler.rewind(end, outputs.record["prompt_samples"])
    sampler.prime(outputs.codes(max(0, at - sampler.lookback), at), at)
    while sampler.position < end and not stopping():
        ahead = min(end, sampler.position + 100_000)
        given = outputs.codes(sampler.position, ahead)
        first = sampler.position
        while sampler.position < ahead and not stopping():
            sampler.run(given=given[:, sampler.position - first :])


def generate(sampler: Sampler, outputs: Outputs, total: int, stopping: Callable[[], bool]) -> None:
    """Generates up to `total` samples per clip, or until `stopping`."""
    begin = reported = time.monotonic()
    first, compiled = sampler.position, False
    while sampler.position < total and not stopping():
        outputs.append(*sampler.run(total - sampler.position))
        if not compiled:  # without compilation from here on
            begin, first, compiled = time.monotonic(), sampler.position, True
        elif (now := time.monotonic()) - reported > REPORT_SECONDS:
            reported = now
            rate = sampler.num * (sampler.position - first) / (now - begin)
            print(
                f"{outputs.made / SAMPLE_RATE:.1f} of {total / SAMPLE_RATE:.1f} seconds, "
                f"{rate:,.0f} samples/s",
                flush=True,
            )


def report(outputs: Outputs) -> str:
    """The clips, with their bits per generated sample."""
    lines = []
    for clip in range(len(outputs.record["clips"])):
        bits = outputs.describe(clip)["bits_per_sample"]
        told = "" if bits is None else f", {bits:.4f} bits per sample generated"
        lines.append(f"{outputs.path(clip, '.wav')}: {outputs.made / SAMPLE_RATE:g} s{told}")
    return "\n".join(lines)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The flags; those of `Settings` only if they were given."""
    parser = argument_parser("generate", __doc__, argument_default=argparse.SUPPRESS)
    add = parser.add_argument
    add("--workdir", help="the training run's directory")
    add("--step", type=int, help="checkpoint; default: the best on validation")
    add("--out", default="", help="where the clips go; a new or empty directory")
    add("--num", type=int, help="clips; default: 1, or one per --prompt; prompts take turns")
    add("--seconds", type=float, help="to generate, after the prompt (default: 10)")
    add("--seed", type=int, help="seed of the random numbers (default: 0)")
    add(
        "--temperature",
        type=float,
        help="temperature of the distribution; 0: the likeliest code (default: 1)",
    )
    add("--top_k", type=int, help="draw from the k likeliest codes; 0: all (default)")
    add("--top_p", type=float, help="draw from the likeliest codes with this total probability")
    add("--prompt", nargs="+", help="audio files to continue")
    add("--prompt_seconds", type=float, help="seconds to use of each prompt (default: all)")
    add("--prompt_split", help="continue --num excerpts spread over this split of the data")
    add("--data_dir", help="where the dataset is; default: as in training")
    add(
        "--stride_patches", type=int, help="patches the full context slides by; default: evaluate's"
    )
    add("--plots", action="store_true", default=False, help="also draw each clip, as NNN.png")
    add("--resume", action="store_true", default=False, help="continue the clips in --out")
    add("--check", action="store_true", default=False, help="compare with the evaluation, and exit")
    return parser.parse_args(argv)


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    args = vars(parse(argv))
    out, plots, resuming, checking = (args.pop(k) for k in ("out", "plots", "resume", "check"))
    if not out and not checking:
        raise UserError("--out is missing: where to put the clips")
    if is_url(out):
        raise UserError(f"--out={out} must be a local folder: clips grow as they are made")
    outputs = Outputs.resume(Path(out)) if resuming else None
    if outputs:
        settings, step = resumed_settings(outputs, args), outputs.record["shared"]["step"]
    elif "workdir" not in args:
        raise UserError("--workdir is missing: the directory of the training run")
    else:
        args.setdefault("num", max(1, len(args.get("prompt", []))))
        settings, step = Settings(**args), args.get("step")
    settings.check()
    evaluator, params, step = load(settings.workdir, step, make_mesh(settings.num))
    if not distributed.is_first():
        return  # all processes read the checkpoint, the first generates
    if checking:
        sys.exit(0 if run_check(settings, evaluator, params) else 1)
    with stop_requested() as stopping:
        if outputs:
            print(f"resuming from {outputs.made / SAMPLE_RATE:g} seconds", flush=True)
            sampler = make_sampler(settings, evaluator, params)
            resume(sampler, outputs, stopping)
        else:
            sampler, outputs = start(settings, Path(out), evaluator, params, step)
        total = outputs.record["prompt_samples"] + round(settings.seconds * SAMPLE_RATE)
        generate(sampler, outputs, total, stopping)
    if plots:
        from patchwave_jax.reporting import spectrogram as drawing  # matplotlib is slow to import

        for clip in range(settings.num):
            path = outputs.path(clip, ".wav")
            drawing.plot(path, outputs.record["prompt_samples"], path.name)
    print(report(outputs), flush=True)
    if outputs.made < total:
        print(
            "stopped by a signal; the files are valid. Continue with:\n"
            f"  python -m patchwave_jax.generate --out={out} --resume",
            flush=True,
        )


def resumed_settings(outputs: Outputs, given: dict[str, Any]) -> Settings:
    """The run's own settings; only `--seconds` may change."""
    own = outputs.record["settings"]
    for name, value in given.items():
        if name != "seconds" and value != own[name]:
            raise UserError(
                f"--resume continues with --{name}={own[name]}, got {value}; omit the flag"
            )
    outputs.record["settings"] = own = own | given
    return Settings(**own)


def run_check(settings: Settings, evaluator: Evaluator, params: Any) -> bool:
    """Prints whether generation and evaluation agree on this checkpoint."""
    config = evaluator.config
    if settings.prompt:
        pcm = np.concatenate([audio.read(path) for path in settings.prompt])
    else:
        split = open_data(settings, config, settings.prompt_split or "test")
        needed = config.context_samples
        longest = max(range(len(split.recordings)), key=lambda i: split.recordings[i].num_samples)
        pcm = split.read(longest, 0, min(needed, split.recordings[longest].num_samples))
    codes = quantisers.get(config.data.quantiser).encode(pcm)
    found = check(
        evaluator, params, codes, seed=settings.seed, stride_patches=settings.stride_patches
    )
    print(found)
    return found.passed


if __name__ == "__main__":
    distributed.run(main)
