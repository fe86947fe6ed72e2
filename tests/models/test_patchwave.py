"""The model: its size, its two forms against each other, causality, and what it sees."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ADAPTIVE, OTHER_PATCH, OURS, SMALL, random_codes, random_model, smooth_codes
from flax import nnx

from patchwave_jax.data.quantisers import SILENCE
from patchwave_jax.models.base import Execution
from patchwave_jax.models.patchwave import encoder
from patchwave_jax.models.patchwave.config import PatchWaveConfig
from patchwave_jax.models.patchwave.model import PatchWave
from patchwave_jax.models.patchwave.transformer import QUERY_BLOCK, Attention, positions

LARGE_PATCH = dataclasses.replace(
    SMALL,
    patch_samples=2000,
    kernel_size=7,
    strides=(2, 3, 2, 3, 2),
    filters=(8, 8, 8, 8, 4),
    skip_connections=True,
)


def test_the_papers_size():
    model = nnx.eval_shape(
        lambda: PatchWave(PatchWaveConfig(), causal=False, quantiser="mulaw", rngs=nnx.Rngs(0))
    )
    total = sum(x.size for x in jax.tree.leaves(nnx.state(model)))
    # By hand: encoder 932,512; three blocks of 593,920; head 394,496; final norm 256.
    assert total == 932_512 + 3 * 593_920 + 394_496 + 256 == 3_109_024
    assert (PatchWaveConfig().receptive_field, PatchWaveConfig().final_frames) == (1999, 24)


@pytest.mark.parametrize(
    ("config", "causal"),
    [(SMALL, True), (OURS, True), (OTHER_PATCH, True), (OURS, False)],
    ids=["paper", "ours", "other-patch", "ours-bidirectional"],
)
def test_dense_form_equals_patch_form(config, causal):
    """Every target of a segment, in logits."""
    model, size, patches = random_model(config, causal=causal), config.patch_samples, 3
    segment = random_codes(2, (patches + 1) * size)

    @jax.jit
    def patch_form(windows):
        return jax.nn.log_softmax(model.next_sample_logits(windows))

    expected = np.empty((2, patches * size, 256), np.float32)
    for token in range(1, patches + 1):
        ends = range(token * size, (token + 1) * size)
        windows = np.stack([segment[:, end - token * size : end] for end in ends], 1)
        if not causal:  # a bidirectional model always has all its tokens; what is missing is silent
            fill = np.full((2, size, (patches - token) * size), SILENCE, np.uint8)
            windows = np.concatenate([fill, windows], 2)
        logits = patch_form(windows.reshape(2 * size, -1))
        expected[:, (token - 1) * size : token * size] = logits.reshape(2, size, 256)

    dense_logits = jax.jit(model.logits, static_argnums=1)
    for hop in (1, 4):
        dense = jax.nn.log_softmax(dense_logits(segment, hop))
        np.testing.assert_allclose(
            dense, expected[:, ::hop], rtol=1e-5, atol=2e-5, err_msg=f"hop {hop}"
        )


def test_dense_form_equals_patch_form_with_adaptive_predictors():
    """The newest patch of targets, whose windows hold all that the predictors reach for."""
    model, size, patches = random_model(ADAPTIVE, causal=True), ADAPTIVE.patch_samples, 5
    segment = smooth_codes(2, (patches + 1) * size)
    patch_form = jax.jit(model.next_sample_logits, static_argnums=1)
    assert patches * size >= model.head.lookback + 19
    expected = {
        phase: jax.nn.log_softmax(patch_form(segment[:, phase:][:, : patches * size], phase % 20))
        for phase in (0, 1, 20, 39)
    }
    for hop in (1, 4):
        dense = jax.nn.log_softmax(jax.jit(model.logits, static_argnums=1)(segment, hop))
        newest = dense[:, dense.shape[1] - size // hop :]
        for phase, logits in expected.items():
            if phase % hop == 0:
                np.testing.assert_allclose(newest[:, phase // hop], logits, rtol=1e-4, atol=1e-3)


def test_dense_form_equals_patch_form_at_the_papers_patch():
    model = random_model(LARGE_PATCH, causal=True)
    segment = random_codes(1, 4 * 2000)
    dense_logits = jax.jit(model.logits, static_argnums=1)
    patch_form = jax.jit(model.next_sample_logits)
    for hop in (1, 8):
        dense = jax.nn.log_softmax(dense_logits(segment, hop))
        for index in (0, 1, 2000 // hop, dense.shape[1] - 1):
            end = 2000 + index * hop
            window = segment[:, end % 2000 : end]
            expected = jax.nn.log_softmax(patch_form(window))
            np.testing.assert_allclose(dense[:, index], expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("config", [SMALL, OURS], ids=["paper", "ours"])
def test_log_probs_and_chunks_equal_logits(config):
    model, size = random_model(config, causal=True), config.patch_samples
    segment = random_codes(2, 5 * size)
    logits = jax.nn.log_softmax(jax.jit(model.logits)(segment))
    expected = np.take_along_axis(np.asarray(logits), segment[:, size:, None].astype(int), -1)
    for last_n, *chunks in ((4, None, None), (4, 6, 2), (3, 15, None)):
        model.execution = Execution(*chunks)
        got = jax.jit(model.log_probs, static_argnums=1)(segment, last_n * size)
        wanted = expected[:, -last_n * size :, 0]
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=2e-5, err_msg=str(chunks))


@pytest.mark.parametrize("causal", [False, True])
def test_log_probs_of_any_number_of_samples_are_the_last_ones(causal):
    model, size = random_model(OURS, causal=causal), OURS.patch_samples
    segment = random_codes(2, 4 * size)
    log_probs = jax.jit(model.log_probs, static_argnums=1)
    whole = np.asarray(log_probs(segment, 3 * size))
    for last_n in (1, size - 1, size + 1):
        got = log_probs(segment, last_n)
        assert got.shape == (2, last_n)
        np.testing.assert_allclose(got, whole[:, -last_n:], rtol=1e-5, atol=2e-5)
    for last_n in (0, 3 * size + 1):
        with pytest.raises(ValueError, match=rf"last_n {last_n} is not in \[1, {3 * size}\]"):
            model.log_probs(segment, last_n)


def test_chunks_leave_the_gradient_as_it_is():
    model = random_model(OURS, causal=True)
    size = OURS.patch_samples
    segment = random_codes(2, 5 * size)
    _, params = nnx.split(model)

    def plain(params, graphdef):
        nats = -nnx.merge(graphdef, params).log_probs(segment, 4 * size)
        return nats.mean(), nats.mean(1)

    def loss(params, graphdef):
        return nnx.merge(graphdef, params).dense_nats(segment)

    of = partial(jax.value_and_grad, has_aux=True)
    whole = jax.jit(of(plain), static_argnums=1)(params, nnx.graphdef(model))
    model.execution = Execution(20, 1)
    pieces = jax.jit(of(loss), static_argnums=1)(params, nnx.graphdef(model))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, pieces)


def test_last_objective_equals_logits():
    model = random_model(OURS, causal=False)
    codes = random_codes(3, 2 * OURS.patch_samples + 1)
    logits = jax.nn.log_softmax(jax.jit(model.next_sample_logits)(codes[:, :-1]))
    expected = np.asarray(logits)[np.arange(3), codes[:, -1]]
    np.testing.assert_allclose(
        jax.jit(model.next_sample_log_prob)(codes), expected, rtol=1e-5, atol=1e-5
    )


def test_predictions_on_a_tpu_are_made_of_full_precision_products():
    """Not of its default, one pass in bfloat16, nor of its library's Fourier transforms."""
    model = random_model(ADAPTIVE, causal=True)
    first = model.head.lookback
    predict = jax.jit(lambda codes: model.head.condition(codes, first))
    traced = predict.trace(random_codes(1, first + 2 * ADAPTIVE.patch_samples))
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) > 8
    assert all("precision = [HIGHEST, HIGHEST]" in line for line in products)
    assert "stablehlo.fft" not in text


def test_dense_form_is_causal_by_gradient():
    """No logit for sample e depends on sample e or a later one."""
    model, size = random_model(SMALL, causal=True), SMALL.patch_samples
    codes = random_codes(1, 4 * size)
    values = model.encoder.inputs(codes)
    encoder = type(model.encoder)
    targets = [0, 1, size - 1, size, 2 * size + 7, 3 * size - 1]

    def logit(values, index):
        # The encoder of a segment leaves out the newest sample: no target comes after it.
        inputs = lambda self, c: values[:, values.shape[1] - 1 - c.shape[1] : -1]  # noqa: E731
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(encoder, "inputs", inputs)
            return model.logits(codes)[0, index] @ jnp.arange(256.0)

    gradient_of = jax.jit(jax.grad(logit))
    for index in targets:
        gradient = np.abs(gradient_of(values, index)[0, :, 0])
        end = size + index
        assert gradient[end:].max() == 0
        seen = gradient[end - SMALL.receptive_field : end]
        assert (seen > 0).mean() > 0.9  # ReLU may hide a few


def test_patch_form_sees_all_of_the_window_but_what_its_receptive_field_leaves_out():
    config = LARGE_PATCH
    model = random_model(config, causal=False)
    codes = random_codes(1, 3 * 2000)
    values = model.encoder.inputs(codes).reshape(3, 1, 2000, 1)

    def logit(values):
        tokens = [_encode(model, values[i]) for i in range(3)]
        states, _ = model.transform(jnp.stack([t for t, _ in tokens], 1))
        return model.head.logits(model.hidden(states[:, -1], tokens[-1][1], ()))[0, 7]

    def _encode(model, patch):
        inputs = lambda self, c: patch[:, -c.shape[1] :]  # noqa: E731
        with pytest.MonkeyPatch.context() as m:
            m.setattr(type(model.encoder), "inputs", inputs)
            return model.encoder.patch(codes[:, :2000])

    gradient = np.abs(jax.jit(jax.grad(logit))(values)).reshape(3, 2000)
    assert (gradient[:, 0] == 0).all()  # 1999 of the 2000 samples, the oldest is not seen
    assert (gradient[:, 1:] > 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_folded_attention_equals_the_plain_form(causal):
    """Values and gradients, biases included, over more tokens than one block of queries has."""
    count = 2 * QUERY_BLOCK + 7
    config = dataclasses.replace(SMALL, head_size=12)
    attention = Attention(config, rngs=nnx.Rngs(0))
    graphdef, params = nnx.split(attention)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.3, x.shape), x.dtype), params)
    x = jnp.asarray(rng.normal(size=(3, count, 16)), jnp.float32)
    mask = np.tril(np.ones((count, count), bool)) if causal else True

    def folded(params, x):
        return jnp.sin(nnx.merge(graphdef, params)(x, causal)[0])

    def plain(params, x):
        a = nnx.merge(graphdef, params)
        q, k, v = (f(x).reshape(3, count, 2, 12) for f in (a.query, a.key, a.value))
        scores = jnp.einsum("mqhk,mshk->mhqs", q, k) / np.sqrt(12)
        weights = jax.nn.softmax(jnp.where(mask, scores, -jnp.inf))
        mixed = jnp.einsum("mhqs,mshk->mqhk", weights, v)
        return jnp.sin(a.output(mixed.reshape(3, count, 24)))

    np.testing.assert_allclose(folded(params, x), plain(params, x), atol=2e-5)
    got = jax.jit(jax.grad(lambda *a: folded(*a).sum(), (0, 1)))(params, x)
    expected = jax.jit(jax.grad(lambda *a: plain(*a).sum(), (0, 1)))(params, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4, 1e-3), got, expected)


def test_positions_by_hand():
    table = positions(5, 4)
    np.testing.assert_allclose(table[0], [0, 0, 1, 1])
    np.testing.assert_allclose(table[3], [np.sin(3), np.sin(0.03), np.cos(3), np.cos(0.03)], 1e-6)


def test_contexts_shorter_and_longer_than_any_trained_on():
    model = random_model(SMALL, causal=True)
    for patches in (1, 40):
        logits = jax.jit(model.next_sample_logits)(random_codes(1, patches * SMALL.patch_samples))
        assert logits.shape == (1, 256)
        assert np.isfinite(logits).all()


def test_dropout_drops_whole_tokens_and_is_off_without_a_key():
    config = dataclasses.replace(SMALL, token_dropout=0.5, num_layers=0)
    model = random_model(config, causal=True)
    tokens = jnp.ones((64, 4, 16))
    dropped = np.asarray(jax.jit(model.transform)(tokens, jax.random.key(0))[0])
    zero = (dropped == 0).all(-1)
    assert 0.4 < zero.mean() < 0.6
    kept = np.asarray(jax.jit(model.transform)(tokens)[0])[~zero]
    np.testing.assert_allclose(dropped[~zero], 2 * kept, rtol=1e-6)


def test_bfloat16_stays_near_float32():
    segment = random_codes(1, 3 * OURS.patch_samples)
    half = dataclasses.replace(OURS, compute_dtype="bfloat16")
    models = [
        PatchWave(config, causal=True, quantiser="mulaw", rngs=nnx.Rngs(0))
        for config in (OURS, half)
    ]
    last_n = 2 * OURS.patch_samples
    a, b = (jax.jit(model.log_probs, static_argnums=1)(segment, last_n) for model in models)
    assert b.dtype == jnp.float32
    assert float(jnp.abs(a - b).mean() / jnp.abs(a).mean()) < 0.01


@pytest.mark.quick
@pytest.mark.parametrize(("samples", "dilation"), [(97, 2), (120, 12), (200, 31)])
def test_phases_are_the_dilated_convolution(samples, dilation):
    rng = np.random.default_rng(dilation)
    x = rng.normal(size=(2, samples, 5)).astype(np.float32)
    kernel = rng.normal(size=(7, 5, 3)).astype(np.float32)
    outputs = samples - 6 * dilation
    exact = sum(
        x[:, k * dilation :][:, :outputs].astype(np.float64) @ kernel[k].astype(np.float64)
        for k in range(7)
    )
    y, pull = jax.vjp(lambda x, k: encoder.by_phases(x, k, dilation), x, kernel)
    np.testing.assert_allclose(y, exact, atol=1e-5)
    of_library = jax.vjp(lambda x, k: encoder.convolve(x, k, 1, dilation), x, kernel)[1]
    for ours, own in zip(pull(exact.astype(np.float32)), of_library(y), strict=True):
        np.testing.assert_allclose(ours, own, rtol=1e-4, atol=1e-3)
