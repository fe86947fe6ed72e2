"""MEGABYTE: the public code's logits, a slow oracle in numpy, causality, cached steps.

`parity/megabyte.npz` holds weights, codes, logits of all samples but the first, and the mean NLL of
all samples that MEGABYTE-pytorch 0.3.6 computed at a tiny size, all weights away from their start.
"""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax
from scipy.special import erf, log_softmax, softmax

from patchwave_jax.errors import UserError
from patchwave_jax.models.megabyte import Megabyte, MegabyteConfig

SMALL = MegabyteConfig(
    patch_samples=4,
    max_patches=5,
    global_width=12,
    global_layers=2,
    global_heads=2,
    local_width=8,
    local_layers=2,
    local_heads=2,
    head_size=6,
)


@functools.cache
def published() -> tuple[dict[str, np.ndarray], dict]:
    """The case, and its weights under the names of this project."""
    with np.load(Path(__file__).parents[1] / "parity" / "megabyte.npz") as case:
        case = dict(case)

    def linear(name):
        bias = {"bias": case[f"w/{name}.bias"]} if f"w/{name}.bias" in case else {}
        return {"kernel": case[f"w/{name}.weight"].T, **bias}

    def table(name):
        return {"embedding": case[f"w/{name}.weight"]}

    def norm(name):
        return {"scale": case[f"w/{name}.weight"], "bias": case[f"w/{name}.bias"]}

    def block(name):
        key, value = np.split(case[f"w/{name}.0.to_kv.weight"].T, 2, 1)
        return {
            "attention_norm": {"scale": case[f"w/{name}.0.norm.g"]},
            "attention": {
                "query": linear(f"{name}.0.to_q"),
                "key": {"kernel": key},
                "value": {"kernel": value},
                "output": linear(f"{name}.0.to_out"),
            },
            "mlp_norm": {"scale": case[f"w/{name}.1.0.g"]},
            "up": linear(f"{name}.1.1"),
            "down": linear(f"{name}.1.4"),
        }

    def transformer(stage):
        blocks = {i: block(f"transformers.{stage}.layers.{i}") for i in range(2)}
        return {"blocks": blocks, "norm": {"scale": case[f"w/transformers.{stage}.norm.g"]}}

    return case, {
        "global_start": case["w/start_tokens.0"][None],
        "global_embedding": table("token_embs.1.0"),
        "patch_norm": norm("token_embs.1.2"),
        "patch_linear": linear("token_embs.1.3"),
        "token_norm": norm("token_embs.1.4"),
        "global_positions": table("pos_embs.0"),
        "global_transformer": transformer(0),
        "to_local": linear("to_next_transformer_projections.0.1"),
        "local_start": case["w/start_tokens.1"][None],
        "local_embedding": table("token_embs.0"),
        "local_positions": table("pos_embs.1"),
        "local_transformer": transformer(1),
        "head": linear("to_logits"),
    }


def model_of(config: MegabyteConfig) -> Megabyte:
    """A network with the published weights."""
    shaped = nnx.eval_shape(lambda: Megabyte(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(shaped)
    params = jax.tree.map(jnp.asarray, published()[1])
    assert jax.tree.map(jnp.shape, nnx.to_pure_dict(state)) == jax.tree.map(jnp.shape, params)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graphdef, state)


@functools.partial(jax.jit, static_argnums=0)
def logits_of(config: MegabyteConfig, codes, key=None):
    return model_of(config).window_logits(codes, key)


def log_probs(logits, codes):
    return np.take_along_axis(log_softmax(logits, -1), codes[..., None].astype(int), -1)[..., 0]


def numpy_logits(params: dict, codes: np.ndarray) -> np.ndarray:
    """The logits [T, 256] of one row, token by token in float64, from the module's docstring."""
    params = jax.tree.map(lambda x: np.asarray(x, float), params)
    patch, heads, head = SMALL.patch_samples, 2, SMALL.head_size

    def apply(p, x):
        return x @ p["kernel"] + p.get("bias", 0)

    def rms(p, x):
        return p["scale"] * x / np.sqrt((x**2).mean())

    def layer_norm(p, x):
        return p["scale"] * (x - x.mean()) / np.sqrt(x.var() + 1e-5) + p["bias"]

    def shifted(xs):
        half = len(xs[0]) // 2
        before = [np.zeros_like(xs[0]), *xs[:-1]]
        return [np.concatenate([x[:half], b[half:]]) for x, b in zip(xs, before, strict=True)]

    def rotated(x, position):  # as complex numbers
        pairs = x[..., : head // 2] + 1j * x[..., head // 2 :]
        pairs = pairs * np.exp(1j * position * 10_000 ** (-2 * np.arange(head // 2) / head))
        return np.concatenate([pairs.real, pairs.imag], -1)

    def attention(p, xs):
        q, k, v = (
            [apply(p[name], x).reshape(heads, head) for x in xs]
            for name in ("query", "key", "value")
        )
        out = []
        for i in range(len(xs)):
            mixed = []
            for h in range(heads):
                query = rotated(q[i][h], i)
                scores = [query @ rotated(k[j][h], j) / head**0.5 for j in range(i + 1)]
                weights = softmax(scores)
                mixed.append(sum(w * v[j][h] for j, w in enumerate(weights)))
            out.append(apply(p["output"], np.concatenate(mixed)))
        return out

    def mlp(p, x):
        hidden = apply(p["up"], x)
        return apply(p["down"], hidden * (1 + erf(hidden / 2**0.5)) / 2)

    def transformer(p, xs):
        for block in p["blocks"].values():
            normed = [rms(block["attention_norm"], x) for x in shifted(xs)]
            xs = [x + y for x, y in zip(xs, attention(block["attention"], normed), strict=True)]
            normed = [rms(block["mlp_norm"], x) for x in shifted(xs)]
            xs = [x + mlp(block, y) for x, y in zip(xs, normed, strict=True)]
        return [rms(p["norm"], x) for x in xs]

    patches = codes.reshape(-1, patch)
    tokens = [params["global_start"][0]]
    for n, own in enumerate(patches):
        x = layer_norm(params["patch_norm"], params["global_embedding"]["embedding"][own].ravel())
        x = layer_norm(params["token_norm"], apply(params["patch_linear"], x))
        tokens.append(x + params["global_positions"]["embedding"][n])
    outputs = transformer(params["global_transformer"], tokens)
    logits = []
    for own, output in zip(patches, outputs, strict=False):
        context = apply(params["to_local"], output).reshape(patch, -1)
        tokens = params["local_embedding"]["embedding"][own] + context
        tokens = tokens + params["local_positions"]["embedding"]
        start = params["local_start"][0]
        ys = transformer(params["local_transformer"], [start, *tokens])
        logits += [apply(params["head"], y) for y in (ys[1:] if logits else ys)]
    return np.stack(logits[: len(codes)])


def test_logits_are_those_of_the_public_code_and_of_the_oracle():
    case, params = published()
    logits = logits_of(SMALL, case["y"])
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits[:, 1:], case["logits"], atol=1e-5)
    # The first sample's logits are in the mean only.
    np.testing.assert_allclose(-log_probs(logits, case["y"]).mean(), case["loss_nats"], rtol=1e-6)
    np.testing.assert_allclose(logits[0], numpy_logits(params, case["y"][0]), atol=1e-5)


def test_a_prediction_depends_on_all_samples_before_it_and_no_other():
    codes = published()[0]["y"][:1]
    others = np.repeat(codes, 20, 0)
    others[np.arange(20), np.arange(20)] ^= 255  # row i: another sample i
    change = np.abs(logits_of(SMALL, others) - logits_of(SMALL, codes)).max(-1)
    np.testing.assert_array_equal(change > 1e-5, np.triu(np.ones((20, 20), bool), 1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_equal_logits(dtype):
    config = dataclasses.replace(SMALL, compute_dtype=dtype)
    codes = published()[0]["y"]

    @jax.jit
    def stepped(codes):
        model = model_of(config)

        def run(index, carry):
            state, previous, out = carry
            state, logits = model.step_logits((), state, previous, index, jnp.int32(0))
            return state, codes[:, index], out.at[:, index].set(logits)

        begin = (model.init_state(2, 20), jnp.full(2, 77, jnp.uint8), jnp.zeros((2, 20, 256)))
        return lax.fori_loop(0, 20, run, begin)[2]

    expected = logits_of(config, codes)
    assert expected.std() > 0.5
    tolerance = 1e-4 if dtype == "float32" else 0.1
    np.testing.assert_allclose(stepped(codes), expected, atol=tolerance)


def test_dropout_has_a_key():
    config, codes = dataclasses.replace(SMALL, dropout=0.3), published()[0]["y"]
    first, again, other = (logits_of(config, codes, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 0.1
    assert jnp.abs(first - logits_of(SMALL, codes)).max() > 0.1


def test_size():
    params = nnx.state(nnx.eval_shape(lambda: Megabyte(MegabyteConfig(), rngs=nnx.Rngs(0))))
    assert sum(x.size for x in jax.tree.leaves(params)) == 33_815_808


@pytest.mark.parametrize(
    ("changes", "context", "field"),
    [
        ({"local_width": 7}, 16, "model.local_width"),
        ({"head_size": 5}, 16, "model.head_size"),
        ({}, 12, "context_samples 12 is not a multiple of 8, two patches of"),
        ({}, 24, "context_samples 24 is longer than config.model.max_patches"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, context, field):
    SMALL.check(16, True)
    with pytest.raises(UserError, match=f"config.{field}"):
        dataclasses.replace(SMALL, **changes).check(context, True)
