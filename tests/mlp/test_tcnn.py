"""tiny-cuda-nn's configurations, against its own outputs and gradients, and its parameters in and out."""

import functools
import json
import pathlib

import helpers
import jax
import jax.numpy as jnp
import mlp_oracle
import numpy as np
import pytest

import jax_knn_aggregate as jka
from jax_knn_aggregate import tcnn

#: Its float32 outputs and gradients on a GPU, of small configurations: NAME/about says of which; y of x, and gradients
#: of Σ y·dy: dx, and dparams, of mlp_* in some cases those of the first matrix alone. y and dy have padded widths.
REFERENCE = pathlib.Path(__file__).with_name("tcnn_reference.npz")
ALIKE = ["leakyrelu", "sigmoid", "silu", "sine", "tanh"]
NAMES = ["composite_hash_sh", "frequency", "nwie_hash_softplus", "sh4", "mlp_linear_nohidden", "mlp_relu",
         "mlp_relu_sigmoid_out3", "mlp_softplus", *(f"mlp_{name}" for name in ALIKE)]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thorough_if(name=["mlp_relu", "frequency", "sh4", *(f"mlp_{name}" for name in ALIKE)])
def test_agrees_with_tiny_cuda_nn(name):
    with np.load(REFERENCE) as file:
        theirs = {key.split("/")[1]: file[key] for key in file.files if key.startswith(f"{name}/")}
    about = json.loads(str(theirs["about"]))
    config, outputs = about["config"], about["outputs"]
    config.pop("n_output_dims", None)
    model = tcnn.from_config(config, about["inputs"], outputs)
    assert model.n_params == about["parameters"] == theirs["params"].size
    assert [s for n, s in model.shapes.items() if n.startswith("weight")] == [tuple(s) for s in about["layers_out_in"]]

    def both(params, x):
        y, vjp = jax.vjp(functools.partial(model.apply, precision="highest"), params, x)
        return y, *vjp(jnp.asarray(theirs["dy"][:, :outputs]))

    params = model.params_from_tcnn(theirs["params"])
    y, dparams, dx = helpers.quick_jit(both)(params, jnp.asarray(theirs["x"]))
    assert y.shape == (64, outputs) and y.dtype == np.float32
    helpers.assert_close(y, theirs["y"][:, :outputs], 1e-5)
    helpers.assert_close(dx, theirs["dx"], 5e-5)
    flat = model.params_to_tcnn(dparams)
    assert flat.shape == (model.n_params,)
    helpers.assert_close(flat[: theirs["dparams"].size], theirs["dparams"], 5e-5)


def test_parameters_there_and_back(rng):
    """Their order is weights, row by row, then tables as they are nested."""
    grid = {"otype": "HashGrid", "n_levels": 1, "base_resolution": 2, "log2_hashmap_size": 3, "n_features_per_level": 1}
    nested = [{**grid, "n_dims_to_encode": 2}, {"otype": "Identity", "n_dims_to_encode": 1}, grid]
    config = {
        "encoding": {"otype": "Composite", "nested": nested},
        "network": {"otype": "CutlassMLP", "n_neurons": 24, "n_hidden_layers": 11},
    }
    model = tcnn.from_config(config, 6, 2)
    shapes = {"weight_0": (24, 16), **{f"weight_{i}": (24, 24) for i in range(1, 11)}, "weight_11": (16, 24),
              "nested_0/table": (8, 1), "nested_2/table": (8, 1)}  # fmt: skip
    assert model.shapes == shapes and list(model.shapes) == list(shapes) and model.n_params == 24 * (32 + 240) + 16
    flat = jnp.asarray(rng.normal(size=model.n_params), np.float32)
    params = jax.jit(model.params_from_tcnn)(flat)  # which sorts keys: weight_10 stands before weight_2 there
    np.testing.assert_array_equal(params["weight_2"][1], flat[24 * (16 + 24) + 24 :][:24])
    np.testing.assert_array_equal(params["nested_2/table"][:, 0], flat[-8:])
    np.testing.assert_array_equal(model.params_to_tcnn(params), flat)
    with pytest.raises(ValueError, match=rf"flat has shape \(3,\), expected \({model.n_params},\)"):
        model.params_from_tcnn(flat[:3])
    with pytest.raises(ValueError, match=r"params has the keys \['weight_0'\], expected \['nested_0/table'"):
        model.params_to_tcnn({"weight_0": flat})
    with pytest.raises(ValueError, match=r"params\['weight_1'\] has shape \(24, 1\), expected \(24, 24\)"):
        model.apply({**params, "weight_1": params["weight_1"][:, :1]}, jnp.ones((1, 6)))
    with pytest.raises(TypeError, match="params is a list, expected a dict"):
        model.apply([], jnp.ones((1, 6)))


# ---- Padding, against columns written down


def against_columns(model, columns, x, rng):
    """Value and all first and second derivatives: ``columns(x)`` is what the network reads, padding included."""
    params = model.params_from_tcnn(jnp.asarray(rng.normal(size=model.n_params) / 4))
    encoded = np.asarray(columns(params, x))
    weights = [np.asarray(params[name]) for name in model.shapes if name.startswith("weight")]
    assert encoded.shape[1] == weights[0].shape[1]
    ct = np.zeros((len(x), weights[-1].shape[0]))
    ct[:, : model.n_output_dims] = rng.normal(size=(len(x), model.n_output_dims))
    o = mlp_oracle.Oracle(encoded, weights, None, mlp_oracle.softplus(10.0), mlp_oracle.ACTIVATIONS["none"])

    def first(params):
        y, vjp = jax.vjp(lambda params: model.apply(params, x), params)
        return y, vjp(jnp.asarray(ct[:, : model.n_output_dims]))[0]

    v = {n: rng.normal(size=s) if n.startswith("weight") else np.zeros(s) for n, s in model.shapes.items()}
    second = jax.grad(lambda params: helpers.product(first(params)[1], v))
    (y, got), bent = helpers.quick_jit(lambda params: (first(params), second(params)))(params)
    helpers.assert_close(y, o.y[:, : model.n_output_dims], 1e-12)
    _, want, _ = o.first(ct)
    v_weights = [v[n] for n in model.shapes if n.startswith("weight")]
    _, want_bent, _, _ = o.second(ct, (0 * encoded, v_weights, None))
    for i, (a, b) in enumerate(zip(want, want_bent, strict=True)):
        helpers.assert_close(got[f"weight_{i}"], a, 1e-11)
        helpers.assert_close(bent[f"weight_{i}"], b, 1e-11)


NETWORK = {"otype": "FullyFusedMLP", "n_neurons": 16, "n_hidden_layers": 2, "activation": "Softplus"}


def test_padding_of_a_composite(rng):
    """Ones behind Identity so that the grid begins at a multiple of 4, and in front of spherical harmonics."""
    grid = jka.HashGrid(3, 2, 4, 5, 3)
    nested = [
        {"otype": "Identity", "n_dims_to_encode": 2, "scale": 2.0, "offset": -1.0},
        {"otype": "HashGrid", "n_dims_to_encode": 3, "n_levels": 2, "n_features_per_level": 4, "log2_hashmap_size": 5,
         "base_resolution": 3},
        {"otype": "SphericalHarmonics", "degree": 3},
    ]  # fmt: skip
    model = tcnn.from_config({"encoding": {"otype": "Composite", "nested": nested}, "network": NETWORK}, 8, 3)
    x = rng.random((5, 8))

    def columns(params, x):
        harmonics = tcnn.from_config({"otype": "SphericalHarmonics", "degree": 3}, 3).apply({}, x[:, 5:])
        features = jka.hash_grid(x[:, 2:5], params["nested_1/table"], grid)
        return np.concatenate([2 * x[:, :2] - 1, np.ones((5, 2)), features, np.ones((5, 11)), harmonics], 1)

    against_columns(model, columns, x, rng)
    alone = tcnn.from_config({"otype": "Composite", "nested": nested}, 8)
    params = alone.init(jax.random.key(0), np.float64)
    got, want = alone.apply(params, x), columns(params, x)
    assert alone.n_output_dims == 21
    helpers.assert_close(got, np.delete(want, range(12, 23), 1), 1e-14)


def test_padding_of_a_grid(rng):
    """Zeros, so that the padded columns of the first weight have gradient 0."""
    grid = jka.HashGrid(2, 3, 2, 5, 3, 1.5, "smoothstep")
    config = {"otype": "HashGrid", "n_levels": 3, "log2_hashmap_size": 5, "base_resolution": 3,
              "per_level_scale": 1.5, "interpolation": "Smoothstep"}  # fmt: skip
    model = tcnn.from_config({"encoding": config, "network": NETWORK}, 2, 1)

    def columns(params, x):
        return np.pad(np.asarray(jka.hash_grid(x, params["table"], grid)), ((0, 0), (0, 10)))

    against_columns(model, columns, rng.random((5, 2)), rng)


@pytest.mark.parametrize("name", ["None", "Exponential", "Squareplus"])
@pytest.mark.thorough_if(name="None")
def test_padding_of_one_matrix(name, rng):
    """Ones are a bias of the outputs that are kept. Activations that the reference data does not have."""
    fns = {"None": lambda p: p, "Exponential": np.exp, "Squareplus": lambda p: (10 * p + np.sqrt(100 * p * p + 4)) / 20}
    model = tcnn.from_config({"otype": "CutlassMLP", "n_hidden_layers": 0, "output_activation": name}, 3, 2)
    x, w = rng.normal(size=(4, 3)), rng.normal(size=(16, 16))
    want = fns[name](np.pad(x, ((0, 0), (0, 13)), constant_values=1) @ w[:2].T)
    helpers.assert_close(model.apply({"weight_0": w}, x), want, 1e-13)


# ---- Encodings


def test_frequency_keeps_its_digits():
    """In float32, at frequencies where π·2^k·x has none left: whole turns come off exactly."""
    model = tcnn.from_config({"otype": "Frequency"}, 2)
    x = np.array([[0.1, 0.7], [1.3, -0.25], [5.0, 0.0]], np.float32)
    turns = x.astype(np.float64)[:, :, None] * 2.0 ** np.arange(12) % 2
    want = np.stack([np.sin(np.pi * turns), np.cos(np.pi * turns)], -1).reshape(3, 48)
    fn = helpers.quick_jit(lambda x: (model.apply({}, x), jax.grad(lambda x: model.apply({}, x)[0, 22])(x)))
    got, slope = fn(x)
    np.testing.assert_allclose(got, want, atol=3e-7)
    np.testing.assert_allclose(slope[0], [np.pi * 2**11 * np.cos(np.pi * turns[0, 0, 11]), 0], rtol=1e-4)


def test_defaults():
    grid = tcnn.from_config({"otype": "Grid"}, 3).encoding.grid
    assert (
        grid == jka.HashGrid()
        and tcnn.from_config({"otype": "HashGrid", "type": "tiled"}, 3).encoding.grid.kind == "tiled"
    )
    dense = tcnn.from_config({"otype": "densegrid", "n_levels": 5}, 2).encoding.grid
    assert dense.kind == "dense" and dense.per_level_scale == 2.0 and dense.resolutions[-1] == 256
    assert tcnn.from_config({"otype": "SphericalHarmonics"}, 3).n_output_dims == 16
    assert tcnn.from_config({"otype": "Frequency"}, 2).n_output_dims == 48
    network = tcnn.from_config({"network": {"otype": "CutlassMLP"}}, 17, 5)
    assert network.shapes == {
        "weight_0": (128, 32),
        **{f"weight_{i}": (128, 128) for i in range(1, 5)},
        "weight_5": (16, 128),
    }
    assert (network.network.activation, network.network.output_activation) == (
        jka.ops.mlp.activations.ACTIVATIONS["relu"],
        jka.ops.mlp.activations.ACTIVATIONS["none"],
    )


def test_init():
    config = {"encoding": {"otype": "HashGrid", "n_levels": 4, "log2_hashmap_size": 10},
              "network": {"otype": "CutlassMLP", "n_neurons": 64, "n_hidden_layers": 2}}  # fmt: skip
    bounds = {"ReLU": [6 / 80, 6 / 128, 6 / 80], "Sine": [(30 / 16) ** 2, 6 / 64, 6 / 64]}
    for activation, squares in bounds.items():
        config["network"]["activation"] = activation
        model = tcnn.from_config(config, 3, 1)
        params = helpers.quick_jit(model.init)(jax.random.key(0))
        params = jax.tree.map(np.asarray, params)
        assert {n: a.shape for n, a in params.items()} == model.shapes and params["weight_0"].dtype == np.float32
        for i, square in enumerate(squares):
            assert 0.97 * square**0.5 < abs(params[f"weight_{i}"]).max() <= 1.001 * square**0.5
        assert 0.99e-4 < abs(params["table"]).max() <= 1.01e-4
    assert model.init(jax.random.key(0), jnp.bfloat16)["table"].dtype == jnp.bfloat16


def test_half_precision_parameters_and_leading_axes(rng):
    config = {"encoding": {"otype": "HashGrid", "n_levels": 4, "log2_hashmap_size": 6, "base_resolution": 3},
              "network": NETWORK}  # fmt: skip
    model = tcnn.from_config(config, 3, 2)
    params = model.init(jax.random.key(0))
    params["table"] = jnp.asarray(rng.normal(size=params["table"].shape), np.float32)
    x = rng.random((2, 5, 3), np.float32)

    def narrowed(params, dtype):
        return jax.tree.map(lambda a: a.astype(dtype), params)

    apply = helpers.quick_jit(lambda params, x: [model.apply(narrowed(params, d), x) for d in (np.float32, np.float16)])
    full, half = apply(params, x)
    assert full.shape == (2, 5, 2) and half.dtype == np.float16
    helpers.assert_close(half, full, 5e-3)
    for dtype, some in ((np.float64, params), (np.float64, narrowed(params, np.float16))):
        with pytest.raises(TypeError, match=r"params have dtypes float.*expected all of them in float64"):
            model.apply(some, x.astype(dtype))
    with pytest.raises(TypeError, match="params have dtypes bfloat16, float32, expected"):
        model.apply({**params, "table": params["table"].astype(jnp.bfloat16)}, x)
    with pytest.raises(TypeError, match="x has dtype float16, expected float32 or float64"):
        model.apply(params, x.astype(np.float16))
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 2\), expected \(\.\.\., N, 3\)"):
        model.apply(params, x[..., :2])


# ---- Configurations that are refused, or in part


def test_what_is_ignored():
    config = {"encoding": {"otype": "Identity"}, "loss": {"otype": "L2"}, "optimizer": {"otype": "Adam"}}
    with pytest.warns(UserWarning, match="optimizer and loss of the configuration: ignored") as record:
        tcnn.from_config(config, 2)
    assert record[0].filename == __file__


def test_bad_configurations():
    mlp, fused, identity, grid, harmonics = (
        {"otype": name} for name in ("CutlassMLP", "FullyFusedMLP", "Identity", "Grid", "SphericalHarmonics")
    )

    def nested(*some, **options):
        return {"otype": "Composite", "nested": list(some), **options}

    def first(n):
        return {**identity, "n_dims_to_encode": n}

    cases = [  # of 3 inputs, without n_output_dims
        (ValueError, r"config has the keys \['decoding'\], expected encoding or network", {"decoding": identity}),
        (ValueError, "config has the keys .*expected", {"loss": {}}),
        (ValueError, "otype is 'OneBlob', expected one of Identity, Grid, .*FullyFusedMLP", {"otype": "OneBlob"}),
        (ValueError, r"encoding: otype is 'CutlassMLP', expected one of Identity, ", {"encoding": mlp}),
        (ValueError, "encoding: otype is None, expected one of Identity", {"encoding": {}}),
        (ValueError, "n_output_dims is None, expected", mlp),
        (ValueError, "Frequency.: n_bins: unknown key; known are n_fre", {"otype": "Frequency", "n_bins": 3}),
        (ValueError, "degree is 5, expected 1 to 4", {**harmonics, "degree": 5}),
        (ValueError, "type is 'Sparse', expected one of hash, dense, tiled", {**grid, "type": "Sparse"}),
        (ValueError, "interpolation is 'Cubic', expected one of linear", {**grid, "interpolation": "Cubic"}),
        (ValueError, "stochastic_interpolation is True, but only False", {**grid, "stochastic_interpolation": True}),
        (TypeError, "per_level_scale is '2', expected a number", {**grid, "per_level_scale": "2"}),
        (ValueError, "nested is None, expected a list of encodings", {"otype": "Composite"}),
        (ValueError, "reduction is 'Sum', but only 'Concatenation'", nested(identity, reduction="Sum")),
        (ValueError, r"are \[None, None\], expected 3 in sum", nested(identity, identity)),
        (ValueError, r"are \[2\], expected 3 in sum", nested(first(2))),
        (ValueError, r"are \[4\], expected 3 in sum", nested(first(4))),
        (ValueError, r"nested\[1\] .*: x: unknown key; .*n_dims_to_encode", nested(first(1), {**identity, "x": 1})),
    ]  # fmt: skip
    for error, match, config in cases:
        with pytest.raises(error, match=match):
            tcnn.from_config(config, 3)
    cases = [
        (ValueError, "network: otype is 'Cutlass', expected one of CutlassMLP, Fu", {"network": {"otype": "Cutlass"}}),
        (TypeError, "network is a list, expected a dict", {"network": []}),
        (ValueError, "network .*n_layers: unknown key; known are .*n_hidden_layers", {**mlp, "n_layers": 3}),
        (ValueError, "activation is 'Swish', expected one of .*silu", {**mlp, "activation": "Swish"}),
        (ValueError, "n_neurons is 24, expected 16, 32, 64 or 128", {**fused, "n_neurons": 24}),
        (ValueError, "n_hidden_layers is 0, expected at least 1", {**fused, "n_hidden_layers": 0}),
        (TypeError, "n_neurons is 64.0, expected an integer", {**mlp, "n_neurons": 64.0}),
        (ValueError, "n_output_dims is 1, but this encoding has 3. Leave it out", identity),
    ]  # fmt: skip
    for error, match, config in cases:
        with pytest.raises(error, match=match):
            tcnn.from_config(config, 3, 1)
    cases = [
        (TypeError, "config is a str, expected a dict. Read a file with json.load", "config.json", 3, 1),
        (ValueError, "n_output_dims is 0, expected at least 1", mlp, 3, 0),
        (ValueError, "n_input_dims is 0, expected at least 1", identity, 0, None),
        (TypeError, "n_input_dims is 3.0", identity, 3.0, None),
        (ValueError, "SphericalHarmonics. has 2 inputs, expected 3", harmonics, 2, None),
        (ValueError, "encoding .Grid.: dim is 5, expected one of", grid, 5, None),
    ]
    for error, match, *args in cases:
        with pytest.raises(error, match=match):
            tcnn.from_config(*args)
