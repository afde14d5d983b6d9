"""Projection of Gaussians and their colours by harmonics: the families, what their kernels are called with, and a
primitive for what has no derivative.

Kernels compute both in one pass; ``csrc/splat/project/formulas.h`` tells how. The primitive emits the same call as the
family's value, and XLA merges equal calls.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ...core import ffi
from ...core.batch import Shape, batch_shape, over_batch, over_merged_batch
from ...core.family import Family, Operands, Structs
from ...core.ffi import bits
from ...core.one_target import Group, one_target
from ...core.primitive import bind, make_primitive, piecewise_constant
from . import harmonics, projection
from .projection import Camera, Screen

Struct = jax.ShapeDtypeStruct
_TARGET = "splat_project"
#: Core axes of y: means2d, conics, opacities, and channels, which without harmonics are z alone.
_Y = 4


class Lens(NamedTuple):
    """What is static about a camera; ``reach`` says whether the tiles within three standard deviations are wanted."""

    width: int
    height: int
    near: float
    far: float
    eps2d: float
    antialiased: bool
    reach: bool


class Kind(NamedTuple):
    """Of which operands Gaussians consist; ``sh_degree`` is None without harmonics."""

    covariances: bool
    offset: bool
    sh_degree: int | None

    def names(self) -> list[str]:
        """Of x but for the camera, in the order of the kernels' operands."""
        shape = ["covariances"] if self.covariances else ["quats", "scales"]
        more = ["means2d_offset"] * self.offset + ["colors"] * (self.sh_degree is not None)
        return ["means", *shape, "opacities", *more]

    def ndims(self) -> tuple[int, ...]:
        """Core axes of x."""
        return (*(_NDIMS.get(name, 2) for name in self.names()), 1)


_NDIMS = {"opacities": 1, "covariances": 3, "colors": 3}


class Seen(NamedTuple):
    """What the camera sees of Gaussians; all 0 of those that are not drawn.

    Attributes:
      means2d: (P, 2). conics: (P, 3). opacities: (P,), antialiased.
      channels: (P, 4), colours by harmonics and z; z alone (P,) without them.
      depths: (P,) float32. radii: (P,) int32. reach: (P, 4) int32, or None.
    """

    means2d: jax.Array
    conics: jax.Array
    opacities: jax.Array
    channels: jax.Array
    depths: jax.Array
    radii: jax.Array
    reach: jax.Array | None


def project(
    lens: Lens,
    given: dict[str, jax.Array],
    sh_degree: int | None,
    camera: jax.Array,
    usable: jax.Array,
    implementation: str | None,
) -> Seen:
    """Of arrays by the names of arguments, and what ``projection.camera`` gives; the first four are differentiable."""
    kind = Kind("covariances" in given, "means2d_offset" in given, sh_degree)
    operands = [*(given[name] for name in kind.names()), camera, usable.astype(jnp.int32)]
    means2d, conics, opacities, channels = family(lens, kind)(*operands, implementation=implementation)
    depths, radii, *reach = bind(_BESIDE, *operands, lens=lens, kind=kind, implementation=implementation)
    return Seen(means2d, conics, opacities, channels, depths, radii, reach[0] if reach else None)


# ---- In plain JAX


def _seen(lens: Lens, kind: Kind, x: Operands, usable: jax.Array) -> tuple[tuple[jax.Array, ...], list[jax.Array]]:
    """y, and what has no derivative."""
    given = dict(zip(kind.names(), x, strict=False))
    camera = projection.camera_of(x[-1])
    drawn, radii, tiles = _probe(lens, *lax.stop_gradient((given, camera)), usable != 0)
    screen, z = _see(lens, given, camera, drawn)
    if kind.sh_degree is None or camera.centre is None:
        shown = drawn
        channels = jnp.where(shown, z, 0)
    else:
        sight = jnp.where(drawn[None], given["means"].T - camera.centre, 1)
        directions = sight / jnp.sqrt(projection.dot(sight, sight))[None]
        count = (kind.sh_degree + 1) ** 2
        colors, finite = harmonics.colors(given["colors"][:, :count], directions, kind.sh_degree)
        shown = drawn & finite
        channels = jnp.where(shown[:, None], jnp.concatenate([colors, z[:, None]], -1), 0)
    conics, ratio = projection.conics(Screen(*(jnp.where(shown, a, 1) for a in screen)))
    opacities = jnp.where(shown, given["opacities"], 0)
    if lens.antialiased:
        opacities = opacities * jnp.sqrt(jnp.maximum(ratio, 2.5e-5))
    means2d, conics = (jnp.where(shown[:, None], a, 0) for a in (jnp.stack([screen.u, screen.v], -1), conics))
    beside = [jnp.where(shown, z, 0).astype(jnp.float32), jnp.where(shown, radii, 0)]
    if lens.reach:
        beside.append(jnp.where(shown[:, None], tiles, 0))
    return (means2d, conics, opacities, channels), beside


def _see(lens: Lens, given: dict[str, jax.Array], camera: Camera, drawn: jax.Array | None) -> tuple[Screen, jax.Array]:
    """Gaussians on the screen, and their z; where they are not drawn, of something whose derivatives are finite."""

    def safe(a: jax.Array, instead: float) -> jax.Array:
        return a if drawn is None else jnp.where(drawn.reshape(-1, *[1] * (a.ndim - 1)), a, instead)

    position = projection.to_camera(camera, safe(given["means"], 0))
    position = position if drawn is None else jnp.where(drawn[None], position, 1)
    shape: projection.Shape
    if "covariances" in given:
        shape = projection.covariances(safe(given["covariances"], 0))
    else:
        shape = projection.ellipsoids(safe(given["quats"], 1), safe(given["scales"], 0))
    screen = projection.project(camera, position, shape, lens.eps2d, lens.width, lens.height)
    if "means2d_offset" in given:
        offset = safe(given["means2d_offset"], 0)
        screen = screen._replace(u=screen.u + offset[:, 0], v=screen.v + offset[:, 1])
    return screen, position[2]


def _probe(
    lens: Lens, given: dict[str, jax.Array], camera: Camera, usable: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which Gaussians can be drawn, whatever their colours are; radii; tiles.

    What cannot is replaced before it is seen again, with derivatives: a ``where`` behind the computation would not do,
    as its derivative is 0·NaN where something on the way is not finite.
    """
    screen, z = _see(lens, given, camera, None)
    conic, _ = projection.conics(screen)
    drawn = usable & (z > lens.near) & (z < lens.far) & (screen.det != 0)
    for a in (*screen, given["opacities"]):
        drawn &= jnp.isfinite(a)
    drawn &= jnp.isfinite(conic).all(-1)
    radii, tiles = projection.reach(screen, lens.width, lens.height)
    meets = (tiles[:, 0] < tiles[:, 1]) & (tiles[:, 2] < tiles[:, 3])
    return drawn, jnp.where(meets, radii, 0), tiles


# ---- By kernels


@functools.cache
def family(lens: Lens, kind: Kind) -> Family:
    """x = the arrays that ``kind`` names and the camera; aux = (whether it sees anything, int32,); y as in ``Seen``."""
    ndims = kind.ndims()

    def of_operands(x: Operands, aux: Operands) -> tuple[jax.Array, ...]:
        return _seen(lens, kind, x, aux[0])[0]

    def outputs(x: Structs, aux: Structs) -> list[Struct]:
        return [Struct(shape, x[0].dtype) for shape in _y_shapes(kind, x[0].shape[0])]

    def value(platform: str, batch: Shape, x: Group, aux: Group, y: Group) -> Any:
        return _forward(lens, kind, (*x, *aux))[:_Y] if ffi.available(_TARGET, platform) else None

    def scratch(platform: str, batch: Shape, x: Group, results: Group) -> list[Struct]:
        if platform != "cuda" or results[len(ndims) - 1] is None:
            return []
        warps = -(-x[0].shape[-2] // ffi.number("cuda.warp"))
        return [Struct((*batch, x[-1].shape[-1], warps), x[0].dtype)]

    kernels = one_target(
        _TARGET,
        x=len(ndims),
        y=_Y,
        attributes=lambda x, aux: _attributes(lens, kind),
        sums=range(len(ndims) - 1),
        scratch=scratch,
    )
    return Family(
        "splat_project",
        reference=of_operands,
        outputs=outputs,
        x_ndims=ndims,
        aux_ndims=(0,),
        y_ndims=[len(shape) for shape in _y_shapes(kind, 0)],
        kernels={**kernels, "value": value},
    )


def _y_shapes(kind: Kind, P: int) -> list[Shape]:
    return [(P, 2), (P, 3), (P,), (P,) if kind.sh_degree is None else (P, 4)]


def _beside(lens: Lens, P: int) -> list[Struct]:
    reach = [Struct((P, 4), jnp.int32)] if lens.reach else []
    return [Struct((P,), jnp.float32), Struct((P,), jnp.int32), *reach]


def _attributes(lens: Lens, kind: Kind) -> dict[str, Any]:
    integers = {
        "width": lens.width,
        "height": lens.height,
        "covariances": kind.covariances,
        "offset": kind.offset,
        "degree": -1 if kind.sh_degree is None else kind.sh_degree,
        "antialiased": lens.antialiased,
    }
    numbers = {"near": lens.near, "far": lens.far, "eps2d": lens.eps2d}
    return {n: np.int32(v) for n, v in integers.items()} | {n: np.float64(v) for n, v in numbers.items()}


def _forward(lens: Lens, kind: Kind, operands: Operands) -> list[jax.Array]:
    """y and what has no derivative, by one call."""
    ndims, P = kind.ndims(), operands[0].shape[-2]
    batch = batch_shape(operands, (*ndims, 0))
    results = [Struct(shape, operands[0].dtype) for shape in _y_shapes(kind, P)] + _beside(lens, P)
    full = [Struct((*batch, *s.shape), s.dtype) for s in results]
    want = bits([*(None for _ in ndims), *full])
    call = ffi.call(_TARGET, full)
    return list(call(*operands, given=np.int64(0), want=want, **_attributes(lens, kind)))


# ---- What has no derivative


def _beside_outputs(*avals: Any, lens: Lens, kind: Kind) -> list[Struct]:
    batch = batch_shape(avals, (*kind.ndims(), 0))
    return [Struct((*batch, *s.shape), s.dtype) for s in _beside(lens, avals[0].shape[-2])]


def _beside_cores(*, lens: Lens, kind: Kind) -> tuple[list[str], list[str]]:
    return ["." * n for n in (*kind.ndims(), 0)], ["." * len(s.shape) for s in _beside(lens, 0)]


def _beside_reference(*operands: jax.Array, lens: Lens, kind: Kind) -> list[jax.Array]:
    return over_batch(lambda *o: _seen(lens, kind, o[:-1], o[-1])[1], operands, (*kind.ndims(), 0))


def _beside_kernel(platform: str, *operands: jax.Array, **static: Any) -> list[jax.Array] | None:
    if not ffi.available(_TARGET, platform):
        return None

    def call(operands: Sequence[jax.Array], results: list[Struct], full: Shape) -> list[jax.Array]:
        return _forward(**static, operands=tuple(operands))[_Y:]

    return over_merged_batch(call, operands, operands[0].ndim - 2, _beside_outputs(*operands, **static))


def _make() -> Any:
    p = make_primitive(
        "splat_reach",
        reference=_beside_reference,
        outputs=_beside_outputs,
        cores=_beside_cores,
        kernel=_beside_kernel,
    )
    piecewise_constant(p)
    return p


#: Depths, radii, reach.
_BESIDE = _make()
