"""The evaluate command: accumulated NLLs, intervals, classical baselines, bad input."""

import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from scipy.signal import lfilter
from small_run import PATCHES, SIZE, make_config, make_data, make_run, tones

from patchwave_jax import evaluate
from patchwave_jax.data import quantisers
from patchwave_jax.data.index import Recording, SourceFile, open_split
from patchwave_jax.data.windows import Clip
from patchwave_jax.errors import EXIT_CODE, UserError
from patchwave_jax.evaluation import classical_cache, measure, nll, protocol
from patchwave_jax.evaluation import evaluator as evaluator_module
from patchwave_jax.evaluation.nll import LN2, NllAccumulator, bootstrap
from patchwave_jax.runtime.mesh import make_mesh


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data_dir):
    return make_run(tmp_path_factory.mktemp("run"), make_config(data_dir))


# Intervals.


def coverage(make, trials: int) -> float:
    """How often the 95% interval of synthetic data with mean 1 holds the 1."""
    hits = 0
    for trial in range(trials):
        sums, counts = make(np.random.default_rng(trial))
        low, high = bootstrap(sums[:, None], counts[:, None], resamples=500, seed=trial)
        hits += low[0] <= 1 <= high[0]
    return hits / trials


def test_the_interval_covers_the_truth_at_its_rate_over_recordings():
    """Recordings of unequal length, each with a level of its own."""

    def make(rng):
        lengths = rng.uniform(1, 3, 12)
        return lengths * (1 + rng.normal(0, 0.3, 12)), lengths

    # 600 trials: a standard error of 0.009.
    assert 0.92 < coverage(make, 600) < 0.98


def test_the_interval_covers_the_truth_at_its_rate_over_blocks(monkeypatch):
    """One recording whose surprise wanders over seconds; resampling samples would cover a tenth."""
    rate, memory = 100, 0.99  # a correlation time of 1 s
    monkeypatch.setattr(nll, "SAMPLE_RATE", rate)
    samples = 300 * rate
    recording, clip = Recording("long", (SourceFile("long", samples),)), Clip(0, "long", 0, samples)
    hits, naive, trials, table = 0, 0, 300, None
    for trial in range(trials):
        noise = np.random.default_rng(trial).normal(0, 1, 2 * samples)
        values = 1 + 0.1 * lfilter([1], [1, -memory], noise)[samples:]
        table = NllAccumulator([recording], [clip], 1_000)
        table.add(0, 0, np.full(samples, 1_000), -values)
        row = table.total()
        hits += row.bits_low <= 1 / LN2 <= row.bits_high
        naive += abs(values.mean() - 1) < 1.96 * values.std() / np.sqrt(samples)
    assert table is not None
    assert table.interval_over == "30 blocks of 10.0 s"
    assert 0.9 <= hits / trials <= 0.98
    assert naive / trials < 0.3


def test_the_interval_is_seeded_and_needs_some_units():
    rng = np.random.default_rng(0)
    sums, counts = rng.normal(1, 1, (5, 2)), np.ones((5, 2))
    counts[4:, 1] = 0
    sums[4:, 1] = 0
    np.testing.assert_array_equal(bootstrap(sums, counts), bootstrap(sums, counts))
    low, high = bootstrap(sums, counts)
    assert low[0] < sums[:, 0].mean() < high[0]
    assert np.isnan(low[1])
    assert np.isnan(high[1])
    assert not np.array_equal(low, bootstrap(sums, counts, seed=1)[0])


# The nll.


def test_accumulated_nlls_equal_sums_over_all_samples(rng):
    """By file, context and position, for clips that cross files, in batches out of order."""
    files = [SourceFile("a", 20_000), SourceFile("b", 30_000)]
    recordings = [Recording("one", tuple(files)), Recording("two", (SourceFile("c", 17_000),))]
    clips = [Clip(0, "a", 0, 50_000), Clip(1, "c", 1_000, 16_000)]
    table, longest = NllAccumulator(recordings, clips, 5_000), 5_000
    samples = []
    for clip, first, end in (
        (1, 8_000, 16_000),
        (0, 19_000, 21_000),
        (0, 0, 19_000),
        (1, 0, 8_000),
    ):
        contexts, log_probs = (
            rng.integers(0, longest + 1, end - first),
            -rng.exponential(1, end - first),
        )
        table.add(clip, first, contexts, log_probs)
        place = clips[clip].start + np.arange(first, end)
        file = np.where(clip == 1, 2, place >= 20_000)
        samples.append(np.stack([file, contexts, np.arange(first, end), -log_probs]))
    file, contexts, position, nats = np.concatenate(samples, 1)

    assert table.total().targets == nats.size
    assert table.total().nll_nats == pytest.approx(nats.mean())
    assert table.context_mean == pytest.approx(contexts.mean())
    assert [row.file for row in table.by_file()] == ["a", "b", "c"]
    for i, row in enumerate(table.by_file()):
        assert (row.targets, row.nll_nats) == (
            (file == i).sum(),
            pytest.approx(nats[file == i].mean()),
        )
    for points, values in (
        (table.by_context(), contexts),
        (table.by_context(coarse=True), contexts),
        (table.by_position(), position),
    ):
        assert sum(point.targets for point in points) == nats.size
        for point in points:
            inside = (point.low <= values) & (values < point.high)
            assert point.targets == inside.sum()
            assert point.nll_nats == pytest.approx(nats[inside].mean())
    assert table.by_context()[-1].low == longest


# The protocol.


@pytest.mark.parametrize("quantiser", ["mulaw", "sashimi"])
def test_the_published_protocol(data_dir, tmp_path, quantiser):
    """Whole clips from the start of each file, each with its own scaling, context from nothing."""
    config = make_config(data_dir, quantiser=quantiser)
    evaluator, params, _ = evaluator_module.load(make_run(tmp_path, config))
    split = open_split(data_dir, "audio_folder", "train")
    length = PATCHES * SIZE
    how = {"clip_samples": length, "drop_last": True, "stride_patches": PATCHES}
    result = measure.evaluate_split(evaluator, params, split, **how)

    chosen = []
    for recording, files in enumerate(r.files for r in split.recordings):
        for start in range(0, files[0].num_samples - length + 1, length):
            pcm = split.read(recording, start, length)
            chosen.append(quantisers.get(quantiser).encode(pcm))
    silence = np.full((len(chosen), SIZE), quantisers.SILENCE, np.uint8)
    model = config.build_model(nnx.Rngs(config.seed))
    segments = np.concatenate([silence, np.stack(chosen)], 1)
    expected = jax.jit(lambda x: model.log_probs(x, length))(segments)
    count = sum(f.num_samples // length * length for r in split.recordings for f in r.files)
    assert expected.size == count
    assert result.targets == count
    assert result.nll_nats == pytest.approx(-float(expected.mean()), rel=1e-5)
    assert (result.quantiser, result.context_min, result.context_max) == (quantiser, 0, length - 1)
    assert result.context_mean == (length - 1) / 2


def test_any_mesh_gives_the_same_result(run, data_dir):
    split = open_split(data_dir, "audio_folder", "train")
    one = make_mesh(devices=jax.devices()[:1])
    results = []
    for mesh in (one, make_mesh()):
        evaluator, params, _ = evaluator_module.load(run, mesh=mesh)
        results.append(measure.evaluate_split(evaluator, params, split, stride_patches=2))
    assert results[0].targets == results[1].targets
    assert results[0].nll_nats == pytest.approx(results[1].nll_nats, rel=1e-6)
    assert results[0].bits_low == pytest.approx(results[1].bits_low, rel=1e-6)


def test_what_a_short_context_costs_is_measured_on_the_same_targets(run, data_dir):
    """The difference of two evaluations, sample by sample."""
    evaluator, params, _ = evaluator_module.load(run)
    config = evaluator.config
    split = open_split(data_dir, "audio_folder", "test")
    growing = measure.choose_targets(config, split, stride_patches=PATCHES)
    table = measure.context_gain(evaluator, params, growing)
    assert table is not None
    codes, log_probs = growing.codes(0), {}
    for stride in (PATCHES, PATCHES // 2):
        log_probs[stride] = np.empty(codes.size)
        windows = protocol.plan([codes.size], config, stride)
        for window, values, _ in evaluator.score(params, lambda _: codes, windows):
            log_probs[stride][window.first : window.end] = values
    whole = PATCHES * SIZE
    lost = (log_probs[PATCHES // 2] - log_probs[PATCHES])[whole:]
    assert table.total().targets == lost.size
    assert table.total().nll_nats == pytest.approx(lost.mean(), rel=1e-3, abs=1e-6)
    contexts = np.arange(lost.size) % whole // SIZE * SIZE + SIZE
    for point in table.by_context():
        inside = (point.low <= contexts) & (contexts < point.high)
        assert point.nll_nats == pytest.approx(lost[inside].mean(), rel=1e-3, abs=1e-6)
    least = table.by_context()[0]
    assert least.low <= SIZE < least.high
    assert abs(least.nll_nats) > 1e-4


# ClassicalBaselines.


@pytest.mark.parametrize("max_targets", [0, 900])
def test_classical_baselines_are_measured_on_the_same_targets(data_dir, max_targets):
    config = make_config(data_dir)
    split = open_split(data_dir, "audio_folder", "train")
    targets = measure.choose_targets(config, split, stride_patches=1, max_targets=max_targets)
    fitted = classical_cache.fit(split, "mulaw")
    table = measure.measure_classical(fitted, targets)
    for name in ("order-0", "linear-32", "block-adaptive-32"):
        whole = [
            fitted.log_probs(targets.codes(i)[:], [name])[name] for i in range(len(targets.clips))
        ]
        values = np.concatenate([whole[w.clip][w.first : w.end] for w in targets.windows])
        assert table.total(name).targets == values.size
        assert table.total(name).nll_nats == pytest.approx(-values.mean(dtype=np.float64), rel=1e-6)


def test_a_stretch_in_the_middle_has_all_the_history_that_classical_baselines_remember():
    codes = quantisers.get("mulaw").encode(tones(60_000, 0))
    fitted = classical_cache.classical.fit([codes], quantisers.get("mulaw"))
    whole = fitted.log_probs(codes)
    for first, end in ((0, 50), (8_300, 9_000), (40_001, 41_003)):
        part = measure.classical_log_probs(fitted, codes, first, end)
        for name, values in part.items():
            np.testing.assert_allclose(values, whole[name][first:end], atol=1e-5)


def test_classical_baselines_are_kept_and_fitted_again_for_other_data(
    data_dir, tmp_path, monkeypatch
):
    config = make_config(data_dir)
    split = open_split(data_dir, "audio_folder", "validation")
    train = open_split(data_dir, "audio_folder", "train")
    targets = measure.choose_targets(config, split)
    names = ("order-0", "linear-32")
    first = classical_cache.classical_on(targets, train, tmp_path, names)
    with monkeypatch.context() as patch:
        patch.setattr(classical_cache, "fit", None)
        patch.setattr(classical_cache, "measure_classical", None)
        assert classical_cache.classical_on(targets, train, tmp_path, names) == first
    train.manifest_hash = "other"
    assert classical_cache.classical_on(targets, train, tmp_path, ("order-0",)).keys() == {
        "order-0"
    }
    (tmp_path / classical_cache.FILENAME).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        classical_cache.fitted(tmp_path, train, "mulaw")


def test_the_verdict_names_what_beats_the_run():
    baselines = {"order-0": 5.0, "linear-32": 2.0}
    assert "above all classical baselines" in classical_cache.verdict(5.1, baselines)
    between = classical_cache.verdict(3.0, baselines)
    assert "still above linear-32" in between
    assert "below order-0" in between
    assert "below all classical baselines" in classical_cache.verdict(1.0, baselines)


# The command.


def test_the_command_writes_what_it_prints(run, tmp_path, capsys):
    paths = {"json": tmp_path / "r.json", "plot": tmp_path / "r.png"}
    flags = [f"--workdir={run}", "--split=train", *(f"--{k}={v}" for k, v in paths.items())]
    evaluate.main([*flags, "--classical", "--quantiser=mulaw"])
    printed, record = capsys.readouterr().out, json.loads(paths["json"].read_text())
    assert paths["plot"].read_bytes().startswith(b"\x89PNG")
    assert f"{record['nll_bits']:.4f} bits ({record['nll_nats']:.4f} nats)" in printed
    assert record["nll_bits"] == pytest.approx(record["nll_nats"] / LN2)
    assert record["bits_low"] < record["nll_bits"] < record["bits_high"]
    assert (record["quantiser"], record["split"], record["step"]) == ("mulaw", "train", 3)
    assert (record["context_min"], record["context_max"]) == (0, PATCHES * SIZE)
    for axis in ("context", "position", "files"):
        assert sum(row["targets"] for row in record[axis]) == record["targets"]
    for name, baseline in record["classical"].items():
        assert name in printed
        assert len(baseline["context"]) == len(record["context"])
        assert baseline["targets"] == record["targets"]
    assert f"{record['files'][0]['nll_bits']:.4f}" in printed

    with pytest.raises(SystemExit):  # nothing is overwritten without asking
        evaluate.main(flags)
    assert "--overwrite" in capsys.readouterr().err
    evaluate.main([f"--workdir={run}", *flags, "--overwrite"])  # two runs
    assert len(json.loads(paths["json"].read_text())) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--split=holdout"], "no split 'holdout'"),
        (["--quantiser=sashimi"], "--quantiser=sashimi, but .* was trained on mulaw"),
        (["--clip_samples=1000000", "--drop_last"], "the longest has"),
        (["--drop_last"], "needs --clip_samples"),
        (["--stride_patches=5"], "must be from 1 to the context's 4"),
        (["--step=4"], "has no step 4; it has 3"),
        (["--max_targets=-1"], "must not be negative"),
        (["--plot=nowhere/x.png"], "is not a folder"),
        (["--plot=x.txt"], "can't be drawn"),
        (["--data_dir=nowhere"], "not built in nowhere"),
    ],
)
def test_bad_input_is_one_clear_line(run, capsys, tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        evaluate.main([f"--workdir={run}", *flags])
    assert stopped.value.code == EXIT_CODE
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_a_workdir_without_checkpoints_is_one_clear_line(tmp_path, capsys):
    with pytest.raises(SystemExit):
        evaluate.main([f"--workdir={tmp_path}"])
    assert "holds no checkpoints" in capsys.readouterr().err
