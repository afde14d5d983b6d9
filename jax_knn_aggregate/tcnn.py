"""Encodings and networks from tiny-cuda-nn's JSON configurations, with its parameters in and out.

What an otype computes, its defaults and the order of parameters are tiny-cuda-nn's (Müller 2021); matrices and tables
trained there fit. Its padding is kept in the parameters, and computed nowhere: columns of ones that pad an encoding act
as a bias, columns of zeros not at all, and rows of padded outputs are cut off.
"""

from __future__ import annotations

import abc
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .core import checks
from .core.checks import Array, Implementation
from .ops.hash_grid import HashGrid, hash_grid
from .ops.mlp import LeakyReLU, Sine, Softplus, Squareplus, mlp
from .ops.mlp.activations import ACTIVATIONS, Activation

__all__ = ["Model", "from_config"]

Config = Mapping[str, Any]
Params = dict[str, jax.Array]
Shape = tuple[int, ...]
#: Columns of an encoding's output, in order: how many, and whether they are computed or padding.
Run = tuple[Literal["values", "ones", "zeros"], int]

_ALIGNMENT = 16  # of what a network reads and writes


def from_config(config: Config, n_input_dims: int, n_output_dims: int | None = None) -> Model:
    """An encoding, a network, or a network behind an encoding, as tiny-cuda-nn's configuration says.

    Args:
      config: ``{"encoding": …, "network": …}`` or one of them alone, or the inner dict of one, with "otype". A network
        alone reads x as it is. Keys "optimizer" and "loss" beside them are ignored, with a warning. Names of otypes,
        activations and interpolations are matched in any case; keys that are left out have tiny-cuda-nn's defaults.
        Encodings: Identity (scale, offset), Grid, HashGrid, TiledGrid, DenseGrid (type, n_levels,
        n_features_per_level, log2_hashmap_size, base_resolution, per_level_scale, interpolation), Frequency
        (n_frequencies), SphericalHarmonics (degree, up to 4; of 3 inputs in [0, 1]) and Composite (nested, each with
        n_dims_to_encode). Networks: CutlassMLP, FullyFusedMLP (activation, output_activation, n_neurons,
        n_hidden_layers), which are the same here but for the widths that tiny-cuda-nn allows.
      n_input_dims: how many columns x has.
      n_output_dims: how many columns the network's result has; None for an encoding alone.

    Returns:
      A ``Model``.

    Raises:
      ValueError: for unknown otypes, keys and values, naming what is known. TypeError: for other types.
    """
    inputs = checks.static_integer("n_input_dims", n_input_dims)
    if inputs < 1:
        raise ValueError(f"n_input_dims is {inputs}, expected at least 1.")
    parts = _parts(config)
    encoding = _encoding(parts.get("encoding", {"otype": "Identity"}), inputs)
    if "network" not in parts:
        if n_output_dims not in (None, encoding.outputs):
            raise ValueError(
                f"n_output_dims is {n_output_dims}, but this encoding has {encoding.outputs}. Leave it out."
            )
        return Model(inputs, encoding.outputs, encoding, None)
    if n_output_dims is None:
        raise ValueError("n_output_dims is None, expected how many columns the network's result has.")
    outputs = checks.static_integer("n_output_dims", n_output_dims)
    if outputs < 1:
        raise ValueError(f"n_output_dims is {outputs}, expected at least 1.")
    return Model(inputs, outputs, encoding, _network(parts["network"], outputs))


@dataclasses.dataclass(frozen=True)
class Model:
    """What ``from_config`` makes; frozen and hashable, a static argument of jitted functions.

    Parameters are a dict of arrays: "weight_0", "weight_1", … (out, in) of the network, in tiny-cuda-nn's padded
    shapes, and "table" (rows, features) of a grid; inside a Composite, that of its i-th encoding is "nested_i/table".
    Padded columns of the first weight that meet ones are its bias; elsewhere, what is padded has gradient 0.
    """

    n_input_dims: int
    n_output_dims: int
    encoding: Encoding
    network: Network | None

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of each parameter, in the order in which tiny-cuda-nn has them."""
        return (self.network.shapes(self._width) if self.network else {}) | self.encoding.shapes

    @property
    def n_params(self) -> int:
        """How many numbers tiny-cuda-nn has as parameters, padding included."""
        return sum(map(math.prod, self.shapes.values()))

    def init(self, key: jax.Array, dtype: Any = jnp.float32) -> Params:
        """Parameters of ``dtype``, distributed as tiny-cuda-nn's: tables uniform in ±1e-4; weights uniform in
        ±√(6/(in + out)), or with activation Sine in ±30/in, those of the first layer, and ±√(6/in); in and out padded.
        """
        encoding_key, network_key = jax.random.split(key)
        params = self.encoding.init(encoding_key, dtype)
        if self.network:
            params |= self.network.init(network_key, self._width, dtype)
        return params

    def apply(
        self,
        params: Mapping[str, Array],
        x: Array,
        *,
        precision: lax.PrecisionLike = None,
        implementation: Implementation = None,
    ) -> jax.Array:
        """x (..., N, n_input_dims) -> (..., N, n_output_dims), in the dtype of the parameters, or else of x.

        x is float32 or float64, and parameters are of the dtype of x, or bfloat16 or float16 with x in float32.
        ``precision`` is as in ``mlp``; ``implementation`` as in ``hash_grid`` and ``mlp``. Differentiable in x and
        params, to any order.
        """
        arrays, x = self._checked(params), checks.as_array("x", x)
        if x.dtype not in (jnp.float32, jnp.float64):
            raise TypeError(f"x has dtype {x.dtype}, expected float32 or float64. Convert it with astype.")
        if x.ndim < 2 or x.shape[-1] != self.n_input_dims:
            raise ValueError(f"x has shape {x.shape}, expected (..., N, {self.n_input_dims}), as n_input_dims says.")
        dtypes = {a.dtype for a in arrays.values()} or {x.dtype}
        narrow = (jnp.bfloat16, jnp.float16) if x.dtype == jnp.float32 else ()
        if len(dtypes) > 1 or not dtypes <= {x.dtype, *map(jnp.dtype, narrow)}:
            raise TypeError(
                f"params have dtypes {', '.join(sorted(map(str, dtypes)))}, expected all of them in {x.dtype}, that of "
                "x; or, with x in float32, in bfloat16 or float16. Convert with astype."
            )
        (dtype,) = dtypes
        parts = [a.astype(dtype) for a in self.encoding.parts(arrays, x, implementation)]
        if self.network is None:
            return _padded(parts, self.encoding.runs(self.encoding.outputs))
        weights = self.network.pick(arrays)
        first, bias = _without_padding(weights[0], self.encoding.runs(self._width))
        weights = [first, *weights[1:]]
        weights[-1] = weights[-1][: self.n_output_dims]
        biases = None
        if bias is not None:
            biases = [bias[: weights[0].shape[0]], *(jnp.zeros(w.shape[0], dtype) for w in weights[1:])]
        return mlp(
            parts,
            weights,
            biases,
            activation=self.network.activation,
            output_activation=self.network.output_activation,
            precision=precision,
            implementation=implementation,
        )

    def params_from_tcnn(self, flat: Array) -> Params:
        """Named arrays from tiny-cuda-nn's flat ``params`` (n_params,), or from gradients of them, in their dtype."""
        flat = checks.as_array("flat", flat)
        if flat.shape != (self.n_params,):
            raise ValueError(f"flat has shape {flat.shape}, expected ({self.n_params},), the parameters of {self}.")
        ends = np.cumsum([math.prod(shape) for shape in self.shapes.values()])[:-1]
        pieces = jnp.split(flat, ends) if self.shapes else []
        return {name: a.reshape(shape) for (name, shape), a in zip(self.shapes.items(), pieces, strict=True)}

    def params_to_tcnn(self, params: Mapping[str, Array]) -> jax.Array:
        """(n_params,): tiny-cuda-nn's flat ``params`` from named arrays, or its gradients from gradients of them."""
        arrays = self._checked(params)
        return jnp.concatenate([a.ravel() for a in arrays.values()]) if arrays else jnp.zeros(0, jnp.float32)

    @property
    def _width(self) -> int:
        """Of the encoding's output, padded for a network."""
        return -(-self.encoding.outputs // _ALIGNMENT) * _ALIGNMENT

    def _checked(self, params: Mapping[str, Array]) -> Params:
        """In the order of ``shapes``."""
        if not isinstance(params, Mapping):
            raise TypeError(f"params is a {type(params).__name__}, expected a dict of arrays, as init gives it.")
        if set(params) != set(self.shapes):
            raise ValueError(f"params has the keys {sorted(params)}, expected {sorted(self.shapes)}.")
        arrays = {name: checks.as_array(f"params[{name!r}]", params[name]) for name in self.shapes}
        for name, shape in self.shapes.items():
            if arrays[name].shape != shape:
                raise ValueError(f"params[{name!r}] has shape {arrays[name].shape}, expected {shape}.")
        return arrays


# ---- Padding


def _padded(parts: Iterable[jax.Array], runs: Iterable[Run]) -> jax.Array:
    """Parts of values side by side, with ones and zeros between them as ``runs`` says."""
    values, columns = list(parts), []
    lead, dtype, remaining = values[0].shape[:-1], values[0].dtype, iter(values)
    for kind, n in runs:
        columns.append(next(remaining) if kind == "values" else jnp.full((*lead, n), kind == "ones", dtype))
    return columns[0] if len(columns) == 1 else jnp.concatenate(columns, axis=-1)


def _without_padding(weight: jax.Array, runs: Sequence[Run]) -> tuple[jax.Array, jax.Array | None]:
    """Columns of the first weight that meet values, and the sum of those that meet ones, if there are any."""
    kinds = [kind for kind, _ in runs]
    pieces = jnp.split(weight, np.cumsum([n for _, n in runs])[:-1], axis=1)
    values, ones = ([a for a, k in zip(pieces, kinds, strict=True) if k == kind] for kind in ("values", "ones"))
    bias = jnp.concatenate(ones, axis=1).sum(1) if ones else None
    return values[0] if len(values) == 1 else jnp.concatenate(values, axis=1), bias


# ---- Networks


@dataclasses.dataclass(frozen=True)
class Network:
    """A perceptron without biases, whose width of input an encoding sets."""

    outputs: int
    neurons: int
    hidden_layers: int
    activation: Activation
    output_activation: Activation

    def shapes(self, inputs: int) -> dict[str, Shape]:
        outputs = -(-self.outputs // _ALIGNMENT) * _ALIGNMENT
        widths = [inputs, *[self.neurons] * self.hidden_layers, outputs]
        return {f"weight_{i}": (widths[i + 1], widths[i]) for i in range(len(widths) - 1)}

    def pick(self, params: Params) -> list[jax.Array]:
        return [params[f"weight_{i}"] for i in range(self.hidden_layers + 1)]

    def init(self, key: jax.Array, inputs: int, dtype: Any) -> Params:
        shapes, siren = self.shapes(inputs), isinstance(self.activation, Sine)
        params = {}
        for i, (some, (name, shape)) in enumerate(zip(jax.random.split(key, len(shapes)), shapes.items(), strict=True)):
            bound = math.sqrt(6 / sum(shape)) if not siren else math.sqrt(6 / shape[1]) if i else 30 / shape[1]
            params[name] = jax.random.uniform(some, shape, dtype, -bound, bound)
        return params


#: With their K = 10. tiny-cuda-nn's names, in lower case.
_ACTIVATIONS: dict[str, Activation] = {
    **{name: ACTIVATIONS[name] for name in ("none", "relu", "silu", "tanh", "sigmoid", "exponential")},
    "leakyrelu": LeakyReLU(0.01),
    "sine": Sine(1.0),
    "softplus": Softplus(10.0),
    "squareplus": Squareplus(10.0),
}


def _network(config: Any, outputs: int) -> Network:
    c = _Reader("network", config)
    otype = c.choice("otype", {"cutlassmlp": "CutlassMLP", "fullyfusedmlp": "FullyFusedMLP"})
    fused = otype == "FullyFusedMLP"
    network = Network(
        outputs,
        c.integer("n_neurons", 128, 1),
        c.integer("n_hidden_layers", 5, 1 if fused else 0),
        c.choice("activation", _ACTIVATIONS, "ReLU"),
        c.choice("output_activation", _ACTIVATIONS, "None"),
    )
    if fused and network.neurons not in (16, 32, 64, 128):
        raise ValueError(f"{c.name}: n_neurons is {network.neurons}, expected 16, 32, 64 or 128; CutlassMLP has any.")
    c.only("feedback_alignment", False)
    c.finish()
    return network


# ---- Encodings


class Encoding(abc.ABC):
    """A map of columns of x to others."""

    inputs: int

    @property
    @abc.abstractmethod
    def outputs(self) -> int:
        """How many columns it has; of a Composite, with the padding between its parts."""

    @property
    def alignment(self) -> int:
        """Inside a Composite, its first column is at a multiple of this."""
        return 1

    @property
    def shapes(self) -> dict[str, Shape]:
        """Of its parameters."""
        return {}

    def init(self, key: jax.Array, dtype: Any) -> Params:
        return {}

    def runs(self, width: int) -> list[Run]:
        """Its columns, padded to ``width``."""
        return _some(("values", self.outputs), ("ones", width - self.outputs))

    @abc.abstractmethod
    def parts(self, params: Params, x: jax.Array, implementation: Implementation) -> list[jax.Array]:
        """Of x (..., N, inputs), an array for each run of values."""


def _some(*runs: Run) -> list[Run]:
    return [run for run in runs if run[1]]


@dataclasses.dataclass(frozen=True)
class _Identity(Encoding):
    inputs: int
    scale: float
    offset: float

    @property
    def outputs(self) -> int:
        return self.inputs

    def parts(self, params: Params, x: jax.Array, implementation: Implementation) -> list[jax.Array]:
        return [x if (self.scale, self.offset) == (1, 0) else self.scale * x + self.offset]


@dataclasses.dataclass(frozen=True)
class _Frequency(Encoding):
    """out[2n·d + 2k + b] = sin(π·2^k·x_d + b·π/2) for n frequencies."""

    inputs: int
    frequencies: int

    @property
    def outputs(self) -> int:
        return 2 * self.frequencies * self.inputs

    def parts(self, params: Params, x: jax.Array, implementation: Implementation) -> list[jax.Array]:
        turns = x[..., None] * jnp.asarray(2.0 ** np.arange(self.frequencies), x.dtype).reshape((1,) * x.ndim + (-1,))
        angle = np.pi * (turns - 2 * jnp.round(turns / 2))  # whole turns are taken off before π rounds
        return [jnp.stack([jnp.sin(angle), jnp.cos(angle)], axis=-1).reshape(*x.shape[:-1], self.outputs)]


@dataclasses.dataclass(frozen=True)
class _SphericalHarmonics(Encoding):
    """Real spherical harmonics, as polynomials of 2x − 1, which is not normalised; padded in front."""

    inputs: int
    degree: int

    @property
    def outputs(self) -> int:
        return self.degree**2

    def runs(self, width: int) -> list[Run]:
        return _some(("ones", width - self.outputs), ("values", self.outputs))

    def parts(self, params: Params, x: jax.Array, implementation: Implementation) -> list[jax.Array]:
        x, y, z = jnp.moveaxis(2 * x - 1, -1, 0)
        xx, yy, zz = x * x, y * y, z * z
        columns = [
            jnp.full_like(x, 0.28209479177387814),
            -0.48860251190291987 * y,
            0.48860251190291987 * z,
            -0.48860251190291987 * x,
            1.0925484305920792 * x * y,
            -1.0925484305920792 * y * z,
            0.94617469575755997 * zz - 0.31539156525251999,
            -1.0925484305920792 * x * z,
            0.54627421529603959 * (xx - yy),
            0.59004358992664352 * y * (yy - 3 * xx),
            2.8906114426405538 * x * y * z,
            0.45704579946446572 * y * (1 - 5 * zz),
            0.3731763325901154 * z * (5 * zz - 3),
            0.45704579946446572 * x * (1 - 5 * zz),
            1.4453057213202769 * z * (xx - yy),
            0.59004358992664352 * x * (3 * yy - xx),
        ]
        return [jnp.stack(columns[: self.outputs], axis=-1)]


@dataclasses.dataclass(frozen=True)
class _Grid(Encoding):
    grid: HashGrid

    @property
    def inputs(self) -> int:  # type: ignore[override]
        return self.grid.dim

    @property
    def outputs(self) -> int:
        return self.grid.outputs

    @property
    def alignment(self) -> int:
        return self.grid.features

    @property
    def shapes(self) -> dict[str, Shape]:
        return {"table": (self.grid.rows, self.grid.features)}

    def init(self, key: jax.Array, dtype: Any) -> Params:
        return {"table": self.grid.init(key, dtype)}

    def runs(self, width: int) -> list[Run]:
        return _some(("values", self.outputs), ("zeros", width - self.outputs))

    def parts(self, params: Params, x: jax.Array, implementation: Implementation) -> list[jax.Array]:
        return [hash_grid(x, params["table"], self.grid, implementation=implementation)]


@dataclasses.dataclass(frozen=True)
class _Composite(Encoding):
    """Encodings of consecutive columns of x, side by side."""

    nested: tuple[Encoding, ...]

    @property
    def inputs(self) -> int:  # type: ignore[override]
        return sum(e.inputs for e in self.nested)

    @property
    def outputs(self) -> int:
        return sum(self._widths) + self.nested[-1].outputs

    @property
    def alignment(self) -> int:
        return math.lcm(*(e.alignment for e in self.nested))

    @property
    def _widths(self) -> list[int]:
        """Of all but the last, padded to where the next may begin."""
        widths: list[int] = []
        for encoding, following in zip(self.nested, self.nested[1:], strict=False):
            begin = sum(widths)
            widths.append(-(-(begin + encoding.outputs) // following.alignment) * following.alignment - begin)
        return widths

    @property
    def shapes(self) -> dict[str, Shape]:
        return {f"nested_{i}/{name}": s for i, e in enumerate(self.nested) for name, s in e.shapes.items()}

    def init(self, key: jax.Array, dtype: Any) -> Params:
        keys = jax.random.split(key, len(self.nested))
        inner = [e.init(k, dtype) for e, k in zip(self.nested, keys, strict=True)]
        return {f"nested_{i}/{name}": a for i, params in enumerate(inner) for name, a in params.items()}

    def runs(self, width: int) -> list[Run]:
        widths = [*self._widths, width - sum(self._widths)]
        return [run for e, n in zip(self.nested, widths, strict=True) for run in e.runs(n)]

    def parts(self, params: Params, x: jax.Array, implementation: Implementation) -> list[jax.Array]:
        pieces = jnp.split(x, np.cumsum([e.inputs for e in self.nested])[:-1], axis=-1)
        parts = []
        for i, (e, piece) in enumerate(zip(self.nested, pieces, strict=True)):
            prefix = f"nested_{i}/"
            own = {name.removeprefix(prefix): a for name, a in params.items() if name.startswith(prefix)}
            parts += e.parts(own, piece, implementation)
        return parts


_GRIDS = {"grid": "Hash", "hashgrid": "Hash", "tiledgrid": "Tiled", "densegrid": "Dense"}


def _make_identity(c: _Reader, inputs: int) -> Encoding:
    return _Identity(inputs, c.number("scale", 1.0), c.number("offset", 0.0))


def _make_frequency(c: _Reader, inputs: int) -> Encoding:
    return _Frequency(inputs, c.integer("n_frequencies", 12, 1))


def _make_spherical_harmonics(c: _Reader, inputs: int) -> Encoding:
    if inputs != 3:
        raise ValueError(f"{c.name} has {inputs} inputs, expected 3.")
    return _SphericalHarmonics(inputs, c.integer("degree", 4, 1, 4))


def _make_grid(c: _Reader, inputs: int) -> Encoding:
    kind = c.choice("type", {k: k for k in ("hash", "dense", "tiled")}, _GRIDS[c.otype])
    levels, base = c.integer("n_levels", 16, 1), c.integer("base_resolution", 16, 1)
    growth = 2.0 if kind != "dense" else math.exp(math.log(256 / base) / (levels - 1)) if levels > 1 else 1.0
    for key, value in (("stochastic_interpolation", False), ("hash", "CoherentPrime"), ("fixed_point_pos", False)):
        c.only(key, value)
    fields = {
        "dim": inputs,
        "levels": levels,
        "features": c.integer("n_features_per_level", 2, 1),
        "log2_hashmap_size": c.integer("log2_hashmap_size", 19, 1),
        "base_resolution": base,
        "per_level_scale": c.number("per_level_scale", growth),
        "interpolation": c.choice("interpolation", {k: k for k in ("linear", "smoothstep", "nearest")}, "Linear"),
        "kind": kind,
    }
    try:
        return _Grid(HashGrid(**fields))
    except ValueError as error:
        raise ValueError(f"{c.name}: {error}") from None


def _make_composite(c: _Reader, inputs: int) -> Encoding:
    c.only("reduction", "Concatenation")
    configs = c.take("nested", None)
    if not isinstance(configs, Sequence) or isinstance(configs, str) or not configs:
        raise ValueError(f"{c.name}: nested is {configs!r}, expected a list of encodings.")
    readers = [_Reader(f"{c.name}, nested[{i}]", inner) for i, inner in enumerate(configs)]
    counts = [
        None if r.take("n_dims_to_encode", None) is None else r.integer("n_dims_to_encode", 1, 1) for r in readers
    ]
    rest = inputs - sum(n or 0 for n in counts)
    if counts.count(None) > 1 or rest < counts.count(None) or (rest and None not in counts):
        raise ValueError(
            f"{c.name}: n_dims_to_encode of its encodings are {counts}, expected {inputs} in sum, of which one may be "
            "left out."
        )
    made = (_make_encoding(r, rest if n is None else n) for r, n in zip(readers, counts, strict=True))
    return _Composite(tuple(made))


#: By otype, in lower case: as it is written, and what makes it.
_ENCODINGS: dict[str, tuple[str, Callable[[_Reader, int], Encoding]]] = {
    "identity": ("Identity", _make_identity),
    "grid": ("Grid", _make_grid),
    "hashgrid": ("HashGrid", _make_grid),
    "tiledgrid": ("TiledGrid", _make_grid),
    "densegrid": ("DenseGrid", _make_grid),
    "frequency": ("Frequency", _make_frequency),
    "sphericalharmonics": ("SphericalHarmonics", _make_spherical_harmonics),
    "composite": ("Composite", _make_composite),
}


def _encoding(config: Any, inputs: int) -> Encoding:
    return _make_encoding(_Reader("encoding", config), inputs)


def _make_encoding(c: _Reader, inputs: int) -> Encoding:
    _, make = c.choice("otype", _ENCODINGS)
    encoding = make(c, inputs)
    c.finish()
    return encoding


# ---- Reading


def _parts(config: Any) -> Config:
    """The "encoding" and "network" of a configuration, whichever form it has."""
    if not isinstance(config, Mapping):
        raise TypeError(f"config is a {type(config).__name__}, expected a dict. Read a file with json.load.")
    if "otype" in config:
        networks = ("cutlassmlp", "fullyfusedmlp")
        otype = str(config["otype"]).lower()
        if otype not in (*networks, *_ENCODINGS):
            known = ", ".join([*(name for name, _ in _ENCODINGS.values()), "CutlassMLP", "FullyFusedMLP"])
            raise ValueError(f"config: otype is {config['otype']!r}, expected one of {known}.")
        return {"network" if otype in networks else "encoding": config}
    wanted, unused = {"encoding", "network"}, {"optimizer", "loss"}
    if set(config) - wanted - unused or not wanted & set(config):
        raise ValueError(f"config has the keys {sorted(config)}, expected encoding or network or both, or else otype.")
    ignored = [key for key in ("optimizer", "loss") if key in config]
    if ignored:
        warnings.warn(f"{' and '.join(ignored)} of the configuration: ignored. JAX trains.", stacklevel=3)
    return {key: config[key] for key in ("encoding", "network") if key in config}


class _Reader:
    """Takes values out of a JSON object; ``finish`` complains about what nobody took."""

    def __init__(self, name: str, config: Any) -> None:
        if not isinstance(config, Mapping):
            raise TypeError(f"{name} is a {type(config).__name__}, expected a dict.")
        self.config, self.name, self.otype = config, name, ""
        self._known: set[str] = set()

    def take(self, key: str, default: Any) -> Any:
        self._known.add(key)
        return self.config.get(key, default)

    def choice(self, key: str, known: Mapping[str, Any], default: str | None = None) -> Any:
        """What ``known`` has for the value in lower case."""
        value = self.take(key, default)
        found = value.lower() if isinstance(value, str) else ""
        if found not in known:
            names = [v if isinstance(v, str) else v[0] if isinstance(v, tuple) else k for k, v in known.items()]
            raise ValueError(f"{self.name}: {key} is {value!r}, expected one of {', '.join(names)}, in any case.")
        if key == "otype":
            self.otype, self.name = found, f"{self.name} ({value})"
        return known[found]

    def integer(self, key: str, default: int, least: int, most: int | None = None) -> int:
        value = self.take(key, default)
        if not isinstance(value, int | np.integer) or isinstance(value, bool):
            raise TypeError(f"{self.name}: {key} is {value!r}, expected an integer.")
        if value < least or (most is not None and value > most):
            expected = f"at least {least}" if most is None else f"{least} to {most}"
            raise ValueError(f"{self.name}: {key} is {value}, expected {expected}.")
        return int(value)

    def number(self, key: str, default: float) -> float:
        value = self.take(key, default)
        if not isinstance(value, int | float | np.integer | np.floating) or isinstance(value, bool):
            raise TypeError(f"{self.name}: {key} is {value!r}, expected a number.")
        return float(value)

    def only(self, key: str, supported: Any) -> None:
        value = self.take(key, supported)
        if value != supported:
            raise ValueError(f"{self.name}: {key} is {value!r}, but only {supported!r} is supported.")

    def finish(self) -> None:
        known, unknown = (", ".join(sorted(keys)) for keys in (self._known, set(self.config) - self._known))
        if unknown:
            raise ValueError(f"{self.name}: {unknown}: unknown key; known are {known}.")
