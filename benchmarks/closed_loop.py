"""Does what a model generates stay piano? Continuations judged against the real ones: JSON.

    python -m benchmarks.closed_loop --workdir=DIR --out=DIR

Prompts of held-out music are continued at temperature 1 without truncation, and each second is
compared with the music that really came (`patchwave_jax.reporting.closed_loop` has the limits).
`--out` gets the clips, `closed_loop.json`, and a page with players and spectrograms side by side.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from jaxtyping import Float32, Int16, UInt8

from patchwave_jax.config import Config
from patchwave_jax.data import quantisers
from patchwave_jax.data.audio import SAMPLE_RATE
from patchwave_jax.errors import UserError, exits_cleanly
from patchwave_jax.evaluation import evaluator, protocol
from patchwave_jax.generation.prompts import Prompt, Settings, encode, read_prompts
from patchwave_jax.generation.sampler import Sampler
from patchwave_jax.reporting import closed_loop
from patchwave_jax.reporting.closed_loop import Seconds
from patchwave_jax.reporting.spectrogram import frames_at, mel_spectrogram, show_mel

PAGE = """<!doctype html><meta charset="utf-8"><title>Closed loop</title>
<style>body{{font-family:sans-serif;max-width:75em;margin:auto}}img{{width:100%}}</style>
<h1>{title}</h1><pre>{table}</pre>{clips}"""
CLIP = """<h2>{number}: {verdict}</h2><p>{source}</p>
<p>generated <audio controls src="{number}.flac"></audio>
real <audio controls src="{number}_real.flac"></audio></p><img src="{number}.png">"""


def generate(
    loaded: evaluator.Evaluator, params: Any, prompts: list[Prompt], settings: Settings
) -> tuple[UInt8[np.ndarray, "B T"], Float32[np.ndarray, "B T"]]:
    """Continuations of all prompts, and the log-probabilities of their samples."""
    sampler = Sampler(
        loaded.config, params, loaded.mesh, num=len(prompts), sampling=settings.sampling()
    )
    known = encode(prompts, loaded.config.data.quantiser)
    sampler.prime(known, known.shape[1])
    count, pieces = round(settings.seconds * SAMPLE_RATE), []
    while count > 0:
        pieces.append(sampler.run(count))
        count -= pieces[-1][0].shape[1]
    codes, log_probs = (np.concatenate(parts, 1) for parts in zip(*pieces, strict=True))
    return codes, log_probs


def real_bits(loaded: evaluator.Evaluator, params: Any, prompts: list[Prompt]) -> float:
    """Bits per sample of the music that really follows the prompts."""
    config = loaded.config
    quantiser = quantisers.get(config.data.quantiser)
    codes = [quantiser.encode(p.original) for p in prompts if p.original is not None]
    first = prompts[0].pcm.size
    windows = protocol.plan([c.size for c in codes], config, protocol.default_stride(config))
    windows = [window for window in windows if window.end > first]
    total = count = 0.0
    for scored in loaded.score(params, codes.__getitem__, windows):
        kept = scored.log_probs[max(0, first - scored.window.first) :]
        total, count = total - float(kept.sum()), count + kept.size
    return total / count / np.log(2)


def summary(clips: list[tuple[Seconds, Seconds, Seconds]]) -> list[dict[str, Any]]:
    """A row of measurements for each clip: prompt, generated and real."""
    rows = []
    for prompt, made, real in clips:
        mel = np.sqrt(np.square(made.mel_db - real.mel_db).mean(1))
        rows.append(
            {
                "fails": closed_loop.judge(prompt, made, real),
                "dbfs": [round(float(x.dbfs.mean()), 1) for x in (made, real)],
                "loudest_dbfs": [round(float(x.dbfs.max()), 1) for x in (prompt, made, real)],
                "treble_db": [round(float(np.median(x.treble_db)), 1) for x in (made, real)],
                "flatness": [round(float(np.median(x.flatness)), 5) for x in (made, real)],
                "onsets_per_second": [round(float(x.onsets.mean()), 2) for x in (made, real)],
                "mel_distance_db": round(float(mel.mean()), 1),
            }
        )
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as text; pairs are generated and real."""
    names = [name for name in rows[0] if name != "fails"]
    lines = ["clip  " + "".join(f"{name:>22}" for name in names) + "  verdict"]
    for number, row in enumerate(rows):
        cells = (row[name] for name in names)
        texts = (" ".join(map(str, c)) if isinstance(c, list) else str(c) for c in cells)
        verdict = "; ".join(row["fails"]) or "pass"
        lines.append(f"{number:>4}  " + "".join(f"{t:>22}" for t in texts) + "  " + verdict)
    return "\n".join(lines)


def picture(path: Path, made: Int16[np.ndarray, " T"], prompt: Prompt) -> None:
    """Mel spectrograms of prompt and continuation, generated above and real below."""
    from matplotlib.figure import Figure

    assert prompt.original is not None
    figure = Figure(figsize=(14, 6), layout="constrained")
    panels = figure.subplots(2, sharex=True)
    both = np.concatenate([prompt.pcm, made]), prompt.original
    for axes, pcm, title in zip(panels, both, ("generated", "real"), strict=True):
        power = mel_spectrogram(frames_at(pcm, np.arange(0, pcm.size, 256)))
        show_mel(axes, power, pcm.size / SAMPLE_RATE, vmin=-90, vmax=-10)
        axes.axvline(prompt.pcm.size / SAMPLE_RATE, color="red", linewidth=1)
        axes.set(title=title, ylabel="mel band, to 8 kHz")
    figure.savefig(path, dpi=80)


def write(
    out: Path, prompts: list[Prompt], pcm: Int16[np.ndarray, "B T"], found: dict[str, Any]
) -> None:
    """The clips, their pictures, a page of both, and the measurements."""
    out.mkdir(parents=True)
    parts = []
    for i, (prompt, made, row) in enumerate(zip(prompts, pcm, found["rows"], strict=True)):
        assert prompt.original is not None
        number, whole = f"{i:02}", np.concatenate([prompt.pcm, made])
        soundfile.write(out / f"{number}.flac", whole, SAMPLE_RATE)
        soundfile.write(out / f"{number}_real.flac", prompt.original, SAMPLE_RATE)
        picture(out / f"{number}.png", made, prompt)
        verdict = "; ".join(row["fails"]) or "pass"
        parts.append(CLIP.format(number=number, verdict=verdict, source=prompt.source))
    title = f"{found['failed']} of {found['clips']} continuations fail"
    page = PAGE.format(title=title, table=table(found["rows"]), clips="\n".join(parts))
    (out / "index.html").write_text(page)
    (out / "closed_loop.json").write_text(json.dumps(found, indent=1))


@exits_cleanly
def main(argv: list[str] | None = None) -> None:
    """Prints the judgement of every clip."""
    parser = argparse.ArgumentParser("python -m benchmarks.closed_loop", description=__doc__)
    parser.add_argument("--workdir", required=True, metavar="DIR")
    parser.add_argument("--out", metavar="DIR", help="for clips and the page; default: none")
    parser.add_argument("--split", default="test", help="of the prompts")
    parser.add_argument("--num", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--prompt_seconds", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data_dir", metavar="DIR", help="default: the run's")
    args = parser.parse_args(argv)
    out = Path(args.out) if args.out else None
    if out and out.exists():
        raise UserError(f"--out={out} exists; give another folder, or remove it")
    loaded, params, step = evaluator.load(args.workdir)
    config: Config = loaded.config
    settings = Settings(
        workdir=args.workdir,
        num=args.num,
        seconds=args.seconds,
        seed=args.seed,
        prompt_split=args.split,
        prompt_seconds=args.prompt_seconds,
        data_dir=args.data_dir,
    )
    settings.check()
    prompts = read_prompts(settings, config)
    codes, log_probs = generate(loaded, params, prompts, settings)
    pcm = quantisers.get(config.data.quantiser).decode(codes)
    clips = []
    for prompt, made in zip(prompts, pcm, strict=True):
        assert prompt.original is not None
        pieces = prompt.pcm, made, prompt.original[prompt.pcm.size :]
        clips.append(tuple(closed_loop.measure(piece) for piece in pieces))
    rows = summary(clips)
    failed = sum(bool(row["fails"]) for row in rows)
    found = {
        "step": step,
        "quantiser": config.data.quantiser,
        "context_samples": config.context_samples,
        "settings": dataclasses.asdict(settings),
        "failed": failed,
        "clips": len(rows),
        "bits_generated": round(float(-log_probs.mean() / np.log(2)), 4),
        "bits_real": round(real_bits(loaded, params, prompts), 4),
        "rows": rows,
    }
    if out:
        write(out, prompts, pcm, found)
    print(table(rows))
    print(json.dumps({name: value for name, value in found.items() if name != "rows"}, indent=1))


if __name__ == "__main__":
    main()
