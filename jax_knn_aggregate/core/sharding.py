"""How primitives are split over devices: by labels of axes, from which everything else follows.

A primitive says of each axis whether it may be split. Batch axes may, along every operand that has them in full. So may
*items axes*, core axes along which the work is independent, such as that of queries; a letter names them, "." stands
for a core axis that every device needs whole. A result that lacks a label which some operand has is a sum over it.

The same labels serve three ways of splitting, none of which moves an operand that has a label or is replicated:

    jit, Auto mesh axes        the partitioner asks ``custom_partitioning`` for the program of one shard
    jit, Explicit mesh axes    shardings are in the types: the lowering is a ``shard_map``
    inside ``shard_map``       along its manual axes operands are shards already, and the user's sums are the user's

In the first two, results that sum over a split label are summed over devices, by a ``psum`` in the shard's program.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

Labels = tuple[str | None, ...]  # of one array's axes; None for an axis that is not to be split
Assignment = dict[str, tuple[str, ...]]  # label -> names of the mesh axes that it is split over


class Axes(NamedTuple):
    """The labels of a primitive's operands and results."""

    operands: tuple[Labels, ...]
    results: tuple[Labels, ...]


def axes(operands: Sequence[Any], results: Sequence[Any], cores: tuple[Sequence[str], Sequence[str]]) -> Axes:
    """Labels for arrays (or avals) whose core axes are ``cores``, one character each; batch axes are those before."""
    depth = operands[0].ndim - len(cores[0][0])
    full = jnp.broadcast_shapes(*(a.shape[:depth] for a in operands))

    def labels(a: Any, core: str) -> Labels:
        batch = (f"b{i}" if a.shape[i] == full[i] != 1 else None for i in range(depth))
        return (*batch, *(None if c == "." else c for c in core))

    return Axes(
        *(
            tuple(labels(a, core) for a, core in zip(arrays, strings, strict=True))
            for arrays, strings in zip((operands, results), cores, strict=True)
        )
    )


def _names(entry: Any) -> tuple[str, ...]:
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def _spec(labels: Labels, over: Assignment) -> PartitionSpec:
    """One mesh axis is given by its bare name, as JAX normalises it."""
    entries = [over.get(label, ()) if label else () for label in labels]
    return PartitionSpec(*(e[0] if len(e) == 1 else e or None for e in entries))


def _shard(fn: Callable[..., Sequence[jax.Array]], labels: Axes, over: Assignment) -> Callable[..., list[jax.Array]]:
    """``fn`` on one shard. Results are summed over the devices that hold parts of the sum."""
    given = dict.fromkeys(label for operand in labels.operands for label in operand if label in over)
    missing = [[n for label in given if label not in result for n in over[label]] for result in labels.results]

    def shard(*operands: jax.Array) -> list[jax.Array]:
        results = fn(*operands)
        return [jax.lax.psum(a, tuple(m)) if m else a for a, m in zip(results, missing, strict=True)]

    return shard


# Explicit mesh axes.


def _mesh(avals: Sequence[Any]) -> AbstractMesh:
    """The mesh of the avals; constants may have none."""
    meshes = [a.sharding.mesh for a in avals]
    return next((m for m in meshes if not m.empty), meshes[0])


def explicit(name: str, avals: Sequence[Any], labels: Sequence[Labels]) -> Assignment:
    """Over which Explicit mesh axes each label is split. Raises ValueError where operands cannot be split like that."""
    over: Assignment = {}
    for position, (aval, of_operand) in enumerate(zip(avals, labels, strict=True)):
        for axis, (entry, label) in enumerate(zip(aval.sharding.spec, of_operand, strict=False)):
            names = _names(entry)
            if not names:
                continue
            at = f"{name}: operand {position} of type {aval.str_short(mesh_axis_types=True)} is split along axis {axis}"
            if label is None:
                raise ValueError(
                    f"{at}, which every device needs whole. Replicate it (jax.sharding.reshard); docs/sharding.md "
                    "says what can be split, and how to keep points split over devices (points_axis)."
                )
            if over.setdefault(label, names) != names:
                raise ValueError(
                    f"{at} over mesh axes {names}, but another operand over {over[label]}. "
                    "Split both the same way (jax.sharding.reshard)."
                )
    used = [n for names in over.values() for n in names]
    if len(set(used)) < len(used):
        raise ValueError(
            f"{name}: the mesh axes {used} are used for different axes of the operands: {over}. "
            "Split each over mesh axes of its own (jax.sharding.reshard)."
        )
    return over


def typed(avals: Sequence[Any]) -> bool:
    """Whether any is split along Explicit mesh axes. Where none is, labels need not be looked at."""
    return any(entry is not None for a in avals for entry in a.sharding.spec)


def agree(name: str, operands: Sequence[Any], labels: Sequence[Labels]) -> list[Any]:
    """Splits operands that are replicated along an Explicitly split label, so that each device has matching parts."""
    avals = [jax.typeof(a) for a in operands]
    over, mesh = explicit(name, avals, labels), _mesh(avals)
    wanted = [_spec(of_operand, over) for of_operand in labels]
    return [
        a if aval.sharding.spec == spec else jax.sharding.reshard(a, NamedSharding(mesh, spec))
        for a, aval, spec in zip(operands, avals, wanted, strict=True)
    ]


def result_shardings(
    name: str, avals: Sequence[Any], results: Sequence[Any], cores: tuple[Sequence[str], Sequence[str]]
) -> list[NamedSharding]:
    """The types' shardings of the results: labels are split as in the operands."""
    mesh = _mesh(avals)
    if not typed(avals):
        return [NamedSharding(mesh, PartitionSpec(*[None] * len(a.shape))) for a in results]
    labels = axes(avals, results, cores)
    over = explicit(name, avals, labels.operands)
    return [NamedSharding(mesh, _spec(of_result, over)) for of_result in labels.results]


def extended(sharding: NamedSharding) -> NamedSharding:
    """The sharding of an array with one more axis at the end, which is not split."""
    return NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec, None))


def left_to_partitioner(fn: Callable[..., Any], shardings: Any) -> Callable[..., Any]:
    """``fn``, of operations whose shardings cannot be typed (gathers), with results as typed by ``shardings``.

    Derivatives are to be right outside jit as well. There, JAX transposes one operation after the other under the mesh
    of each, and does not take what comes from another: so all is one operation, and its operands are of the mesh, too.
    """
    mesh = jax.tree.leaves(shardings)[0].mesh
    if not mesh.explicit_axes:
        return fn
    whole = jax.jit(jax.sharding.auto_axes(fn, axes=mesh.explicit_axes, out_sharding=shardings))

    def call(*operands: jax.Array) -> Any:
        return whole(*(jax.sharding.reshard(a, NamedSharding(mesh, jax.typeof(a).sharding.spec)) for a in operands))

    return call


# Lowering.


def spread(
    name: str,
    fn: Callable[..., Sequence[jax.Array]],
    labels: Callable[[], Axes],
    avals: Sequence[Any],
    devices: int,
) -> Callable[..., Sequence[jax.Array]]:
    """``fn`` of whole operands, as it is to be lowered in a program for ``devices`` devices."""
    mesh = _mesh(avals)
    if typed(avals):
        of = labels()
        return functools.partial(_by_shard_map, fn, of, mesh, explicit(name, avals, of.operands))
    # Within shard_map the partitioner does not let Python see how the remaining Auto axes split an operand.
    if devices == 1 or mesh.manual_axes or (not mesh.empty and not mesh.auto_axes):
        return fn
    return _by_partitioner(fn, labels())


def _by_shard_map(
    fn: Callable[..., Sequence[jax.Array]], labels: Axes, mesh: AbstractMesh, over: Assignment, *operands: jax.Array
) -> Sequence[jax.Array]:
    # Operands without elements are made anew in each shard: XLA finds them unused, and the partitioner of jaxlib 0.11
    # crashes on a shard_map that does not use what it is given.
    empty = [a.size == 0 for a in operands] if any(a.size for a in operands) else [False] * len(operands)

    def shard(*given: jax.Array) -> Sequence[jax.Array]:
        rest = iter(given)

        def made(a: jax.Array, of_operand: Labels) -> jax.Array:
            parts = (math.prod(mesh.shape[n] for n in over.get(label or "", ())) for label in of_operand)
            return jnp.zeros([n // part for n, part in zip(a.shape, parts, strict=True)], a.dtype)

        all_of_them = [
            made(a, of_operand) if none else next(rest)
            for a, of_operand, none in zip(operands, labels.operands, empty, strict=True)
        ]
        return _shard(fn, labels, over)(*all_of_them)

    with jax.sharding.use_abstract_mesh(mesh):
        return jax.shard_map(
            shard,
            in_specs=tuple(_spec(of, over) for of, none in zip(labels.operands, empty, strict=True) if not none),
            out_specs=[_spec(of_result, over) for of_result in labels.results],
            axis_names=set(mesh.explicit_axes),
            check_vma=False,
        )(*(a for a, none in zip(operands, empty, strict=True) if not none))


def _no_mesh() -> contextlib.AbstractContextManager[Any]:
    """The program of one shard is traced for no mesh: under one, its operations would ask for shardings."""
    return jax.sharding.use_abstract_mesh(AbstractMesh((), ()))


def _by_partitioner(fn: Callable[..., Sequence[jax.Array]], labels: Axes) -> Callable[..., Sequence[jax.Array]]:
    def traced(*operands: jax.Array) -> list[jax.Array]:
        with _no_mesh():
            return list(fn(*operands))

    def partition(mesh: Any, operands: Sequence[Any], results: Sequence[Any]) -> Any:
        if any(jax.dtypes.canonicalize_dtype(a.dtype) != a.dtype for a in operands):
            raise NotImplementedError(
                "Arrays in 64 bits are split in one of XLA's threads, which the context manager jax.enable_x64 does "
                'not reach. Set it for all threads: jax.config.update("jax_enable_x64", True).'
            )
        over = _offered(mesh, operands, labels.operands)

        def shard(*operands: jax.Array) -> list[jax.Array]:
            with _no_mesh():
                return _shard(fn, labels, over)(*operands)

        def shardings(arrays: Sequence[Any], labels: Sequence[Labels]) -> list[NamedSharding]:
            return [NamedSharding(mesh, _spec(of, over)) for _, of in zip(arrays, labels, strict=True)]

        return mesh, shard, shardings(results, labels.results), tuple(shardings(operands, labels.operands))

    split = custom_partitioning(traced)
    # Decoded here: JAX's own decoding raises for an axis that has a part of a mesh axis, as a reshape can leave it.
    split.def_partition(partition, sharding_rule=_rule(labels), decode_shardings=False)
    return split


def _offered(mesh: Any, operands: Sequence[Any], labels: Sequence[Labels]) -> Assignment:
    """How the partitioner splits operands by label. Where two disagree the first counts; the other is moved.

    A label is left whole where its size is no multiple of the shards: padding would enter the sums over it.
    """
    over: Assignment = {}
    used: set[str] = set()
    if mesh.empty:  # the devices of the program are no one mesh
        return over
    for a, of_operand in zip(operands, labels, strict=True):
        for names, label, size in zip(_split_over(a.sharding, mesh, a.ndim), of_operand, a.shape, strict=True):
            shards = math.prod(mesh.shape[n] for n in names)
            if names and label and label not in over and not used & set(names) and size % shards == 0:
                over[label] = names
                used |= set(names)
    return over


def _split_over(sharding: Any, mesh: Any, ndim: int) -> list[tuple[str, ...]]:
    """The mesh axes over which a sharding splits each axis of an array; none where it does not take them whole."""
    n, shape = mesh.size, mesh.devices.shape
    parts = sharding.devices_indices_map((n,) * ndim)  # n is a multiple of the number of parts of any axis
    starts = np.array([[part.start or 0 for part in parts[d]] for d in mesh.devices.flat]).reshape(*shape, ndim)
    place = np.indices(shape)
    out = []
    for start in np.moveaxis(starts, -1, 0):
        steps = [start.take(1, k).flat[0] - start.flat[0] if size > 1 else 0 for k, size in enumerate(shape)]
        axes = sorted(np.flatnonzero(steps), key=lambda k: -steps[k])  # major to minor
        sizes = [shape[k] for k in axes]
        taken_whole = axes and (start * math.prod(sizes) == n * np.ravel_multi_index(list(place[axes]), sizes)).all()
        out.append(tuple(mesh.axis_names[k] for k in axes) if taken_whole else ())
    return out


def _rule(labels: Axes) -> SdyShardingRule:
    """The labels as a rule by which shardings propagate; an axis without label gets a factor that stays whole."""
    whole: list[str] = []

    def factor(label: str | None) -> str:
        if label is None:
            whole.append(f"whole{len(whole)}")
        return label or whole[-1]

    operands, results = (
        tuple(ArrayMapping(*map(factor, of_array)) for of_array in side) for side in (labels.operands, labels.results)
    )
    return SdyShardingRule(operands, results, need_replication_factors=tuple(whole))
