"""A toy op, y[i] = table[k[i]] · sin(a · x[i]), made as the ops of the package are; see docs/building.md."""

import jax
import jax.numpy as jnp

from jax_knn_aggregate.core import checks
from jax_knn_aggregate.core.family import Family
from jax_knn_aggregate.core.one_target import one_target


def reference(operands, aux):
    """a (), x (N,), table (T,); k (N,) int32 -> y (N,)."""
    (a, x, table), (k,) = operands, aux
    return (table.at[k].get(mode="fill", fill_value=0, wrap_negative_indices=False) * jnp.sin(a * x),)


TOY = Family(
    "toy",
    reference=reference,
    outputs=lambda x, aux: [jax.ShapeDtypeStruct(x[1].shape, x[1].dtype)],
    x_ndims=(0, 1, 1),
    aux_ndims=(1,),
    y_ndims=(1,),
    items=((1,), (0,), (0,)),  # x, k and y: devices may each have some of the items
    kernels=one_target("toy", x=3, y=1),
)


def toy(a, x, table, k, *, implementation=None):
    """a (), x (N,), table (T,) of one float dtype, k (N,) of any integer one -> (N,), 0 where the table has no k."""
    a, x, table = (checks.as_array(name, v) for name, v in {"a": a, "x": x, "table": table}.items())
    k = checks.integers("k", k)
    shapes, dtypes = (a.shape, x.shape, table.shape, k.shape), {a.dtype, x.dtype, table.dtype}
    if tuple(map(len, shapes)) != (0, 1, 1, 1) or x.shape != k.shape:
        raise ValueError(f"a, x, table, k have shapes {shapes}, expected (), (N,), (T,), (N,). Use jax.vmap for more.")
    if dtypes not in ({jnp.dtype("float32")}, {jnp.dtype("float64")}):
        raise TypeError(f"a, x, table have dtypes {dtypes}, expected float32 or float64 for all. Use astype.")
    k = checks.narrowed(k, table.shape[0], above=-1)
    return TOY(a, x, table, k, implementation=checks.implementation(implementation))[0]
