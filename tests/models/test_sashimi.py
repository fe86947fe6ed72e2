"""SaShiMi and S4: the public PyTorch code's numbers, convolution against recurrence, causality.

`parity/` holds weights, inputs, outputs and gradients that the public code of S4 and SaShiMi
(without GLU, A, B and P shared by the channels) computed at tiny sizes, in float32. Its weights
have PyTorch's names and layouts; gradients hold C~ = C (I - dA^L), not C, fixed.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import as_on, random_codes
from flax import nnx
from jax import lax

from patchwave_jax.models import s4
from patchwave_jax.models.s4 import S4, hippo_legs
from patchwave_jax.models.sashimi import SaShiMi, SaShiMiConfig, s4_parameters

SMALL = SaShiMiConfig(width=8, num_layers=2, pools=(4, 2), state_size=16)
PARITY = Path(__file__).parents[1] / "parity"


def random_sashimi(config: SaShiMiConfig = SMALL, seed: int = 0) -> SaShiMi:
    """A model whose parameters, biases and norms included, are all away from their start."""
    graphdef, params = nnx.split(SaShiMi(config, rngs=nnx.Rngs(seed)))
    rng = np.random.default_rng(seed)
    params = jax.tree.map(lambda x: x + jnp.asarray(rng.normal(0, 0.1, x.shape), x.dtype), params)
    return nnx.merge(graphdef, params)


def in_float64(module):
    """The same module in float64, where `jax.enable_x64` holds."""
    graphdef, params = nnx.split(module)
    return nnx.merge(graphdef, jax.tree.map(lambda x: jnp.asarray(np.asarray(x, float)), params))


@partial(jax.jit, static_argnums=0)
def _logits(graphdef, params, codes, key):
    return nnx.merge(graphdef, params).window_logits(codes, key)


def logits_of(model: SaShiMi, codes, key=None):
    return _logits(*nnx.split(model), codes, key)


# The parity cases' names.


def s4_of(tree, prefix: str) -> dict[str, np.ndarray]:
    """An S4 layer's entries; of a pair of states the public code stores the other one."""
    kernel = {k: tree[f"{prefix}.kernel.{k}"] for k in ("A_real", "A_imag", "P", "B", "C")}
    return {
        "log_dt": tree[f"{prefix}.kernel.inv_dt"][:, 0],
        "log_decay": kernel["A_real"][0],
        "frequency": -kernel["A_imag"][0],
        "P": kernel["P"][0, 0],
        "B": kernel["B"][0, 0],
        "C": kernel["C"][0],
        "D": tree[f"{prefix}.D"][0],
    }


def linear_of(tree, prefix: str) -> dict[str, np.ndarray]:
    weight = tree[f"{prefix}.weight"]
    return {"kernel": weight.reshape(weight.shape[:2]).T, "bias": tree[f"{prefix}.bias"]}


def norm_of(tree, prefix: str) -> dict[str, np.ndarray]:
    return {"scale": tree[f"{prefix}.weight"], "bias": tree[f"{prefix}.bias"]}


def level_of(tree, depth: int, depths: int = 2, layers: int = 2) -> dict:
    level, name, first = {}, "c_layers.", 0
    if depth < depths:
        up = depths - 1 - depth  # the public code numbers them from the inside
        level["down"] = linear_of(tree, f"backbone.d_layers.{depth}.linear")
        level["up"] = linear_of(tree, f"backbone.u_layers.{up}.0.linear")
        level["lower"] = level_of(tree, depth + 1)
        name, first = f"u_layers.{up}.", 1
    level["blocks"] = {}
    for i in range(layers):
        mixer, mlp = (f"backbone.{name}{first + 2 * i + j}" for j in range(2))
        level["blocks"][i] = {
            "s4_norm": norm_of(tree, f"{mixer}.norm"),
            "s4": s4_of(tree, f"{mixer}.layer.layer"),
            "mix": linear_of(tree, f"{mixer}.layer.output_linear.0"),
            "mlp_norm": norm_of(tree, f"{mlp}.norm"),
            "mlp_in": linear_of(tree, f"{mlp}.layer.ff.0.0"),
            "mlp_out": linear_of(tree, f"{mlp}.layer.ff.2"),
        }
    return level


def sashimi_of(tree) -> dict:
    return {
        "embedding": {"embedding": tree["emb.weight"]},
        "level": level_of(tree, 0),
        "norm": norm_of(tree, "backbone.norm"),
        "head": linear_of(tree, "head"),
    }


def entries(name: str, prefix: str) -> dict[str, np.ndarray]:
    with np.load(PARITY / name) as case:
        return {k.removeprefix(prefix): case[k] for k in case if k.startswith(prefix)}


def with_params(module, params: dict):
    """`module` with all its parameters replaced."""
    graphdef, state = nnx.split(module)
    assert jax.tree.structure(nnx.to_pure_dict(state)) == jax.tree.structure(params)
    nnx.replace_by_pure_dict(state, jax.tree.map(jnp.asarray, params))
    return nnx.merge(graphdef, state)


def with_c_free(layer: S4, gradients: dict, length: int) -> dict:
    """Gradients that hold C~ fixed, turned into ones that hold C fixed, by the chain rule."""
    graphdef, params = nnx.split(layer)

    def truncated(params):
        C = nnx.merge(graphdef, params).truncated(length)
        return jnp.stack([C.real, C.imag], -1)

    pull = jax.jit(lambda params, cotangent: jax.vjp(truncated, params)[1](cotangent)[0])
    through_c = nnx.to_pure_dict(pull(params, gradients["C"]))
    return {k: through_c[k] + (0 if k == "C" else g) for k, g in gradients.items()}


def assert_gradients_close(found: dict, expected: dict) -> None:
    """Each array's error, in parts of its largest entry."""
    flat = jax.tree_util.tree_leaves_with_path(expected)
    for (path, e), f in zip(flat, jax.tree.leaves(found), strict=True):
        name = jax.tree_util.keystr(path)
        np.testing.assert_allclose(f, e, rtol=0, atol=2e-4 * np.abs(e).max() + 1e-8, err_msg=name)


# S4.


def test_legs_in_diagonal_form():
    """P* (z - A)^-1 B is p (z - A)^-1 b of the dense LegS, and A's eigenvalues -1, -2, ..."""
    size, z = 10, 0.3 + 2.0j
    k = np.arange(size)
    root = np.sqrt(2 * k + 1)
    legs = -np.where(k[:, None] > k, np.outer(root, root), np.diag(k + 1.0))
    Lambda, P, B = (np.concatenate([x, x.conj()]) for x in hippo_legs(size))
    A = np.diag(Lambda) - np.outer(P, P.conj())
    np.testing.assert_allclose(np.sort(np.linalg.eigvals(A).real), -np.arange(size, 0, -1.0))
    response = P.conj() @ np.linalg.solve(z * np.eye(size) - A, B)
    expected = np.sqrt(k + 0.5) @ np.linalg.solve(z * np.eye(size) - legs, root)
    np.testing.assert_allclose(response, expected)


@pytest.mark.parametrize(
    ("length", "terms", "platform_dependent"),
    [
        (200, 2**20, lax.platform_dependent),
        (201, 2_000, lax.platform_dependent),
        (1, 2**20, lax.platform_dependent),
        (200, 2_000, as_on("tpu")),
    ],
)
def test_kernel_and_recurrence_are_the_dense_model(length, terms, platform_dependent, monkeypatch):
    """In float64, against C dA^l dB with the N x N matrices of the definition."""
    monkeypatch.setattr(s4, "CHUNK_TERMS", terms)
    monkeypatch.setattr(lax, "platform_dependent", platform_dependent)
    layer = S4(6, 16, rngs=nnx.Rngs(1))
    dt, Lambda, D = (np.asarray(x, np.complex128) for x in (layer.dt, layer.Lambda, layer.D[...]))
    stored = [np.asarray(x[...], float) @ [1, 1j] for x in (layer.P, layer.B, layer.C)]
    Lambda, P, B, C = (np.concatenate([x, x.conj()], -1) for x in (Lambda, *stored))
    A, identity = np.diag(Lambda) - np.outer(P, P.conj()), np.eye(16)
    expected = np.empty((6, length))
    for channel, half in enumerate(dt / 2):
        dA = np.linalg.solve(identity - half * A, identity + half * A)
        x = np.linalg.solve(identity - half * A, 2 * half * B)
        for sample in range(length):
            expected[channel, sample] = (C[channel] @ x).real
            x = dA @ x

    with jax.enable_x64(True):
        u = np.random.default_rng(0).normal(size=(2, length, 6))

        @nnx.jit
        def run(layer, u):
            step, empty = partial(s4.step, layer.recurrence()), jnp.zeros((2, 6, 8), complex)
            _, stepped = lax.scan(step, empty, jnp.moveaxis(u, 1, 0))
            return layer.kernel(length), layer(u), jnp.moveaxis(stepped, 0, 1)

        kernel, convolved, stepped = run(in_float64(layer), jnp.asarray(u))
        np.testing.assert_allclose(kernel, expected, atol=1e-6 * abs(expected).max())
        direct = D.real * u + np.stack(
            [
                np.stack([np.convolve(u[b, :, c], expected[c])[:length] for c in range(6)], -1)
                for b in range(2)
            ]
        )
        scale = abs(direct).max()
        np.testing.assert_allclose(stepped, direct, atol=1e-6 * scale)
        np.testing.assert_allclose(convolved, direct, atol=1e-6 * scale)


def test_kernel_in_float32():
    """At the start, long kernels are good to 1e-4 of their norm; step sizes are the extremes."""
    layer = S4(4, 64, rngs=nnx.Rngs(0))
    layer.log_dt[...] = jnp.log(jnp.array([1e-3, 4e-3, 2e-2, 1e-1]))

    @nnx.jit
    def kernel_of(layer):
        return layer.kernel(4_096)

    kernel = kernel_of(layer)
    assert kernel.dtype == jnp.float32
    with jax.enable_x64(True):
        expected = kernel_of(in_float64(layer))
        error = jnp.linalg.norm(kernel - expected, axis=-1) / jnp.linalg.norm(expected, axis=-1)
        assert error.max() < 1e-4


def test_s4_layer_matches_the_public_code():
    case, raw = entries("s4_layer.npz", ""), entries("s4_layer.npz", "raw/")
    u, length = jnp.swapaxes(case["u"], 1, 2), case["u"].shape[-1]
    layer = with_params(S4(6, 16, rngs=nnx.Rngs(0)), s4_of(raw, "layer"))
    output = linear_of(raw, "output_linear.0")
    truncated = case["w/layer.kernel.C"][0] @ np.array([1, 1j], np.complex64)

    def finish(y):
        return jax.nn.gelu(y, approximate=False) @ output["kernel"] + output["bias"]

    @nnx.jit
    def run(layer):
        step, empty = partial(s4.step, layer.recurrence()), jnp.zeros((2, 6, 8), jnp.complex64)
        _, stepped = lax.scan(step, empty, jnp.swapaxes(u, 0, 1))
        kernels = layer.kernel(length), layer.kernel_of(truncated, length)
        gradient = nnx.grad(lambda layer: (finish(layer(u)) ** 2).mean())(layer)
        y, y_step = finish(layer(u)), finish(jnp.swapaxes(stepped, 0, 1))
        return kernels, layer.truncated(length), y, y_step, gradient

    kernels, found, y, y_step, gradient = run(layer)
    for kernel in kernels:
        np.testing.assert_allclose(kernel, case["kernel"][0], atol=1e-6)
    np.testing.assert_allclose(found, truncated, atol=5e-5)
    np.testing.assert_allclose(y, jnp.swapaxes(case["y"], 1, 2), atol=1e-5)
    np.testing.assert_allclose(y_step, jnp.swapaxes(case["y_step"], 1, 2), atol=1e-5)
    held = s4_of(entries("s4_layer.npz", "g/"), "layer")
    assert_gradients_close(nnx.to_pure_dict(gradient), with_c_free(layer, held, length))


# SaShiMi.


@pytest.mark.parametrize(
    ("changes", "published", "exact"),
    [
        ({"num_layers": 6}, 3.13e6, 3_144_832),
        ({"glu": True}, 4.76e6, 4_764_160),
    ],
)
def test_published_sizes(changes, published, exact):
    config = dataclasses.replace(SaShiMiConfig(), **changes)
    params = nnx.state(nnx.eval_shape(lambda: SaShiMi(config, rngs=nnx.Rngs(0))))
    total = sum(x.size for x in jax.tree.leaves(params))
    assert abs(total / published - 1) < 0.02
    assert total == exact


def test_logits_and_gradients_match_the_public_code():
    case, raw = entries("sashimi.npz", ""), entries("sashimi.npz", "raw/")
    config = dataclasses.replace(SMALL, state_size=64)
    model = with_params(SaShiMi(config, rngs=nnx.Rngs(0)), sashimi_of(raw))
    codes = jnp.asarray(case["y"])

    @nnx.jit
    def nats(model):
        logits = model.window_logits(codes)
        chosen = jnp.take_along_axis(logits, codes[..., None].astype(int), -1)[..., 0]
        return (jax.nn.logsumexp(logits, -1) - chosen).mean(), logits

    (loss, logits), gradients = nnx.value_and_grad(nats, has_aux=True)(model)
    np.testing.assert_allclose(logits, case["logits"], atol=1e-4)
    np.testing.assert_allclose(loss, case["loss_nats"], rtol=1e-6)

    expected = sashimi_of(entries("sashimi.npz", "g/"))
    level, held, length = model.level, expected["level"], codes.shape[1]
    while level is not None:
        for i, block in enumerate(level.blocks):
            held["blocks"][i]["s4"] = with_c_free(block.s4, held["blocks"][i]["s4"], length)
        length //= level.pool
        level, held = level.lower, held.get("lower")
    assert_gradients_close(nnx.to_pure_dict(gradients), expected)


@pytest.mark.parametrize(
    "changes", [{}, {"glu": True, "pools": (), "compute_dtype": "bfloat16"}], ids=str
)
def test_steps_equal_logits(changes):
    """In float32 to 1e-4 of logits of 3; in bfloat16 to what its rounding leaves."""
    config = dataclasses.replace(SMALL, **changes)
    model, codes = random_sashimi(config), random_codes(2, 320)
    expected = logits_of(model, codes)

    @nnx.jit
    def stepped(model, codes):
        prepared = model.prepare()

        def run(carry, index):
            state, code = carry
            state, logits = model.step_logits(prepared, state, code, index, jnp.int32(0))
            return (state, codes[:, index]), logits

        start = model.init_state(2, 320), jnp.full(2, 128, jnp.uint8)
        return jnp.swapaxes(lax.scan(run, start, jnp.arange(codes.shape[1]))[1], 0, 1)

    assert expected.std() > 0.5
    tolerance = 0.1 if "compute_dtype" in changes else 1e-4
    np.testing.assert_allclose(stepped(model, codes), expected, atol=tolerance)


def test_causal_by_gradient():
    """A level's output depends on its input up to that sample, the pooled levels' included."""
    level = random_sashimi().level
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, 48, 8)), jnp.float32)
    direction = jnp.asarray(np.random.default_rng(1).normal(size=8), jnp.float32)
    jacobian = nnx.jit(lambda level, x: jax.jacrev(lambda x: (level(x) @ direction)[0])(x))
    slope = jacobian(level, x)[:, 0]
    reach = jnp.abs(slope).max(-1)  # of output [i] from input [j]
    assert reach.shape == (48, 48)
    assert jnp.triu(reach, 1).max() < 1e-5 * reach.max()
    assert jnp.where(jnp.tri(48, dtype=bool), reach, jnp.inf).min() > 1e-4 * reach.max()


def test_a_sample_is_not_in_its_own_context():
    model, codes = random_sashimi(), random_codes(2, 320)
    for sample in (0, 7, 240):
        other = codes.copy()
        other[:, sample] ^= 255
        change = jnp.abs(logits_of(model, other) - logits_of(model, codes)).max((0, 2))
        assert change[: sample + 1].max() < 1e-5
        assert change[sample + 1] > 1e-2


def test_dropout_has_a_key():
    config = dataclasses.replace(SMALL, pools=(2,), num_layers=1, dropout=0.3)
    model, codes = random_sashimi(config), random_codes(1, 16)
    first, again, other = (logits_of(model, codes, jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert jnp.abs(first - other).max() > 0.1
    assert jnp.abs(first - logits_of(model, codes)).max() > 0.1


def test_s4_parameters_are_dt_a_and_b():
    mask = nnx.to_pure_dict(s4_parameters(nnx.state(random_sashimi())))
    true = {"log_dt", "log_decay", "frequency", "P", "B"}
    assert mask["level"]["lower"]["blocks"][1]["s4"] == dict.fromkeys(true, True) | {
        "C": False,
        "D": False,
    }
    assert sum(jax.tree.leaves(mask)) == 3 * 2 * len(true)  # levels, layers


def test_clips_are_whole_pooling_periods():
    with pytest.raises(ValueError, match=r"12 samples are not a multiple of 8, .*\.pools \(4, 2\)"):
        random_sashimi().window_logits(random_codes(1, 12))
