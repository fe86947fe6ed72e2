"""WaveNet and SampleRNN: published logits and sizes, slow oracles, causality, cached steps."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import SAMPLERNN, WAVENET
from flax import nnx

from patchwave_jax.data.quantisers import SILENCE
from patchwave_jax.errors import UserError
from patchwave_jax.models import samplernn
from patchwave_jax.models.base import count_parameters
from patchwave_jax.models.samplernn import SampleRNN, SampleRNNConfig, loudness
from patchwave_jax.models.wavenet import WaveNet, WaveNetConfig

PARITY = Path(__file__).parents[1] / "parity"


def zeros(network, config):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), params))


def wavenet_of(case) -> WaveNet:
    """The network with the case's PyTorch weights."""
    model = zeros(WaveNet, WAVENET)

    def weight(name):  # [out, in, taps] -> [taps * in, out]
        array = case[f"w/{name}.weight"]
        array = array[..., None] if array.ndim == 2 else array
        return array.transpose(2, 1, 0).reshape(-1, array.shape[0])

    model.embedding.embedding[...] = case["w/emb.weight"]
    model.start.kernel[...] = weight("net.start_conv")
    for i, layer in enumerate(model.layers):
        both = [weight(f"net.{part}_convs.{i}") for part in ("filter", "gate")]
        layer.filter_and_gate.kernel[...] = np.concatenate(both, 1)
        layer.residual.kernel[...] = weight(f"net.residual_convs.{i}")
        layer.skip.kernel[...] = weight(f"net.skip_convs.{i}")
    for name, linear in (
        ("net.end_conv_1", model.end1),
        ("net.end_conv_2", model.end2),
        ("head", model.head),
    ):
        linear.kernel[...] = weight(name)
        linear.bias[...] = case[f"w/{name}.bias"]
    return model


def samplernn_of(case) -> SampleRNN:
    model = zeros(SampleRNN, SAMPLERNN)

    def normed(part, name, axes):
        part.direction[...] = (
            case[f"w/{name}.weight_v"].transpose(axes).reshape(part.direction.shape)
        )
        part.scale[...] = case[f"w/{name}.weight_g"].ravel()

    for i, tier in enumerate(model.tiers):
        name = f"net.frame_level_rnns.{i}"
        normed(tier.expand, f"{name}.input_expand", (1, 0, 2))
        tier.expand_bias[...] = case[f"w/{name}.input_expand.bias"]
        tier.input_kernel[...] = case[f"w/{name}.rnn.weight_ih_l0"].T
        tier.state_kernel[...] = case[f"w/{name}.rnn.weight_hh_l0"].T
        tier.input_bias[...] = case[f"w/{name}.rnn.bias_ih_l0"]
        tier.state_bias[...] = case[f"w/{name}.rnn.bias_hh_l0"]
        tier.initial[...] = case[f"w/{name}.rnn.h0"].ravel()
        normed(tier.upsampling, f"{name}.upsampling.conv_t", (0, 2, 1))
        tier.upsampling_bias[...] = case[f"w/{name}.upsampling.bias"].T
    name = "net.sample_level_mlp"
    model.embedding.embedding[...] = case[f"w/{name}.embedding.weight"]
    normed(model.input, f"{name}.input", (2, 1, 0))
    normed(model.hidden, f"{name}.hidden", (1, 0, 2))
    normed(model.output, f"{name}.output", (1, 0, 2))
    model.hidden_bias[...] = case[f"w/{name}.hidden.bias"]
    model.output_bias[...] = case[f"w/{name}.output.bias"]
    return model


PUBLISHED = {"wavenet": wavenet_of, "samplernn": samplernn_of}


@functools.cache
def published(name):
    case = np.load(PARITY / f"{name}.npz")
    return PUBLISHED[name](case), case, case["y"].astype(np.uint8)


def logits_of(model, *arguments):
    graphdef, params = nnx.split(model)
    return jax.jit(lambda params, *given: nnx.merge(graphdef, params).window_logits(*given))(
        params, *arguments
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_logits_are_those_of_the_published_code(name):
    model, case, codes = published(name)
    logits = logits_of(model, codes)
    np.testing.assert_allclose(logits, case["logits"], atol=1e-4)
    log_probs = np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), case["y"][..., None], -1)
    np.testing.assert_allclose(-log_probs.mean(), case["loss_nats"], atol=1e-5)


def test_wavenet_sees_as_far_as_published():
    assert WAVENET.receptive_field == np.load(PARITY / "wavenet.npz")["receptive_field"]
    assert WaveNetConfig().receptive_field == 4_093


def test_samplernn_hears_and_remembers_as_published():
    model, case, codes = published("samplernn")
    np.testing.assert_allclose(loudness(), 2 * case["dequantized"], atol=1e-6)
    assert SAMPLERNN.lookback == case["lookback"]
    _, carry = jax.jit(lambda: model.segment(model.prepare(), codes, model.init_carry(2)))()
    for i, hidden in enumerate(carry.hidden):
        np.testing.assert_allclose(hidden, case[f"state_out/{i}"][0], atol=1e-5)


@pytest.mark.parametrize(
    ("network", "config", "count"),
    [(WaveNet, WaveNetConfig(), 4_244_480), (SampleRNN, SampleRNNConfig(), 35_034_624)],
)
def test_size_is_as_published(network, config, count):
    model = nnx.eval_shape(lambda: network(config, rngs=nnx.Rngs(0)))
    assert count_parameters(nnx.state(model)) == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_prediction_depends_on_what_it_should_and_no_more(name, monkeypatch):
    """By gradient: no code comes twice, so that a code's rows in the tables are one sample's."""
    model, _, _ = published(name)
    graphdef, params = nnx.split(model)
    codes, target = np.random.default_rng(0).permutation(128)[None, :64].astype(np.uint8), 40

    @jax.jit
    def gradient(params, table):
        def logit(params, table):
            monkeypatch.setattr(samplernn, "loudness", lambda: table)
            return nnx.merge(graphdef, params).window_logits(codes)[0, target].sum()

        params, table = jax.grad(logit, (0, 1))(params, table)
        return jnp.abs(params["embedding"]["embedding"][...]).sum(1) + jnp.abs(table)

    depends = np.asarray(gradient(params, samplernn.loudness()))[codes[0]] > 0
    expected = np.arange(64) < target
    if name == "wavenet":
        expected &= np.arange(64) >= target - WAVENET.receptive_field
    np.testing.assert_array_equal(depends, expected)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_equal_the_whole(name, dtype):
    model, _, codes = published(name)
    params = nnx.state(model)
    config = dataclasses.replace(model.config, compute_dtype=dtype)
    shaped = nnx.eval_shape(lambda: type(model)(config, rngs=nnx.Rngs(0)))
    model = nnx.merge(nnx.graphdef(shaped), params)

    def advance(carry, item):
        state, previous = carry
        index, code = item
        state, logits = model.step_logits(prepared, state, previous, index, jnp.int32(0))
        return (state, code), logits

    prepared, count = jax.jit(model.prepare)(), codes.shape[1]
    begin = (jax.jit(lambda: model.init_state(2, 48))(), jnp.full(2, SILENCE, jnp.uint8))
    _, logits = jax.lax.scan(advance, begin, (jnp.arange(count), codes.T))
    expected = np.asarray(logits_of(model, codes))
    assert expected.std() > 0.1
    tolerance = 1e-4 if dtype == "float32" else 0.1
    np.testing.assert_allclose(logits.swapaxes(0, 1), expected, atol=tolerance)


def test_wavenet_with_history_goes_on_where_it_was():
    model, _, codes = published("wavenet")
    field = WAVENET.receptive_field
    later = logits_of(model, codes[:, 30:], None, codes[:, 30 - field : 30])
    np.testing.assert_allclose(later, logits_of(model, codes)[:, 30:], atol=1e-5)


def test_samplernn_in_segments_equals_the_whole():
    model, _, codes = published("samplernn")
    prepared, carry, pieces = jax.jit(model.prepare)(), model.init_carry(2), []
    segment = jax.jit(model.segment)
    for begin in range(0, 64, 16):
        logits, carry = segment(prepared, codes[:, begin : begin + 16], carry)
        pieces.append(logits)
    np.testing.assert_allclose(jnp.concatenate(pieces, 1), logits_of(model, codes), atol=1e-5)


def test_wavenet_convolutions_against_a_loop_over_taps():
    """Its first layer's gated units, sample by sample, in numpy."""
    model, case, codes = published("wavenet")
    embedded = case["w/emb.weight"] @ case["w/net.start_conv.weight"][:, :, 0].T
    x = embedded[codes[0]]
    for dilation, i in ((1, 0), (2, 1)):
        out = np.zeros((len(x) - dilation, 8))
        for t in range(dilation, len(x)):
            filtered, gate = (
                sum(case[f"w/net.{part}_convs.{i}.weight"][:, :, tap] @ x[t - (1 - tap) * dilation]
                    for tap in (0, 1))
                for part in ("filter", "gate")
            )  # fmt: skip
            unit = np.tanh(filtered) / (1 + np.exp(-gate))
            out[t - dilation] = x[t] + case[f"w/net.residual_convs.{i}.weight"][:, :, 0] @ unit
        made, _ = model.layers[i](jnp.asarray(x[:-dilation]), jnp.asarray(x[dilation:]))
        np.testing.assert_allclose(made, out, atol=1e-5)
        x = out


@pytest.mark.parametrize(
    ("config", "context", "field"),
    [
        (WaveNetConfig(), 8_000, "context_samples"),
        (SampleRNNConfig(segment_samples=1_000), 131_072, "model.segment_samples"),
        (SampleRNNConfig(), 131_072 + 1_024, "context_samples"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(config, context, field):
    with pytest.raises(UserError, match=f"config.{field}"):
        config.check(context, True)
