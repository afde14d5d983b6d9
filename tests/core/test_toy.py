"""A test of the house: an op outside the package, toy/, made with the package's headers and ``core``, gets everything.

The toy is compiled by the C++ compiler here, loaded and registered; then each of its derivatives, transformations and
shardings is compared with what JAX makes of the formula in float64.
"""

import ctypes
import functools
import itertools
import math
import os
import pathlib
import re
import shlex
import shutil
import subprocess

import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from toy.toy import toy

from jax_knn_aggregate.core import ffi
from jax_knn_aggregate.core.family import Family
from jax_knn_aggregate.core.one_target import one_target

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {"a": (), "x": (17,), "table": (5,)}
NAMES = tuple(SIZES)


def compiler():
    """The command of the C++ compiler that CMake would find."""
    found = filter(None, map(shutil.which, ("c++", "g++", "clang++")))
    return shlex.split(os.environ.get("CXX", "")) or [next(found, None)]


def command(source, library):
    flags = "-std=c++17 -O1 -fPIC -shared -ffp-contract=off -fno-math-errno -Wall -Wextra -DKNN_ISA=baseline"
    headers = f"-I{ROOT / 'csrc'} -isystem {jax.ffi.include_dir()}"
    return [*compiler(), *shlex.split(f"{flags} {headers}"), str(source), "-o", str(library)]


@pytest.fixture(scope="module", autouse=True)
def _kernel(tmp_path_factory):
    """Builds and registers the toy; other tests do not see its target in the table."""
    if compiler() == [None]:
        if os.environ.get("JAX_KNN_AGGREGATE_REQUIRE_KERNELS"):
            pytest.fail("kernels are required, but there is no C++ compiler to build the toy op with")
        pytest.skip("the toy op is built by this test, and there is no C++ compiler: none on PATH, and CXX is not set")
    library = tmp_path_factory.mktemp("toy") / "toy.so"
    done = subprocess.run(command(ROOT / "tests" / "core" / "toy" / "toy.cc", library), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with pytest.MonkeyPatch.context() as patch, jax.default_device(jax.devices("cpu")[0]):
        patch.setitem(ffi.TARGETS, "cpu", ffi.TARGETS.get("cpu", frozenset()))
        ffi.register("cpu", {"toy": jax.ffi.pycapsule(ctypes.CDLL(str(library)).ToyCpu)})
        yield


def formula(a, x, table, k):
    exists = (k >= 0) & (k < table.shape[0])
    return jnp.where(exists, table[jnp.where(exists, k, 0)], 0.0) * jnp.sin(a * x)


def inputs(rng, *batch):
    x = tuple(jnp.asarray(rng.normal(size=batch + shape)) for shape in SIZES.values())
    return x, jnp.asarray(rng.integers(-1, SIZES["table"][0] + 1, batch + SIZES["x"]), jnp.int32)


def like(rng, x):
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape)), x)


def agree(got, want, tolerance=1e-12):
    for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        helpers.assert_close(g, w, tolerance)


def agree_together(got, want, tolerance):
    """As ``agree``, of all leaves as one vector: a scalar's gradient is a sum, and may cancel to almost nothing."""
    structure = jax.tree.structure(want)
    assert jax.tree.structure(got) == structure
    got, want = (jax.tree.leaves(side) for side in (got, want))
    assert [np.shape(g) for g in got] == [np.shape(w) for w in want]
    helpers.assert_close(*(np.concatenate([np.ravel(a) for a in side]) for side in (got, want)), tolerance)


def loss(op, k):
    """Not linear in y, so that cotangents of y move as well."""
    return lambda x: jnp.square(op(*x, k) + 0.3).sum()


def hvp(f, nesting):
    def product(x, v):
        if nesting == "forward over reverse":
            return jax.jvp(jax.grad(f), (x,), (v,))[1]
        if nesting == "reverse over forward":
            return jax.grad(lambda x: jax.jvp(f, (x,), (v,))[1])(x)
        if nesting == "reverse over reverse":
            return jax.grad(lambda x: sum((g * w).sum() for g, w in zip(jax.grad(f)(x), v, strict=True)))(x)
        return jax.jvp(lambda x: jax.jvp(f, (x,), (v,))[1], (x,), (v,))[1]  # forward over forward

    return product


def kernels_of(fn, *operands):
    return re.findall(r"stablehlo.custom_call @jax_knn_aggregate\.(\w+)", jax.jit(fn).lower(*operands).as_text())


def op_of(implementation):
    return lambda *operands: toy(*operands, implementation=implementation)


def test_value(cpu_implementation, rng):
    x, k = inputs(rng)
    agree(op_of(cpu_implementation)(*x, k), formula(*x, k))
    agree(jax.jit(op_of(cpu_implementation))(*x, k), formula(*x, k))


@pytest.mark.thorough_if(cpu_implementation="xla")
def test_float32(cpu_implementation, rng):
    x, k = inputs(rng)
    small = jax.tree.map(lambda a: a.astype(jnp.float32), x)
    value, gradient = jax.value_and_grad(loss(op_of(cpu_implementation), k))(small)
    assert {a.dtype for a in (value, *gradient)} == {np.dtype("float32")}
    want = jax.value_and_grad(loss(formula, k))(jax.tree.map(lambda a: a.astype(float), small))
    agree_together((value, gradient), want, 1e-5)


@pytest.mark.parametrize("of", [(0,), (1,), (2,), (0, 2), (0, 1, 2)], ids=lambda of: "+".join(NAMES[i] for i in of))
@pytest.mark.thorough_if(cpu_implementation="xla", of=[(0,), (1,), (2,), (0, 2)])
def test_first_order(cpu_implementation, rng, of):
    x, k = inputs(rng)
    v, ct = like(rng, [x[i] for i in of]), like(rng, x[1])

    def part(op):
        return lambda *some: op(*(some[of.index(i)] if i in of else a for i, a in enumerate(x)), k)

    @functools.partial(jax.jit, static_argnums=0)
    def both(op, some, v, ct):
        return jax.jvp(part(op), some, v), jax.vjp(part(op), *some)[1](ct)

    some = [x[i] for i in of]
    agree(both(op_of(cpu_implementation), some, v, ct), both(formula, some, v, ct))


@pytest.mark.parametrize("nesting", ["forward over reverse", "reverse over forward", "reverse over reverse"])
@pytest.mark.thorough_if(cpu_implementation="xla", nesting=["forward over reverse", "reverse over forward"])
def test_second_order(cpu_implementation, rng, nesting):
    x, k = inputs(rng)
    v = like(rng, x)
    agree(*(jax.jit(hvp(loss(op, k), nesting))(x, v) for op in (op_of(cpu_implementation), formula)))


@pytest.mark.parametrize("choice", [None, "xla"])
@pytest.mark.thorough_if(choice="xla")
def test_beyond_the_kernels(rng, choice):
    """Forward over forward, and third order, run the reference."""
    x, k = inputs(rng)
    v = like(rng, x)
    ours, want = loss(op_of(choice), k), loss(formula, k)
    agree(*(jax.jit(hvp(f, "forward over forward"))(x, v) for f in (ours, want)))

    def third(f):
        return jax.grad(
            lambda x: sum((g * w).sum() for g, w in zip(hvp(f, "reverse over forward")(x, v), v, strict=True))
        )

    agree(*(jax.jit(third(f))(x) for f in (ours, want)), 1e-11)


def test_kernels_that_run(rng):
    x, k = inputs(rng)
    f = loss(op_of("ffi"), k)
    assert kernels_of(f, x) == ["toy"]
    assert kernels_of(jax.grad(f), x) == ["toy"] * 2
    # As an Eikonal step: value, vjp, vjp_vjp, vjp.
    step = jax.grad(lambda x: jnp.square(jax.grad(f)(x)[1]).sum())
    assert kernels_of(step, x) == ["toy"] * 4
    with pytest.raises(NotImplementedError, match="beyond the second order"):
        jax.grad(lambda x: hvp(f, "reverse over forward")(x, x)[0].sum())(x)


@pytest.mark.parametrize("mapped", [(0,), (1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3)])
@pytest.mark.thorough_if(cpu_implementation="xla", mapped=[(1,), (2,), (3,), (0, 1), (2, 3), (0, 1, 2, 3)])
def test_vmap(cpu_implementation, rng, mapped):
    """Values and gradients, where operands that are not mapped are shared and their gradients sums."""
    many, one = [(*x, k) for x, k in (inputs(rng, 3), inputs(rng))]
    axes = [0 if i in mapped else None for i in range(4)]
    operands = [m if i in mapped else o for i, (m, o) in enumerate(zip(many, one, strict=True))]
    ct = like(rng, many[1])

    @functools.partial(jax.jit, static_argnums=0)
    def both(op, operands, ct):
        over = jax.vmap(op, in_axes=axes)
        y, pull = jax.vjp(lambda *x: over(*x, operands[3]), *operands[:3])
        each = jax.vmap(lambda *o: jax.grad(lambda *x: op(*x, o[3]).sum(), (0, 1, 2))(*o[:3]), in_axes=axes)
        return y, pull(ct), each(*operands)

    agree(both(op_of(cpu_implementation), operands, ct), both(formula, operands, ct))


@pytest.mark.thorough_if(cpu_implementation="xla")
def test_nested_vmap_of_second_order(cpu_implementation, rng):
    """a over one axis, x and k over two at other places, one table: kernels get two merged axes and copy nothing."""
    a, table = like(rng, jnp.zeros(2)), like(rng, jnp.zeros(5))
    x, k = like(rng, jnp.zeros((3, 17, 2))), jnp.asarray(rng.integers(-1, 6, (3, 17, 2)), jnp.int32)
    v = like(rng, (a, x, table))

    def over(op):
        both = jax.vmap(jax.vmap(op, (None, 0, None, 0)), (0, 2, None, 2))
        return hvp(lambda x: jnp.square(both(*x, k) + 0.3).sum(), "reverse over reverse")

    agree(*(jax.jit(over(op))((a, x, table), v) for op in (op_of(cpu_implementation), formula)))


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.thorough_if(cpu_implementation="xla")
def test_items_split_over_devices(cpu_implementation, cpu_devices, rng, kind):
    """No item moves: the gradients of what is shared are summed over devices, and nothing is gathered."""
    (a, x, table), k = inputs(rng)
    # In 32 bits: the partitioner's threads do not see that these tests enable 64.
    a, x, table = (v.astype(jnp.float32) for v in (a, jnp.tile(x[:16], 4), table))
    k = jnp.tile(k[:16], 4)
    axis_type = getattr(jax.sharding.AxisType, kind)
    mesh = jax.make_mesh((4,), ("i",), (axis_type,), devices=cpu_devices)
    split, whole = (NamedSharding(mesh, spec) for spec in (PartitionSpec("i"), PartitionSpec()))
    placed = [jax.device_put(v, s) for v, s in zip((a, x, table, k), (whole, split, whole, split), strict=True)]

    def gradient(op):
        return lambda a, x, table, k: jax.grad(lambda x: jnp.square(op(*x, k)).sum())((a, x, table))

    compiled = jax.jit(gradient(op_of(cpu_implementation))).lower(*placed).compile()
    assert "all-gather" not in compiled.as_text()
    got = compiled(*placed)
    assert got[1].sharding.is_equivalent_to(split, 1)
    agree_together(got, gradient(formula)(*(v.astype(float) for v in (a, x, table)), k), 1e-5)


@functools.cache
def mixture(n):
    """A family of as many operands as a configuration says: y0 = Σ_i sin(i x_i) x_{i+1}, y1 = Π_i (x_i + 2 k)."""

    def reference(x, aux):
        waves = sum(jnp.sin(i * a) * b for i, (a, b) in enumerate(itertools.pairwise(x)))
        return waves, math.prod(a + 2 * aux[0].astype(a.dtype) for a in x)

    return Family(
        f"mixture{n}",
        reference=reference,
        outputs=lambda x, aux: [jax.ShapeDtypeStruct(x[0].shape, x[0].dtype)] * 2,
        x_ndims=(1,) * n,
        aux_ndims=(1,),
        y_ndims=(1, 1),
        kernels=one_target("mixture", x=n, y=2),
    )


def test_any_number_of_operands(rng):
    """Twelve, of which some move and some are mapped, by one family for each number."""
    x, k = [jnp.asarray(rng.normal(size=3)) for _ in range(12)], jnp.asarray([1, 0, 1], jnp.int32)
    many = jnp.asarray(rng.normal(size=(4, 3)))
    some = (x[1], x[4], x[11])
    assert mixture(12) is mixture(12) is not mixture(3)

    def losses(op):
        def f(a, b, c):
            waves, product = op(x[0], a, *x[2:4], b, *x[5:11], c, k)
            return (jnp.square(waves) * jnp.tanh(product)).sum()

        of_first = lambda *o: op(o[0], *x[1:11], o[1], k)[0].sum()  # noqa: E731
        return f, jax.grad(f, (0, 2)), jax.vmap(jax.grad(of_first, (0, 1)), (0, None)), jax.vmap(f, (None, 0, None))

    def plain(*operands):
        return mixture(12).reference(operands[:12], operands[12:])

    nestings = "forward over reverse", "reverse over forward", "reverse over reverse", "forward over forward"

    @functools.partial(jax.jit, static_argnums=0)
    def everything(op, some, many):
        f, gradient, each, mapped = losses(op)
        over_many = jax.grad(lambda *o: mapped(*o).sum(), (0, 1))(some[0], many, some[2])
        seconds = [hvp(lambda z: f(*z), nesting)(some, some) for nesting in nestings]
        return f(*some), gradient(*some), each(many, some[2]), over_many, seconds

    agree(everything(mixture(12), some, many), everything(plain, some, many))
    # What is not asked for is no operand and no result.
    gradient = losses(mixture(12))[1]
    (last,) = [e for e in jax.make_jaxpr(gradient)(*some).eqns if e.primitive.name == "mixture12_vjp"]
    assert (len(last.invars), len(last.outvars)) == (12 + 1 + 2, 2)
    assert str(last.params["masks"]) == "<given 11, wanted 010000000001>"


def test_export(rng):
    """One artifact for any number of items, and for a platform without the kernel, where it runs the reference."""
    x, k = inputs(rng)
    (N,) = jax.export.symbolic_shape("N")
    structs = [jax.ShapeDtypeStruct(shape, float) for shape in ((), (N,), (5,))]
    gradient = jax.jit(lambda a, x, table, k: jax.grad(loss(op_of(None), k))((a, x, table)))
    check = jax.export.DisabledSafetyCheck.custom_call(ffi.PREFIX + "toy")
    exported = jax.export.export(gradient, platforms=("cpu", "cuda"), disabled_checks=[check])(
        *structs, jax.ShapeDtypeStruct((N,), jnp.int32)
    )
    assert ffi.PREFIX + "toy" in exported.mlir_module()
    read = jax.export.deserialize(exported.serialize())
    agree(read.call(*x, k), jax.grad(loss(formula, k))(x))


def test_empty(cpu_implementation):
    zeros, none = jnp.zeros(()), jnp.zeros(0)
    got = jax.grad(loss(op_of(cpu_implementation), jnp.zeros(0, jnp.int32)))((zeros + 1, none, none))
    agree(got, (zeros, none, none))


def test_checks(rng):
    (a, x, table), k = inputs(rng)
    with pytest.raises(ValueError, match=r"expected \(\), \(N,\)"):
        toy(a, x, table, k[:-1])
    with pytest.raises(TypeError, match="expected float32 or float64"):
        toy(a, x.astype(jnp.float32), table, k)
    with pytest.raises(jax.errors.JaxRuntimeError, match="operand 2"):
        struct = [jax.ShapeDtypeStruct(x.shape, x.dtype)]
        jax.block_until_ready(
            ffi.call("toy", struct)(a, x, table.astype(jnp.float32), k, given=np.int64(0), want=np.int64(8))
        )
