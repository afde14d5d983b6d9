"""The families of perceptrons, one for each number of operands and choice of activations, and their kernels' calls."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import ffi
from ...core.batch import Shape, fit, known, size
from ...core.family import ROLES, Family, Mask, Operands, Structs
from ...core.one_target import Group, Kernel, one_target
from .activations import Activation, LeakyReLU, Plain, Sine, Softplus, Squareplus
from .reference import reference

#: In the order of ActivationKind (csrc/mlp/mlp.h).
KINDS = (
    *("none", "relu", "leaky_relu", "softplus", "sine", "silu"),
    *("tanh", "sigmoid", "exponential", "squareplus", "gelu", "gelu_exact"),
)
#: Rows of small batch entries that share all parameters are put together, so that kernels have whole tiles of them.
FEW_ROWS = 128
#: On CUDA, XLA is faster with fewer rows.
MANY_ROWS = 2**15


class Layout(NamedTuple):
    """What a family is of. Its operands are the parts of x, then all weights, then all biases, if there are any."""

    parts: int
    layers: int
    biases: bool
    activation: Activation
    output_activation: Activation
    precision: Any  # a lax.Precision, or what else lax.dot_general takes, which no kernel serves

    @property
    def operands(self) -> int:
        return self.parts + self.layers * (2 if self.biases else 1)

    def split(self, x: Group) -> tuple[Group, Group, Group | None]:
        """Parts, weights, biases."""
        first, end = self.parts, self.parts + self.layers
        return x[:first], x[first:end], x[end:] if self.biases else None

    def widths(self, x: Group) -> list[int]:
        parts, weights, _ = self.split(x)
        return [sum(part.shape[-1] for part in parts), *(w.shape[-2] for w in weights)]


def _kind(activation: Activation) -> tuple[str, float] | None:
    match activation:
        case Plain(name):
            return name, 0.0
        case LeakyReLU(slope):
            return "leaky_relu", slope
        case Softplus(beta):
            return "softplus", beta
        case Sine(omega):
            return "sine", omega
        case Squareplus(beta):
            return "squareplus", beta
    return None


@functools.cache
def family(layout: Layout) -> Family:
    """x = (parts of x (N, width), weights (out, in), biases (out,)), aux = (), y = (N, O)."""

    def of_operands(x: Operands, aux: Operands) -> tuple[jax.Array]:
        return (reference(*layout.split(x), *layout[3:]),)

    def outputs(x: Structs, aux: Structs) -> list[jax.ShapeDtypeStruct]:
        return [jax.ShapeDtypeStruct((x[0].shape[0], layout.widths(x)[-1]), x[0].dtype)]

    parts = tuple(range(layout.parts))
    return Family(
        "mlp",
        reference=of_operands,
        outputs=outputs,
        x_ndims=(2,) * (layout.parts + layout.layers) + (1,) * (layout.layers if layout.biases else 0),
        aux_ndims=(),
        y_ndims=(2,),
        items=(parts, (), (0,)),
        linear=(range(layout.operands), (0,)),
        kernels=_kernels(layout),
        pays=functools.partial(_pays, layout),
    )


def _pays(layout: Layout, role: str, platform: str, x: Operands, wanted: Mask) -> bool:
    """Where kernels are faster than XLA: benchmarks/results/mlp-cuda.json has times of both."""
    if platform != "cuda":
        return True
    if x[0].dtype != jnp.float32 or known(size(x[0].shape[:-1]), MANY_ROWS) < MANY_ROWS:
        return False
    if ROLES[role].results == "y" or not any(wanted[layout.parts : layout.operands]):
        return True
    if not 3 <= layout.layers <= 5 or min(layout.widths(x)[1:-1]) < 48:
        return False
    if role == "vjp":
        return layout.precision != lax.Precision.HIGHEST
    return layout.activation not in (Plain("none"), Plain("relu")) and not isinstance(layout.activation, LeakyReLU)


def _kernels(layout: Layout) -> dict[str, Kernel]:
    kinds = [kind for kind in map(_kind, (layout.activation, layout.output_activation)) if kind is not None]
    if len(kinds) < 2 or not isinstance(layout.precision, lax.Precision):
        return {}
    if layout.parts > ffi.number("mlp.max_parts") or layout.layers > ffi.number("mlp.max_layers"):
        return {}
    attributes = {
        "parts": np.int32(layout.parts),
        "layers": np.int32(layout.layers),
        "biases": np.int32(layout.biases),
        "kinds": np.array([KINDS.index(kind) for kind, _ in kinds], np.int32),
        "parameters": np.array([parameter for _, parameter in kinds], np.float64),
        "precision": np.int32(layout.precision.value),
    }
    roles = one_target(
        "mlp",
        x=layout.operands,
        y=1,
        attributes=lambda x, aux: attributes,
        sums=range(layout.parts, layout.operands),
        scratch=functools.partial(_scratch, layout),
    )
    return {role: _served(layout, role, kernel) for role, kernel in roles.items()}


def _scratch(layout: Layout, platform: str, batch: Shape, x: Group, results: Group) -> list[jax.ShapeDtypeStruct]:
    if platform != "cuda" or not any(r is not None for r in results[: layout.operands]):
        return []
    entries = _sum_entries(layout, batch, results)
    sums, item = 0 if entries is None else size(entries), max(x[0].dtype.itemsize, 4)
    return [jax.ShapeDtypeStruct((ffi.mlp_cuda_scratch_bytes(layout.widths(x), item, sums),), jnp.uint8)]


def _sum_entries(layout: Layout, batch: Shape, results: Group) -> Shape | None:
    """Batch axes of the wanted gradients in parameters, together."""
    wanted = [r.shape[: len(batch)] for r in results[layout.parts : layout.operands] if r is not None]
    return jnp.broadcast_shapes(*wanted) if wanted else None


def _served(layout: Layout, role: str, kernel: Kernel) -> Kernel:
    """``kernel`` where it serves, with the rows of small batch entries put together."""
    in_rows = {"x": (True,) * layout.parts + (False,) * (layout.operands - layout.parts), "y": (True,)}
    groups_in_rows = [in_rows[of] for of in ("x", *ROLES[role].groups)]
    results_in_rows = [rows for of in ROLES[role].results for rows in in_rows[of]]

    def call(platform: str, batch: Shape, x: Group, aux: Group, *rest: Group) -> list[jax.Array] | None:
        *groups, results = rest
        widths = layout.widths(x)
        if max(widths) > ffi.number(f"{platform}.mlp_max_width"):
            return None
        if platform == "cuda" and not ffi.mlp_cuda_serves(widths, x[0].dtype.itemsize):
            return None  # shared memory has no room
        if platform == "cuda" and known(size(_sum_entries(layout, batch, results) or ()), None) is None:
            return None  # scratch would be of a size that is not known yet

        depth, N = len(batch), x[0].shape[-2]
        pairs = list(zip((x, *groups, results), (*groups_in_rows, results_in_rows), strict=True))
        parameters = [a for group, of in pairs for a, rows in zip(group, of, strict=True) if not (rows or a is None)]
        shared = all(a.shape[depth - 1] == 1 for a in parameters)
        if not depth or not shared or known(N, FEW_ROWS) >= FEW_ROWS:
            return kernel(platform, batch, x, aux, *groups, results)

        *outer, n = batch

        def merged(a: Any, rows: bool) -> Any:
            if a is None:
                return None
            core = (n * N, a.shape[-1]) if rows else a.shape[depth:]
            if isinstance(a, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct((*(outer if rows else a.shape[: depth - 1]), *core), a.dtype)
            wide = jnp.broadcast_to(a, (*a.shape[: depth - 1], n, *a.shape[depth:])) if rows else a
            return wide.reshape(*a.shape[: depth - 1], *core)

        x, *groups, wanted = [tuple(merged(a, rows) for a, rows in zip(g, of, strict=True)) for g, of in pairs]
        got = call(platform, tuple(outer), x, aux, *groups, wanted)
        if got is None:
            return None
        there = [(s, rows) for s, rows in zip(results, results_in_rows, strict=True) if s is not None]
        return [
            fit(a.reshape(*batch, N, a.shape[-1]), s.shape) if rows else a.reshape(s.shape)
            for a, (s, rows) in zip(got, there, strict=True)
        ]

    return call
