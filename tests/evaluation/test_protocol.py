"""Sliding windows against a brute-force loop in the patch form, and what they count."""

import collections

import jax
import numpy as np
import pytest
from conftest import CLIP_LENGTHS, OURS, SMALL, random_codes, random_model
from flax import nnx
from jax.sharding import AxisType

from patchwave_jax.config import Config, DataConfig
from patchwave_jax.data.quantisers import SILENCE
from patchwave_jax.errors import UserError
from patchwave_jax.evaluation.evaluator import Evaluator
from patchwave_jax.evaluation.protocol import contexts, default_stride, plan

SIZE, PATCHES = SMALL.patch_samples, 4


def make_config(objective: str, model=SMALL, quantiser="mulaw") -> Config:
    return Config(
        objective=objective,
        context_samples=PATCHES * SIZE,
        model=model,
        data=DataConfig(quantiser=quantiser),
    )


def some_devices(count: int):
    return jax.make_mesh(
        (count,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:count]
    )


def score(config: Config, model, clips, stride: int, devices: int = 1, **kwargs):
    """Log-probabilities and contexts of every sample of every clip; each must come just once."""
    windows = plan([clip.size for clip in clips], config, stride, **kwargs)
    log_probs = [np.full(clip.size, np.nan) for clip in clips]
    reach = [np.full(clip.size, -1) for clip in clips]
    evaluator = Evaluator(config, some_devices(devices))
    for scored in evaluator.score(nnx.state(model), lambda i: clips[i], windows):
        window = scored.window
        target = slice(window.first, window.end)
        assert np.isnan(log_probs[window.clip][target]).all()
        log_probs[window.clip][target] = scored.log_probs
        reach[window.clip][target] = scored.contexts
    return log_probs, reach


def brute_force(model, clips, stride: int):
    """The protocol as one would explain it: for each target, its window's history in whole patches.

    Targets of the first window: all it has. Then `stride` patches at a time, the oldest of which
    has `N - stride + 1` patches. A bidirectional model is shown silence for what is missing.
    """
    histories, targets, reach = collections.defaultdict(list), collections.defaultdict(list), []
    for i, codes in enumerate(clips):
        padded = np.concatenate([np.full(PATCHES * SIZE, SILENCE, np.uint8), codes])
        for t in range(codes.size):
            patches = t // SIZE + 1
            if t >= PATCHES * SIZE:
                oldest = PATCHES - stride + 1
                patches = oldest + (t - PATCHES * SIZE) % (stride * SIZE) // SIZE
            history = padded[t + (PATCHES - patches) * SIZE : t + PATCHES * SIZE]
            if not model.causal:
                fill = np.full((PATCHES - patches) * SIZE, SILENCE, np.uint8)
                history = np.concatenate([fill, history])
            histories[history.size].append(history)
            targets[history.size].append((i, t))
            reach.append(min(patches * SIZE, t))
    log_probs = [np.empty(codes.size) for codes in clips]
    for size, windows in histories.items():
        table = jax.jit(lambda x: jax.nn.log_softmax(model.next_sample_logits(x)))(
            np.stack(windows)
        )
        for row, (i, t) in zip(np.asarray(table), targets[size], strict=True):
            log_probs[i][t] = row[clips[i][t]]
    return np.concatenate(log_probs), np.array(reach)


@pytest.mark.parametrize(
    ("objective", "config", "quantiser", "stride"),
    [
        ("dense", OURS, "sashimi", 1),
        ("dense", SMALL, "mulaw", PATCHES),
        ("last", OURS, "mulaw", 3),
    ],
)
def test_equals_brute_force_in_the_patch_form(objective, config, quantiser, stride):
    model = random_model(config, causal=objective == "dense", quantiser=quantiser)
    clips = [random_codes(length, seed=i) for i, length in enumerate(CLIP_LENGTHS)]
    log_probs, reach = score(make_config(objective, config, quantiser), model, clips, stride)
    expected, expected_reach = brute_force(model, clips, stride)
    np.testing.assert_allclose(np.concatenate(log_probs), expected, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(np.concatenate(reach), expected_reach)


@pytest.mark.parametrize("objective", ["dense", "last"])
def test_the_number_of_devices_does_not_matter(objective):
    model = random_model(SMALL, causal=objective == "dense")
    clips = [random_codes(length, seed=i) for i, length in enumerate(CLIP_LENGTHS)]
    one, eight = (score(make_config(objective), model, clips, 2, devices)[0] for devices in (1, 8))
    np.testing.assert_allclose(np.concatenate(one), np.concatenate(eight), rtol=1e-5, atol=1e-5)


def test_stride_one_gives_every_sample_the_whole_context():
    windows = plan([SIZE * 20], make_config("last"), 1)
    reach = np.concatenate([contexts(window, make_config("last")) for window in windows])
    np.testing.assert_array_equal(reach, np.minimum(np.arange(SIZE * 20), PATCHES * SIZE))


def test_stride_of_the_whole_context_starts_every_window_from_scratch():
    windows = plan([SIZE * PATCHES * 3], make_config("dense"), PATCHES)
    assert [window.end - window.first for window in windows] == [SIZE * PATCHES] * 3
    assert contexts(windows[1], make_config("dense"))[0] == SIZE


@pytest.mark.parametrize(("stride", "max_targets"), [(1, 700), (2, 500), (PATCHES, 900)])
def test_a_sample_of_targets_is_unbiased_and_even(stride, max_targets):
    """Over the draws, every target comes equally often; in each, they come from all over."""
    config, lengths = make_config("dense"), [SIZE * 30, SIZE * 7 + 5, SIZE * 3]
    times, draws, total = [np.zeros(length) for length in lengths], 1_500, sum(lengths)
    sums, counts = np.zeros((2, draws))
    for seed in range(draws):
        windows = plan(lengths, config, stride, max_targets, seed)
        places = [sum(lengths[: window.clip]) + window.first for window in windows]
        assert np.diff(places, append=places[0] + total).max() <= 2.5 * total / len(windows)
        for window in windows:
            times[window.clip][window.first : window.end] += 1
            targets = window.end - window.first
            sums[seed] += targets * (window.first < PATCHES * SIZE)
            counts[seed] += targets
    pieces = sum(-(-length // (stride * SIZE)) for length in lengths)
    expected = draws * len(windows) / pieces
    assert abs(len(windows) - pieces * max_targets / total) < 0.5 + 1e-9
    np.testing.assert_allclose(np.concatenate(times), expected, atol=5 * np.sqrt(expected))
    # The share of those whose context still grows is what it is in all of the clips.
    truth = sum(min(length, PATCHES * SIZE) for length in lengths) / total
    assert (sums / counts).mean() == pytest.approx(truth, rel=0.05)
    assert plan(lengths, config, stride, total) == plan(lengths, config, stride)


def test_a_sample_of_targets_does_not_fall_into_step_with_the_clips():
    """Half of the windows of clips that have two each are both firsts and seconds."""
    lengths, config = [SIZE * 2 * PATCHES] * 50, make_config("dense")
    windows = plan(lengths, config, PATCHES, sum(lengths) // 2)
    assert 10 < sum(window.first == 0 for window in windows) < 40


@pytest.mark.parametrize("objective", ["dense", "last"])
def test_a_sampled_target_has_the_same_log_probability(objective):
    """Also those of a clip's first window, which is cut into pieces."""
    model = random_model(SMALL, causal=objective == "dense")
    clips, config = [random_codes(SIZE * 9 + 17)], make_config(objective)
    everything, reach = score(config, model, clips, 3)
    pieces, pieces_reach = score(config, model, clips, 3, max_targets=clips[0].size - 1)
    np.testing.assert_allclose(pieces[0], everything[0], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(pieces_reach[0], reach[0])


def test_a_stride_out_of_range_is_refused():
    for stride in (0, PATCHES + 1):
        with pytest.raises(UserError, match=rf"--stride_patches must be from 1 to .*{PATCHES}"):
            plan([1000], make_config("dense"), stride)
    assert default_stride(make_config("last")) == 1
    assert default_stride(make_config("dense")) == PATCHES // 2
