"""Random problems of random shapes, layouts and contents, against oracles and against each other. No test of pytest's.

    python -P tests/fuzz.py --classes 200 --contents 100 --minutes 10 [--seed S] [--share I/N] [--only CLASS[,CONTENT]]

A class is what jit compiles: an op, its sizes, dtypes, options, and the axes over which vmap maps its operands. It is
compiled once, beside the reference and a float64 oracle, and run on many contents. A content that fails prints one
line, and --only with its numbers repeats it. Of N processes with --share I/N each takes classes of its own.

Names: ``d`` is a dict of operands by name: arguments, integers, and "ct NAME" and "v NAME", cotangents of outputs and
tangents of arguments. "Full" operands have all mapped axes in front, "placed" ones where vmap looks for them.
"""

import argparse
import collections
import functools
import pathlib
import random
import sys
import time
import traceback

import jax
import jax.numpy as jnp
import numpy as np

import jax_knn_aggregate as jka

sys.path.insert(0, str(pathlib.Path(__file__).parent))  # which python -P leaves out, so that the checkout is not in it
import helpers
from hash_grid import oracle as grids

sys.path.insert(1, str(pathlib.Path(__file__).parent / "splat"))
import splat_oracle as splats
import splat_scenes

INTEGERS = [np.int8, np.int16, np.int32, np.int64, np.uint8, np.uint16, np.uint32, np.uint64]
HALF = [jnp.bfloat16, jnp.float16]
#: Relative errors in norm up to which nobody asks how far off rounded operands alone would be, by the result's dtype.
#: Half precision has two roundings where a derivative is the sum of two kernels' results.
TOLERANCE = {"float64": 1e-10, "float32": 3e-5, "bfloat16": 2e-2, "float16": 4e-3}


def pick(rng, *options):
    return options[rng.integers(len(options))]


def some(rng, names, share=0.6):
    """A random subset that is not empty, in order."""
    chosen = [n for n in names if rng.random() < share]
    return chosen or [pick(rng, *names)]


def integers(rng, dtype, shape, end, wild=0.2):
    """Mostly in [0, end), some out of range: next to it, the dtype's extremes, and such as wrap into it."""
    info = np.iinfo(dtype)
    special = [-1, end, info.min, info.max, 2**32, 2**32 + 1, -(2**31), 2**31]
    special = np.array([n for n in special if info.min <= n <= info.max], dtype)
    inside = rng.integers(0, max(1, min(end, int(info.max) + 1)), shape).astype(dtype)
    return np.where(rng.random(shape) < wild, rng.choice(special, shape), inside)


def narrowed(a, end):
    """What integers of any dtype mean: int64 in [0, end), or −1."""
    inside = (a >= 0) & (a < end)
    return np.where(inside, np.where(inside, a, a.dtype.type(0)).astype(np.int64), -1)


def anything(rng, shape, dtype):
    """Garbage: zeros, random bits, or numbers among which some are not finite."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=int))
    kind = pick(rng, "zeros", "bits", "numbers")
    if kind == "zeros":
        return np.zeros(shape, dtype)
    if kind == "bits":
        return np.frombuffer(rng.bytes(size * dtype.itemsize), dtype).reshape(shape)
    if dtype.kind == "i":
        return rng.choice(np.array([-(2**31), -1, 0, 1, 31, 32, 10**6, 2**31 - 1], dtype), shape)
    broken = rng.choice([np.nan, np.inf, -np.inf], shape)
    return np.where(rng.random(shape) < 0.5, broken, rng.normal(size=shape)).astype(dtype)


def scattered(rng, a, dtype):
    """Of any order of magnitude, from denormal to nearly overflowing: all entries alike, or each by itself."""
    top = np.log10(float(np.finfo(dtype).max))
    with np.errstate(all="ignore"):
        return a * 10 ** rng.uniform(-1.15 * top, 0.9 * top, pick(rng, (), a.shape))


def fixed(d):
    """The operands of a call, without directions of derivatives."""
    return {n: a for n, a in d.items() if " " not in n}


def off(got, want):
    """‖got − want‖ / ‖want‖ over what is finite; infinite where other places are. NaN and ±inf count as one: an order
    of operations may turn one into the other."""
    with np.errstate(all="ignore"):
        want = want.astype(got.dtype)  # what overflows there, overflows here
    computed = np.float64 if got.dtype == np.float64 else np.float32
    # Weights may have underflowed, or the result: below that, only that it is as small.
    small = max(1e10 * float(np.finfo(computed).tiny), 1e3 * float(jnp.finfo(got.dtype).smallest_subnormal))
    got, want = got.astype(np.float64), want.astype(np.float64)
    finite = np.isfinite(want)
    if (np.isfinite(got) != finite).any():
        return np.inf
    got, want = got[finite], want[finite]
    scale = np.abs(want).max(initial=0)
    if scale < small:
        return 0.0 if np.abs(got).max(initial=0) < 2 * small else np.inf
    return np.linalg.norm((got - want) / scale) / np.linalg.norm(want / scale)


# ---- What all problems have in common


class Problem:
    """A class. Subclasses have: names, outputs, call, oracle, content, checks, and ndims of all operands."""

    def draw(self, rng, ndims):
        """Sizes of mapped axes, outermost first, and for each operand where each of them is, or None."""
        depth = pick(rng, 0, 0, 1, 1, 2)
        self.levels = tuple(0 if rng.random() < 0.03 else int(rng.integers(1, 4)) for _ in range(depth))
        self.axes = {n: (0,) * depth for n in ("idxs", "live", "place")}
        forced = [pick(rng, *(n for n in ndims if " " not in n)) for _ in self.levels]
        self.inside = bool(rng.random() < 0.4)  # derivatives inside vmap, or of it
        share = pick(rng, 0.2, 0.5)
        for name, ndim in ndims.items():
            axes, inner = [None] * depth, ndim
            for level in reversed(range(depth)):
                if forced[level] == name or rng.random() < share:
                    axes[level] = int(rng.integers(0, inner + 1)) if ndim is not None else 0
                    inner += 1
            if not self.inside and name.startswith("ct "):
                axes = [0] * depth
            if not self.inside and name.startswith("v "):
                axes = self.axes[name[2:]]
            self.axes[name] = tuple(axes)
        self.front = tuple(max(1, n) for n in self.levels)  # a mapped axis of size 0 is cut when it is placed
        self.ours, self.xla = (helpers.quick_jit(self.program(f)) for f in (self.call, self.reference))
        self.wide = helpers.oracle_jit(self.program(self.oracle))

    def placed(self, name, a):
        for level, axis in reversed(list(enumerate(self.axes[name]))):
            at = (slice(None),) * level
            a = a[(*at, 0)] if axis is None else np.moveaxis(a[(*at, slice(self.levels[level]))], level, level + axis)
        return a

    def full(self, name, a):
        for level, axis in enumerate(self.axes[name]):
            if axis is None:
                a = np.expand_dims(a, level)
                a = np.broadcast_to(a, (*a.shape[:level], self.levels[level], *a.shape[level + 1 :]))
            else:
                a = np.moveaxis(a, level + axis, level)
        return a

    def place(self, d):
        return {n: jax.tree.map(functools.partial(self.placed, n), a) for n, a in d.items()}

    def item(self, d, at):
        """The operands of one call without vmap."""
        return {n: jax.tree.map(lambda a, n=n: self.full(n, a)[at], a) for n, a in d.items()}

    def mapped(self, fn, d):
        for level in reversed(range(len(self.levels))):
            fn = jax.vmap(fn, in_axes=({n: self.axes[n][level] for n in d},))
        return fn(d)

    def derivatives(self, apply, d):
        ct, v = ({n.removeprefix(p): a for n, a in d.items() if n.startswith(p)} for p in ("ct ", "v "))
        x, moving = fixed(d), {n: d[n] for n in v}

        def value(moving):
            y = apply({**x, **moving})
            return {n: y[n] for n in ct}

        def first(moving, ct):
            return jax.vjp(value, moving)[1](ct)[0]

        def along(moving, ct):
            if self.reverse:
                return helpers.product(first(moving, ct), v)
            return helpers.product(jax.jvp(value, (moving,), (v,))[1], ct)

        y = apply(x)
        found = {
            "values": y,
            "first": first(moving, ct),
            "second": jax.grad(along, (0, 1))(moving, ct),
            "forward": jax.jvp(value, (moving,), (v,))[1],
            "forward over reverse": jax.jvp(first, (moving, ct), (v, jax.tree.map(lambda a: 0.5 * a, ct)))[1],
        }
        if "touched" in y:  # linear, and so of a gradient that counts in how many live terms an element is
            found["touched"] = jax.grad(lambda moving: apply({**x, **moving})["touched"].sum())(moving)
        return found

    def program(self, call):
        if self.inside:
            return lambda d: self.mapped(functools.partial(self.derivatives, call), d)
        return functools.partial(self.derivatives, lambda d: self.mapped(call, d))

    def poison(self, rng, d):
        """NaN or ±inf in an operand or two; returns what to call that."""
        names = [n for n in d if n.removeprefix("v ") in self.names or n.startswith("ct ")]
        names = sorted({pick(rng, *names) for _ in range(pick(rng, 1, 1, 2))})
        for name in names:
            d[name] = d[name].copy()
            if size := d[name].size:
                at = rng.integers(0, size, pick(rng, 1, 3, size // 4 + 1))
                values = pick(rng, [np.nan], [np.inf], [-np.inf], [np.nan, np.inf, -np.inf])
                d[name].flat[at] = rng.choice(values, len(at))
        return f"not finite {' '.join(names)}"

    def run(self, rng, report):
        kind, d = self.content(rng)
        report.kind = kind
        d = self.place(d)
        got = jax.tree.map(np.asarray, self.ours(d))
        y = got["values"]
        given = {n: a for n, a in d.items() if n not in self.ours_only} | self.given(d, y)

        def oracle(rounding):
            exact = ("idxs", "live", "ids", "place")
            return self.wide({n: a if n in exact else self.rounded(rng, a, rounding) for n, a in given.items()})

        want = oracle(0)
        self.check_untouched(report, got, want.pop("touched"))
        if kind in self.exact_kinds:
            eps = float(jnp.finfo(y[self.outputs[-1]].dtype).eps)
            self.compare(report, got, want, functools.cache(lambda: [oracle(eps) for _ in range(2)]))
        elif kind == "wild ids":  # counted to wrong rays
            finite = all(np.isfinite(a).all() for a in jax.tree.leaves(got))
            report.check("bounds", finite, "ray_id in no order makes results that are not finite")
        elif kind != "wild":
            given = {n: y.get(n, a) for n, a in given.items() if n != "live"}  # neighbours at infinity are named here
            self.compare(report, got, jax.tree.map(np.asarray, self.xla(given)), None, kind)
        self.checks(rng, report, kind, d, got)
        if self.levels and 0 not in self.levels and report.content < 2:
            self.check_loop(rng, report, d, y)

    def rounded(self, rng, a, rounding):
        return np.asarray(a, np.float64) * (1 + rounding * rng.uniform(-1, 1, a.shape))

    def compare(self, report, got, want, nearby, kind=""):
        """nearby: oracles of operands off by a rounding each, where terms cancel. None: want is the reference."""
        suffix = "" if nearby else ", not finite"
        for part in ("values", "first", "second", "forward", "forward over reverse"):

            def leaves(results, part=part):
                some = {n: results[part][n] for n in self.outputs} if part == "values" else results[part]
                return jax.tree_util.tree_leaves_with_path(some)

            for i, ((path, a), (_, b)) in enumerate(zip(leaves(got), leaves(want), strict=True)):
                where, allowed = f"{part}{jax.tree_util.keystr(path)}", TOLERANCE[str(a.dtype)]
                report.check("shapes", a.shape == b.shape, f"{where}: {a.shape}, expected {b.shape}")
                if a.shape != b.shape or (not nearby and self.may_differ(part, kind, path)):
                    continue
                error, allowed = off(a, b), allowed if nearby else 10 * allowed
                if error > allowed and nearby:
                    allowed = max(allowed, *(30 * off(leaves(n)[i][1].astype(a.dtype), b) for n in nearby()))
                new, gone = (int((np.isfinite(m) & ~np.isfinite(n)).sum()) for m, n in ((b, a), (a, b)))
                how = f"{new} wrongly not finite, {gone} wrongly finite"
                how = how if new or gone else f"off by {error:.1e} > {allowed:.1e}"
                report.check(part + suffix, error <= allowed, f"{where}: {how}")

    def may_differ(self, part, kind, path):
        return False

    def check_untouched(self, report, got, touched):
        """Exactly 0, whatever else is NaN."""
        for part in ("first", "second", "forward over reverse"):
            bars = got[part][0] if part == "second" else got[part]
            for name, bar in bars.items():
                report.check("dtypes", bar.dtype == self.dtypes[name], f"{part} {name}: {bar.dtype}")
                bad = (touched[name] == 0) & (bar != 0)
                report.check("untouched", not bad.any(), f"{part} {name}: {bar[bad][:1]} where nothing lives")

    def check_loop(self, rng, report, d, y):
        at = tuple(int(rng.integers(n)) for n in self.levels)
        # Arrays of JAX, not of NumPy, which does not flush subnormals: in one way of computing, all have the same bits.
        one = jax.tree.map(np.asarray, self.call(helpers.tree(self.item(fixed(d), at))))
        for name, a in one.items():
            b = y[name][at]
            if np.issubdtype(a.dtype, np.integer):
                report.check("vmap", np.array_equal(a, b), f"{name}: other indices than without vmap")
            else:
                error = off(b, a)
                report.check("vmap", error <= TOLERANCE[str(a.dtype)], f"{name}: {error:.1e} off that without vmap")


# ---- Aggregates and searches


class Aggregate(Problem):
    # The oracle is float64 and knows neither overflow nor underflow: contents for it have none among live pairs.
    exact_kinds = ("plain", "shifted", "rotation", "general", "signed", "integers", "zeros", "huge", "tiny")
    ours_only = ("lengths", "warm", "given", "table", "garbage", "mask")

    def __init__(self, rng):
        self.metric = pick(rng, "aniso", "aniso", "iso")
        self.op = pick(rng, "aggregate", "aggregate", "search", "precomputed", "lookup")
        self.metric = "aniso" if self.op == "lookup" else self.metric
        big = rng.random() < 0.15
        self.P = P = pick(rng, 1024, 1025, 1100, 2100) if big else pick(rng, 1, 2, 5, 31, 32, 33, 60)
        self.Q = pick(rng, 0, 1, 2, 5, 17, 33)
        self.F = pick(rng, 0, 1, 3, 4, 8, 17)
        self.K = pick(rng, 1, min(P, 2), min(P, 8), min(P, 33), 100 if big else P)
        if self.op == "precomputed":
            self.K = pick(rng, 0, self.K, self.K + 3)
        self.width = min(P, self.K + pick(rng, 0, 2)) if self.op == "lookup" else 0  # of the table
        self.W = pick(rng, 0, 1, 5, 40)
        self.B = () if big or rng.random() < 0.5 else (0 if rng.random() < 0.06 else int(rng.integers(1, 4)),)
        self.dtype = np.dtype(pick(rng, np.float32, np.float32, np.float64))
        self.integer = pick(rng, *INTEGERS)
        half = self.dtype == np.float32 and rng.random() < 0.3
        self.searches = self.op in ("aggregate", "search")
        self.lengths = self.op != "precomputed" and rng.random() < 0.4
        self.index = None if self.op == "precomputed" else pick(rng, None, "valid", "stale", "garbage")
        self.warm = self.searches and bool(rng.random() < 0.5)
        self.builder = pick(rng, None, None, "xla")
        self.reverse = bool(rng.random() < 0.6)

        b = len(self.B)
        parameters = helpers.ARGUMENTS[self.metric][2:]
        if self.op == "search":  # no features, and a Euclidean one no sigma either
            parameters = parameters[1:] if self.metric == "aniso" else ()
        self.names = ("q", "p", *parameters)
        self.outputs = ("dists",) if self.op == "search" else helpers.OUTPUTS
        self.dtypes = dict.fromkeys((*self.names, *self.outputs), self.dtype)
        if half and self.op != "search":
            self.dtypes["f"] = self.dtypes["f_out"] = np.dtype(pick(rng, *HALF))
        few = pick(rng, 0.3, 0.9)  # few: what is shared is summed where others vary
        self.wrt, self.asked = some(rng, self.names, few), some(rng, self.outputs, 0.7)
        ndims = dict.fromkeys(self.names, b + 2) | {n: b + 3 for n in self.names if n == "R"}
        extra = {"lengths": b, "warm": b + 2} if self.searches else {"lengths": b}
        self.shared_table = bool(rng.random() < 0.5)
        extra |= {"given": b + 2} if self.op == "precomputed" else {}
        extra |= {"table": 2 if self.shared_table else b + 2} if self.op == "lookup" else {}
        extra = {n: k for n, k in extra.items() if getattr(self, n, True)}
        extra |= {"garbage": None, "mask": None} if self.index == "garbage" else {}
        ndims = ndims | {n: k for n, k in extra.items() if k is not None}
        ndims |= {f"ct {n}": b + 2 for n in self.asked} | {f"v {n}": ndims[n] for n in self.wrt}
        self.draw(rng, ndims)
        for name in extra.keys() - ndims.keys():  # arrays of several ranks: in front
            self.axes[name] = tuple(pick(rng, 0, None, None) for _ in self.levels)

    def __str__(self):
        of = f"{self.metric} {self.op} B={self.B} Q={self.Q} P={self.P} F={self.F} K={self.K} {self.dtypes['p']}"
        of += f" f={self.dtypes['f']}" if "f" in self.names else ""
        how = f"vmap {self.levels} {'inside' if self.inside else 'outside'}" if self.levels else "no vmap"
        options = [f"index={self.index}", *(["lengths"] * self.lengths), *(["warm"] * self.warm)]
        return f"{of}, {how}, {' '.join(options)}, {np.dtype(self.integer)}, of {self.asked} in {self.wrt}"

    # The op.

    def build(self, d):
        """The index that searches are given: valid, of another cloud, or with other numbers in it."""
        p = d["p"]
        parameters = (d["sigma"], d["R"]) if self.metric == "aniso" and self.op != "lookup" else ()
        if self.index == "stale":
            p, parameters = 0.5 * p[..., ::-1, :], tuple(2 * a for a in parameters)
        options = {} if self.index == "stale" else self.lengths_of(d)
        index = jka.build_index(p, *parameters, **options, implementation=self.builder)
        if "garbage" in d:
            index = jax.tree.map(lambda a, m, g: jnp.where(m, g, a), index, d["mask"], d["garbage"])
        return index

    def lengths_of(self, d):
        return {"p_lengths": d["lengths"]} if self.lengths else {}

    def call(self, d):
        x = [d.get(n) for n in helpers.ARGUMENTS[self.metric]]
        options = self.lengths_of(d)
        if self.op == "precomputed":
            return helpers.precomputed(self.metric, x, d["given"])._asdict()
        index = {} if self.index is None else {"index": self.build(d)}
        if self.op == "lookup":
            y = jka.knn_aggregate_aniso_lookup(*x, d["table"], self.K, **options, **index)._asdict()
            nearest = jka.knn_search(*x[:2], 1, **options, **index).idxs[..., 0]
            near = jka.knn_search(x[1], x[1], self.width, **options).idxs
            return y | {"nearest": nearest, "near": near, "table": jka.build_knn_table(x[1], self.width, **options)}
        warm = {"warm_idxs": d["warm"]} if self.warm else {}
        op = helpers.aggregate if self.op == "aggregate" else helpers.search
        y = op(self.metric, x, self.K, **options, **index, **warm)._asdict()
        bad = self.index in ("stale", "garbage")
        other = index or {"index": jka.build_index(*self.cloud(x), **options)}
        ways = {"by itself": {}, "index": other, "warm": warm, "both": other | warm}
        if not bad:
            every = jnp.broadcast_to(jnp.arange(self.P), (*self.B, self.Q, self.P))
            y["all dists"] = helpers.precomputed(self.metric, self.complete(d), every).dists
        for name in ("index", "both") if bad else ways:
            y[f"idxs, {name}"] = helpers.search(self.metric, x, self.K, **options, **ways[name]).idxs
        return y

    def cloud(self, x):
        return (x[1], *x[3:]) if self.metric == "aniso" else x[1:2]

    def complete(self, d):
        """All arguments: a search has no features, and a Euclidean one no precision."""
        ones = jnp.ones((*d["p"].shape[:-1], 1), d["p"].dtype)
        return [d.get(n, ones) for n in helpers.ARGUMENTS[self.metric]]

    def reference(self, d):
        y = helpers.precomputed(self.metric, self.complete(d), d["idxs"], implementation="xla")._asdict()
        return {n: y[n] for n in self.outputs}

    def oracle(self, d):
        x, idxs = self.complete(d), d["idxs"]
        y = dict(zip(helpers.OUTPUTS, helpers.formula(self.metric, idxs)(*x), strict=True))

        def count(idxs, d):
            named = sum(d[n].reshape(self.P, -1).sum(1) for n in self.names if n != "q")
            return jnp.where(idxs >= 0, d["q"].sum(1)[:, None] + named[idxs], 0.0).sum()

        d = {n: d[n] for n in self.names}
        return {n: y[n] for n in self.outputs} | {"touched": (jax.vmap(count) if self.B else count)(idxs, d)}

    def may_differ(self, part, kind, path):
        """Where features matter but nothing asks for their sum: NaN·0 or nothing at all."""
        return "f_out" not in self.asked and (path[-1].key == "f" or "f" in kind.split())

    def given(self, d, y):
        # At distance +inf a neighbour is an empty slot in everything but its index.
        live = (y["idxs"] >= 0) & (y["dists"] != np.inf)
        return {"idxs": np.where(live, y["idxs"], -1), "live": live}

    # Contents.

    def content(self, rng):
        full = (*self.front, *self.B)
        items = int(np.prod(full, dtype=int))
        kinds = (*self.exact_kinds, "plain", "wild", "wild", *["not finite"] * 4)
        kind = pick(rng, *kinds) if items else "plain"
        broken, kind = kind == "not finite", pick(rng, "plain", "integers", "huge") if kind == "not finite" else kind
        size = {"Q": self.Q, "P": self.P, "F": self.F}
        if kind in ("integers", "huge", "tiny"):
            copies, flat = rng.random(2) < 0.4
            each = (helpers.integer_cloud(rng, self.metric, **size, copies=copies, flat=flat) for _ in range(items))
            x = [np.stack(a).reshape(*full, *a[0].shape) for a in zip(*each, strict=True)]
            x[3] = x[3] / 32  # weights of far points with negative sigma stay in range
            single = self.dtype == np.float32
            if kind == "huge":  # one coordinate of a far point suffices to overflow; the rest is exact and never does
                far = rng.random((*self.B, self.P, 1)) < 0.3  # the same ones in all operands, mapped or not
                x[0], near = x[0] * 2.0**20, x[1] * 2.0**20
                x[1] = np.where(far, x[1] * 2.0 ** (70 if single else 600), near)
                x[3] = np.where(far, 1.0, np.abs(x[3]))
                if self.metric == "aniso":
                    x[4] = np.where(far[..., None], np.eye(3), x[4])
            if kind == "tiny":
                x[:2] = (a * 2.0 ** (-30 if single else -250) for a in x[:2])
        else:
            shape = kind if kind in ("shifted", "rotation", "general", "signed") else "plain"
            x = list(helpers.cloud(rng, self.metric, **size, batch=full, kind=shape))
        if kind == "zeros":
            x = [0 * a for a in x]
        if kind == "wild":
            x = [scattered(rng, a, self.dtype) for a in x]
        with np.errstate(all="ignore"):
            d = {n: a for n, a in zip(helpers.ARGUMENTS[self.metric], x, strict=True) if n in self.names}
            shapes = {n: (*full, self.Q, self.F if n == "f_out" else self.K) for n in self.asked}
            d |= {f"ct {n}": rng.normal(size=shapes[n]) for n in self.asked}
            d |= {f"v {n}": rng.normal(size=d[n].shape) for n in self.wrt}
            d = {n: a.astype(self.dtypes[n.split()[-1]]) for n, a in d.items()}
        if broken:
            kind = self.poison(rng, d)

        wild = pick(rng, 0.0, 0.2, 0.9)
        if self.lengths:
            d["lengths"] = integers(rng, self.integer, full, self.P + 1)
        if self.warm:
            d["warm"] = integers(rng, self.integer, (*full, self.Q, self.W), self.P, wild)
        if self.op == "precomputed":
            d["given"] = integers(rng, self.integer, (*full, self.Q, self.K), self.P, wild)
        if self.op == "lookup":
            batch = self.front if self.shared_table else full
            d["table"] = integers(rng, self.integer, (*batch, self.P, self.width), self.P, wild)
        if self.index == "garbage":
            p, sigma, R = (jax.ShapeDtypeStruct((*self.B, self.P, *s), self.dtype) for s in ((3,), (3,), (3, 3)))
            parameters = (sigma, R) if self.metric == "aniso" and self.searches else ()
            index = jax.eval_shape(jka.build_index, p, *parameters)
            share = pick(rng, 0.02, 0.3, 1.0)
            d["garbage"] = jax.tree.map(lambda s: anything(rng, (*self.front, *s.shape), s.dtype), index)
            d["mask"] = jax.tree.map(lambda s: rng.random((*self.front, *s.shape)) < share, index)
        return kind, d

    # Checks.

    def checks(self, rng, report, kind, d, got):
        y, check = got["values"], report.check
        lead = (*self.levels, *self.B)
        idxs, dists = y["idxs"], y["dists"]
        lengths = np.full(lead, self.P)
        if self.lengths:
            lengths = self.full("lengths", d["lengths"])
            lengths = np.where(lengths > self.P, self.P, np.maximum(narrowed(lengths, self.P + 1), 0))
        for name, n in (("f_out", self.F), ("w_out", self.K), ("dists", self.K), ("idxs", self.K)):
            if name in y:
                want = (*lead, self.Q, n), self.dtypes.get(name, np.dtype(np.int32))
                a = y[name]
                check("shapes", (a.shape, a.dtype) == want, f"{name} is {a.shape} {a.dtype}, expected {want}")
        for name in y:
            if name.startswith("idxs"):
                inside = (y[name] >= -1) & (y[name] < lengths[..., None, None])
                check("bounds", inside.all() and y[name].dtype == np.int32, f"{name}: {y[name][~inside][:3]}")
        main = y["idxs, index"] if self.index == "stale" and self.searches else idxs
        for name in y:
            if name.startswith("idxs, ") and self.index != "garbage":  # there, what is found depends on the way
                check("ways", np.array_equal(y[name], main), f"{name}: {np.argwhere(y[name] != main)[:1]} differs")
        check("ways", np.array_equal(idxs, main), "guesses change what a stale index finds")

        empty = (idxs < 0) | (dists == np.inf)
        check("empty", (dists[idxs < 0] == np.inf).all(), "dists of empty slots are not +inf")
        ct_bars, tangents = got["second"][1], got["forward"]
        for what, part in (("values", y), ("second order in", ct_bars), ("tangents", tangents)):
            for name in ("w_out", "dists"):
                if name in part and (what, name) != ("values", "dists"):
                    check("empty", (part[name][empty] == 0).all(), f"{what} {name} of empty slots are not 0")
            if "f_out" in part:
                check("empty", (part["f_out"][empty.all(-1)] == 0).all(), f"{what} f_out of empty slots is not 0")

        if self.op == "precomputed":
            want = narrowed(self.full("given", d["given"]), self.P)
            check("neighbours", np.array_equal(idxs, want), "idxs are not those given")
        if self.op == "lookup":
            self.check_lookup(check, d, y, lengths)
        if self.searches and self.index in (None, "valid"):
            # Whatever the numbers: by the distances that callers see, numbers, +inf, NaN, and equal ones by index.
            ends = np.repeat(lengths, self.Q)[:, None]
            want = helpers.nearest(y["all dists"].reshape(-1, self.P), self.K, ends).reshape(idxs.shape)
            check("order", np.array_equal(idxs, want), f"not the nearest, first in {np.argwhere(idxs != want)[:1]}")
            if kind in self.exact_kinds:
                self.check_neighbours(check, kind, d, idxs, lengths)

    def check_lookup(self, check, d, y, lengths):
        table = narrowed(self.full("table", d["table"]), self.P)
        table, nearest = table[..., : self.K], y["nearest"]
        table = table[..., None, :, :] if self.shared_table and self.B else table
        rows = np.take_along_axis(table, np.maximum(nearest, 0)[..., None], -2)
        exists = (nearest >= 0)[..., None] & (rows < lengths[..., None, None])
        check("neighbours", np.array_equal(y["idxs"], np.where(exists, rows, -1)), "idxs are not those of the table")
        exists = np.arange(self.P) < lengths[..., None]
        want = np.where(exists[..., None], y["near"], -1)
        check("neighbours", np.array_equal(y["table"], want), "build_knn_table differs from a search of p in p")

    def check_neighbours(self, check, kind, d, idxs, lengths):
        shape = {"R": (3, 3), "f": (self.F,), "sigma": (1 if self.metric == "iso" else 3,)}
        x, items = {}, idxs.size and int(np.prod(idxs.shape[:-2]))
        for n in self.names:
            core = (self.Q, 3) if n == "q" else (self.P, *shape.get(n, (3,)))
            x[n] = self.full(n, d[n]).reshape(items, *core) if items else None
        for i in range(items):
            one = [x[n][i] if n in x else np.ones((self.P, 1)) for n in helpers.ARGUMENTS[self.metric]]
            got = idxs.reshape(items, self.Q, self.K)[i]
            want = helpers.oracle_search(self.metric, one, self.K, int(lengths.reshape(items)[i]))
            same, what = np.array_equal(got, want), "other neighbours, though all distances are exact"
            if not same and kind not in ("integers", "zeros", "huge", "tiny"):
                try:
                    helpers.assert_neighbours(self.metric, one, got, want)
                    same = True
                except AssertionError as error:
                    what = " ".join(str(error).split())
            check("neighbours", same, what)


# ---- Distortion losses


class Distortion(Problem):
    exact_kinds = ("plain", "ties", "spiked", "zeros", "far", "huge", "tiny")
    names, outputs, ours_only = ("w", "m", "interval"), ("loss",), ()

    def __init__(self, rng):
        self.flat = bool(rng.random() < 0.5)
        self.N = 600 if rng.random() < 0.05 else pick(rng, 0, 1, 2, 5, 31, 33, 64, 130)
        self.rays = pick(rng, 0, 1, 3, 7)
        self.B = () if self.flat or rng.random() < 0.4 else pick(rng, (0,), (1,), (3,), (5,), (2, 2))
        self.shared = bool(rng.random() < 0.3)  # the interval
        self.sort, self.reverse = bool(rng.random() < 0.3), bool(rng.random() < 0.6)
        self.reduction = pick(rng, "none", "none", "mean", "sum")
        dtype = np.dtype(pick(rng, np.float32, np.float32, np.float64))
        self.dtypes = dict.fromkeys((*self.names, "loss"), dtype)
        if dtype == np.float32 and rng.random() < 0.3:
            self.dtypes |= {n: np.dtype(pick(rng, *HALF)) for n in some(rng, self.names)}
        self.integer = pick(rng, *INTEGERS)
        self.wrt, self.asked = some(rng, self.names, 0.7), ["loss"]
        samples, rays = len(self.B) + 1, len(self.B) + self.flat
        ndims = {"w": samples, "m": samples, "interval": 0 if self.shared else samples}
        ndims |= {"ids": 1} if self.flat else {}
        ndims |= {"ct loss": rays if self.reduction == "none" else 0} | {f"v {n}": ndims[n] for n in self.wrt}
        self.draw(rng, ndims)
        self.axes["live"] = self.axes.get("ids", (None,) * len(self.levels))

    def __str__(self):
        of = f"flat distortion N={self.N} rays={self.rays} ids={np.dtype(self.integer)}"
        of = of if self.flat else f"distortion B={self.B} N={self.N}"
        how = f"vmap {self.levels} {'inside' if self.inside else 'outside'}" if self.levels else "no vmap"
        types = ", ".join(str(self.dtypes[n]) for n in self.names)
        shared = "shared" if self.shared else "own"
        return f"{of} {types}, {how}, {shared} interval, {self.reduction}, sort={self.sort}, in {self.wrt}"

    def call(self, d, implementation=None):
        options = {"reduction": self.reduction, "sort": self.sort, "implementation": implementation}
        x = [d[n] for n in self.names]
        if self.flat:
            return {"loss": jka.flatten_distortion_loss(*x, d["ids"], self.rays, **options)}
        return {"loss": jka.distortion_loss(*x, **options)}

    def reference(self, d):
        return self.call(d, "xla")

    def oracle(self, d):
        """All pairs, by index and not by |m_i − m_j|, which has no derivative where positions are equal."""
        w, m, interval = d["w"], d["m"], jnp.broadcast_to(d["interval"], d["w"].shape)
        touched = ((d["w"] + d["m"] + interval) * d["live"]).sum()
        ray = jnp.zeros(self.N, int)
        if self.flat:
            ids = d["ids"]
            ray = jnp.where((ids >= 0) & (ids < self.rays), ids, jnp.full_like(ids, self.rays)).astype(int)

        def one(w, m, interval):
            order = jnp.lexsort((m, d["ids"] if self.flat else ray)) if self.sort else jnp.arange(self.N)
            w, m, interval, r = (a[order] for a in (w, m, interval, ray))
            before = (r[:, None] == r[None]) & np.tri(self.N, k=-1, dtype=bool)
            pairs = 2 * w[:, None] * w[None] * (m[:, None] - m[None])
            return interval * w * w / 3 + jnp.where(before, pairs, 0.0).sum(1), r

        if self.flat:
            terms, r = one(w, m, interval)
            losses = jnp.where(r[None] == jnp.arange(self.rays)[:, None], terms[None], 0.0).sum(1)
        else:
            losses = jnp.vectorize(lambda *x: one(*x)[0].sum(), signature="(n),(n),(n)->()")(w, m, interval)
        mean = losses.sum() / max(1, losses.size)
        return {"loss": {"none": losses, "sum": losses.sum(), "mean": mean}[self.reduction], "touched": touched}

    def may_differ(self, part, kind, path):
        """The second derivative in w alone does not depend on w: NaN·0 or nothing at all."""
        return self.wrt == ["w"] and [getattr(k, "idx", getattr(k, "key", None)) for k in path] == [0, "w"]

    def given(self, d, y):
        if not self.flat:
            return {"live": np.float64(1)}
        ids = self.full("ids", d["ids"])
        sorted_ids = self.sort or (ids[..., 1:] >= ids[..., :-1]).all()
        inside = (d["ids"] >= 0) & (d["ids"] < self.rays)
        return {"live": inside.astype(np.float64) if sorted_ids else np.ones(inside.shape)}

    def content(self, rng):
        full = (*self.front, *self.B)
        half = any(a.itemsize == 2 for a in self.dtypes.values())
        kind = pick(rng, *self.exact_kinds, "plain", "wild", *["not finite"] * 3, *["wild ids"] * (2 * self.flat))
        kind = "plain" if half and kind in ("huge", "tiny", "far", "wild") else kind  # beyond their range
        shape = (*full, self.N)
        w, m = rng.normal(size=shape), rng.random(shape)
        interval = rng.random(full[: len(self.front)] if self.shared else shape)
        if kind == "ties":
            m = rng.integers(0, 4, shape).astype(float)
        if kind == "spiked":
            w = np.where(rng.random(shape) < 2 / max(1, self.N), 1.0, 1e-6 * rng.random(shape))
        if kind == "far":
            m = m + 1000
        if kind == "zeros":
            w, m, interval = (a * pick(rng, 0, 1) for a in (w, m, interval))
        if kind in ("huge", "tiny"):  # third powers of it, as second derivatives along it are, stay in range
            scale = 10.0 ** (pick(rng, 8, 0) if kind == "huge" else pick(rng, -8, 0))
            w, m, interval = scale * w, 1e8 * m if kind == "huge" else 1e-8 * m, scale * interval
        if kind == "wild":
            w, m, interval = (scattered(rng, a, self.dtypes["loss"]) for a in (w, m, interval))
        d = {}
        if self.flat:
            ids = integers(rng, self.integer, (*self.front, self.N), self.rays)
            ids = ids if kind == "wild ids" or (self.sort and rng.random() < 0.5) else np.sort(ids)
            d["ids"] = ids
        m = m if self.sort else np.take_along_axis(m, np.lexsort((m, ids)) if self.flat else np.argsort(m), -1)
        d |= {"w": w, "m": m, "interval": interval}
        rays = self.B if not self.flat else (self.rays,)
        d["ct loss"] = rng.normal(size=(*self.front, *(rays if self.reduction == "none" else ())))
        d |= {f"v {n}": rng.normal(size=d[n].shape) for n in self.wrt}
        with np.errstate(all="ignore"):
            d = {n: a if n == "ids" else a.astype(self.dtypes[n.split()[-1]]) for n, a in d.items()}
        if kind == "not finite":
            kind = self.poison(rng, d)
        return kind, d

    def checks(self, rng, report, kind, d, got):
        loss = got["values"]["loss"]
        rays = (self.rays,) if self.flat else self.B
        want = (*self.levels, *(rays if self.reduction == "none" else ()))
        report.check("shapes", loss.shape == want and loss.dtype == self.dtypes["loss"], f"loss is {loss.shape}")


# ---- Hash grids


class Grid(Problem):
    exact_kinds = ("plain", "borders", "zeros", "far", "huge", "tiny")
    names, outputs, ours_only = ("x", "table"), ("y",), ()

    def __init__(self, rng):
        while True:
            growth = pick(rng, 1.0, 1.5, 2.0, rng.uniform(0.5, 3))
            self.grid = jka.HashGrid(
                dim=pick(rng, 2, 3, 4),
                levels=pick(rng, 1, 2, 4),
                features=pick(rng, 1, 2, 4, 8),
                log2_hashmap_size=pick(rng, 3, 5, 7),
                base_resolution=pick(rng, 1, 2, 3, 7),
                per_level_scale=growth,
                interpolation=pick(rng, "linear", "smoothstep", "smoothstep", "nearest"),
                kind=pick(rng, "hash", "hash", "dense", "tiled"),
            )
            # With one row at all corners, derivatives in x are what rounding leaves of 0.
            if self.grid.rows <= 3000 and np.diff(self.grid.level_rows).min() > 1:
                break
        self.N, self.B = pick(rng, 0, 1, 2, 31, 33, 64), pick(rng, (), (), (0,), (1,), (3,), (2, 2))
        dtype = np.dtype(pick(rng, np.float32, np.float32, np.float64))
        self.dtypes = {"x": dtype, "table": dtype, "level": dtype}
        if dtype == np.float32 and rng.random() < 0.3:
            self.dtypes["table"] = np.dtype(pick(rng, *HALF))
        self.dtypes["y"] = self.dtypes["table"]
        self.level = bool(rng.random() < 0.5)
        self.reverse = bool(rng.random() < 0.6)
        self.wrt, self.asked = some(rng, self.names, 0.7), ["y"]
        ndims = {"x": len(self.B) + 2, "table": 2} | ({"level": 0} if self.level else {})
        ndims |= {"ct y": len(self.B) + 2} | {f"v {n}": ndims[n] for n in self.wrt}
        self.draw(rng, ndims)

    def __str__(self):
        how = f"vmap {self.levels} {'inside' if self.inside else 'outside'}" if self.levels else "no vmap"
        types = ", ".join(str(self.dtypes[n]) for n in self.names)
        level = ", max_level" if self.level else ""
        return f"{self.grid} B={self.B} N={self.N} {types}, {how}{level}, in {self.wrt}"

    def call(self, d, implementation=None):
        level = {"max_level": d["level"]} if self.level else {}
        return {"y": jka.hash_grid(d["x"], d["table"], self.grid, **level, implementation=implementation)}

    def reference(self, d):
        return self.call(d, "xla")

    def oracle(self, d):
        """Of given rows, and given places within cells, which move with x."""
        grid, x, rows = self.grid, d["x"][..., None, :], d["idxs"]
        scales = np.asarray(grid.scales, np.float64).reshape(*[1] * (x.ndim - 2), grid.levels, 1)
        f = d["place"] + scales * (x - jax.lax.stop_gradient(x))
        s = f * f * (3 - 2 * f) if grid.interpolation == "smoothstep" else f
        weights = []
        for b in range(rows.shape[-1]):
            upper = [b >> e & 1 for e in range(grid.dim)]  # axis 0 varies fastest
            weights.append(
                functools.reduce(jnp.multiply, [s[..., e] if u else 1 - s[..., e] for e, u in enumerate(upper)])
            )
        weight = jnp.stack(weights, -1)
        if grid.interpolation == "nearest":
            weight = jnp.ones(weight.shape)
        corners = d["table"][rows]
        y = (weight[..., None] * corners).sum(-2)
        if self.level:
            count = jnp.clip(d["level"] - jnp.arange(grid.levels, dtype=d["level"].dtype), 0, 1)
            y = y * count.reshape(*[1] * (x.ndim - 2), grid.levels, 1)
        touched = jnp.where(d["live"][..., None, None, None], corners, 0.0).sum() + d["x"].sum()
        return {"y": y.reshape(*d["x"].shape[:-1], grid.outputs), "touched": touched}

    def may_differ(self, part, kind, path):
        """Of what is not there, linear in the table or nearest in x, NaN·0 or nothing at all."""
        names = [getattr(k, "idx", getattr(k, "key", None)) for k in path]
        absent = self.grid.interpolation == "nearest" or self.wrt == ["table"]
        return absent and (names[-1] == "y" or len(names) == 2)

    def given(self, d, y):
        x = self.full("x", d["x"])
        lead = (*self.levels, *self.B, self.N)
        o = grids.Oracle(self.grid, x.reshape(int(np.prod(lead, dtype=int)), self.grid.dim))
        found = {"idxs": o.rows, "live": ~o.lost, "place": o.fraction}
        return {n: a.reshape(*lead, *a.shape[1:]) for n, a in found.items()}

    def content(self, rng):
        full, grid = (*self.front, *self.B), self.grid
        half = self.dtypes["table"].itemsize == 2
        kind = pick(rng, *self.exact_kinds, "plain", "wild", *["not finite"] * 3)
        kind = "plain" if half and kind == "wild" else kind  # beyond their range
        shape = (*full, self.N, grid.dim)
        x = rng.uniform(-0.5, 1.5, shape)
        table = rng.normal(size=(*self.front, grid.rows, grid.features))
        if kind == "borders":
            scale = rng.choice(np.where(grid.scales == 0, 1, grid.scales), shape)
            x = np.where(
                rng.random(shape) < 0.7, (rng.integers(-2, 12, shape) - 0.5) / scale, rng.integers(-2, 3, shape)
            )
        if kind == "zeros":
            x, table = (a * pick(rng, 0, 1) for a in (x, table))
        if kind == "far":
            x = x * 10.0 ** rng.uniform(0, 6, shape)
        if kind == "huge":
            x = x * 10.0 ** rng.uniform(6, 30, shape)
        if kind in ("huge", "tiny") and not half:
            table = table * 10.0 ** (pick(rng, 0, 8) if kind == "huge" else -pick(rng, 0, 8))
        if kind == "tiny":
            x = x * 10.0 ** rng.uniform(-40, 0, shape)
        if kind == "wild":
            x, table = scattered(rng, x, self.dtypes["x"]), scattered(rng, table, self.dtypes["table"])
        d = {"x": x, "table": table, "ct y": rng.normal(size=(*full, self.N, grid.outputs))}
        d |= {f"v {n}": rng.normal(size=d[n].shape) for n in self.wrt}
        if self.level:
            d["level"] = pick(
                rng, rng.integers(-1, grid.levels + 2, self.front), rng.uniform(0, grid.levels, self.front)
            )
        with np.errstate(all="ignore"):
            d = {n: np.asarray(a).astype(self.dtypes[n.split()[-1]]) for n, a in d.items()}
        if kind == "not finite":
            kind = self.poison(rng, d)
            if rng.random() < 0.3 and d["x"].size:  # positions that overflow
                d["x"].flat[rng.integers(0, d["x"].size, 2)] = np.finfo(d["x"].dtype).max * pick(rng, 1, -1, 0.3)
        return kind, d

    def checks(self, rng, report, kind, d, got):
        y = got["values"]["y"]
        want = (*self.levels, *self.B, self.N, self.grid.outputs)
        report.check("shapes", y.shape == want and y.dtype == self.dtypes["y"], f"y is {y.shape} {y.dtype}")
        lost = ~self.given(d, None)["live"]
        report.check("lost", np.isnan(y[lost]).all(), "points that are not finite have features")
        again = jax.tree.map(np.asarray, self.ours(d))
        same = all(
            np.array_equal(a, b, equal_nan=True) for a, b in zip(*map(jax.tree.leaves, (got, again)), strict=True)
        )
        report.check("bits", same, "other bits in another run")


# ---- Perceptrons


#: By the names of ours; jax.nn's have derivatives at kinks as ours.
ACTIVATIONS = {
    "none": lambda p: p,
    "relu": jax.nn.relu,
    "leaky_relu": jax.nn.leaky_relu,
    "softplus": jax.nn.softplus,
    "sine": jnp.sin,
    "silu": jax.nn.silu,
    "tanh": jnp.tanh,
    "sigmoid": jax.nn.sigmoid,
    "squareplus": lambda p: (p + jnp.sqrt(p * p + 4)) / 2,
    "gelu": jax.nn.gelu,
    "gelu_exact": functools.partial(jax.nn.gelu, approximate=False),
}


class Perceptron(Problem):
    exact_kinds = ("plain", "zeros", "large")
    outputs, ours_only = ("y",), ()

    def __init__(self, rng):
        self.N, self.B = pick(rng, 0, 1, 2, 31, 33, 64, 130, 260), pick(rng, (), (), (0,), (1,), (3,), (2, 2))
        self.widths = [pick(rng, 1, 2, 3, 7, 16, 17, 33, 64) for _ in range(pick(rng, 2, 3, 4, 5))]
        cuts = sorted(rng.integers(0, self.widths[0] + 1, pick(rng, 0, 0, 1, 2)))
        self.parts = np.diff([0, *cuts, self.widths[0]]).tolist()
        self.biases = bool(rng.random() < 0.7)
        self.kinds = [pick(rng, *ACTIVATIONS) for _ in range(2)]
        dtype = np.dtype(pick(rng, np.float32, np.float32, np.float64, np.float64, *HALF))
        self.sizes = {f"x{i}": (*self.B, self.N, n) for i, n in enumerate(self.parts)}
        for layer, (n, m) in enumerate(zip(self.widths, self.widths[1:], strict=False)):
            self.sizes |= {f"W{layer}": (m, n)} | ({f"b{layer}": (m,)} if self.biases else {})
        self.names = tuple(self.sizes)
        self.dtypes = dict.fromkeys((*self.names, "y"), dtype)
        self.reverse = bool(rng.random() < 0.6)
        self.wrt, self.asked = some(rng, self.names, 0.7), ["y"]
        ndims = {n: len(shape) for n, shape in self.sizes.items()}
        ndims |= {"ct y": len(self.B) + 2} | {f"v {n}": ndims[n] for n in self.wrt}
        self.draw(rng, ndims)

    def __str__(self):
        how = f"vmap {self.levels} {'inside' if self.inside else 'outside'}" if self.levels else "no vmap"
        of = f"perceptron {self.widths} of {self.parts}{' with biases' * self.biases}, {', '.join(self.kinds)}"
        return f"{of}, B={self.B} N={self.N} {self.dtypes['y']}, {how}, in {self.wrt}"

    def operands(self, d, letter):
        return tuple(d[n] for n in self.names if n[0] == letter)

    def call(self, d, implementation=None):
        options = {"activation": self.kinds[0], "output_activation": self.kinds[1], "precision": "highest"}
        biases = self.operands(d, "b") if self.biases else None
        x, W = self.operands(d, "x"), self.operands(d, "W")
        return {"y": jka.mlp(x, W, biases, **options, implementation=implementation)}

    def reference(self, d):
        return self.call(d, "xla")

    def oracle(self, d):
        h = jnp.concatenate(self.operands(d, "x"), -1)
        last = len(self.widths) - 2
        for layer in range(last + 1):
            p = jnp.einsum("...i,oi->...o", h, d[f"W{layer}"])
            p = p + d[f"b{layer}"].reshape(*[1] * (p.ndim - 1), -1) if self.biases else p
            h = ACTIVATIONS[self.kinds[layer == last]](p)
        return {"y": h, "touched": sum(d[n].sum() for n in self.names)}

    def given(self, d, y):
        return {}

    def may_differ(self, part, kind, path):
        """Where what is not finite meets a derivative that is 0: NaN, or nothing at all."""
        return part != "values"

    def content(self, rng):
        kind = pick(rng, *self.exact_kinds, "plain", "wild", "not finite", "not finite")
        half = self.dtypes["y"].itemsize == 2
        kind = "plain" if half and kind in ("wild", "large") else kind
        d = {n: rng.normal(size=(*self.front, *shape)) for n, shape in self.sizes.items()}
        d = {n: a / np.sqrt(a.shape[-1]) if n[0] == "W" else a for n, a in d.items()}
        if kind == "zeros":
            zero = some(rng, self.names)
            d = {n: 0 * a if n in zero else a for n, a in d.items()}
        if kind == "large":
            d = {n: 10 * a if n[0] == "x" else a for n, a in d.items()}
        if kind == "wild":
            d = {n: scattered(rng, a, self.dtypes["y"]) for n, a in d.items()}
        d["ct y"] = rng.normal(size=(*self.front, *self.B, self.N, self.widths[-1]))
        d |= {f"v {n}": rng.normal(size=d[n].shape) for n in self.wrt}
        with np.errstate(all="ignore"):
            d = {n: a.astype(self.dtypes[n.split()[-1]]) for n, a in d.items()}
        if kind == "not finite":
            kind = self.poison(rng, d)
        return kind, d

    def checks(self, rng, report, kind, d, got):
        y = got["values"]["y"]
        want = (*self.levels, *self.B, self.N, self.widths[-1])
        report.check("shapes", y.shape == want and y.dtype == self.dtypes["y"], f"y is {y.shape} {y.dtype}")
        again = jax.tree.map(np.asarray, self.ours(d))
        pairs = zip(*map(jax.tree.leaves, (got, again)), strict=True)
        same = all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)
        report.check("bits", same, "other bits in another run")


# ---- Images of Gaussians


class Splats(Problem):
    """Against the reference in float64: that it is right is seen in tests/splat, and what is random here are shapes."""

    exact_kinds = ("plain", "opaque", "wide", "near", "principal point")
    outputs, ours_only = ("image", "alpha", "depth"), ()

    def __init__(self, rng):
        self.P, self.C = pick(rng, 0, 1, 2, 15, 33, 70), pick(rng, 1, 3, 3, 5)
        self.options = {"width": pick(rng, 1, 15, 16, 33, 40), "height": pick(rng, 1, 16, 17, 33)}
        self.options |= {"antialiased": bool(rng.random() < 0.4), "extent": pick(rng, "exact", "exact", "3sigma")}
        self.options |= {"eps2d": pick(rng, 0.3, 0.3, 0.0), "capacity": pick(rng, None, None, 1, 50)}
        self.degree = pick(rng, None, None, 0, 1, 3)
        dtype = np.dtype(pick(rng, np.float32, np.float64))
        self.sizes = {"means": (self.P, 3)}
        self.sizes |= pick(rng, {"quats": (self.P, 4), "scales": (self.P, 3)}, {"covariances": (self.P, 3, 3)})
        colors = (self.P, self.C) if self.degree is None else (self.P, (self.degree + 1) ** 2, 3)
        self.C = colors[-1]
        self.sizes |= {"opacities": (self.P,), "colors": colors, "viewmat": (4, 4), "K": (3, 3)}
        self.sizes |= pick(rng, {}, {"background": (self.C,), "means2d_offset": (self.P, 2)})
        self.names = tuple(self.sizes)
        self.dtypes = dict.fromkeys((*self.names, *self.outputs), dtype)
        self.reverse = bool(rng.random() < 0.6)
        self.wrt, self.asked = some(rng, self.names, 0.7), some(rng, self.outputs)
        ndims = {n: len(shape) for n, shape in self.sizes.items()}
        ndims |= {f"ct {n}": 3 if n == "image" else 2 for n in self.asked} | {f"v {n}": ndims[n] for n in self.wrt}
        self.draw(rng, ndims)

    def __str__(self):
        how = f"vmap {self.levels} {'inside' if self.inside else 'outside'}" if self.levels else "no vmap"
        of = f"{self.P} Gaussians, {self.options}, sh_degree={self.degree}, {self.dtypes['means']}"
        return f"{of}, {how}, {self.asked} in {self.wrt}"

    def call(self, d, implementation=None):
        args = {"quats": None, "scales": None} | {n: d[n] for n in self.names}
        r = jka.render_gaussians(**args, **self.options, sh_degree=self.degree, implementation=implementation)
        return {n: getattr(r, n) for n in self.outputs}

    def reference(self, d):
        return self.call(d, "xla")

    def oracle(self, d):
        live = jnp.where(d["live"][..., None], d["means"], 0.0).sum()
        return self.call(d, "xla") | {"touched": live + sum(d[n].sum() for n in self.names if n != "means")}

    def lost(self, d):
        """Of operands without mapped axes, which Gaussians are not drawn whatever the camera sees."""
        own = [n for n in self.names if n not in ("viewmat", "K", "background")]
        bad = [~np.isfinite(d[n].reshape(self.P, int(np.prod(d[n].shape[1:], dtype=int)))).all(1) for n in own]
        seen = d["viewmat"] if self.degree is not None else d["viewmat"][:3]
        camera = np.isfinite(seen).all() and np.isfinite(d["K"][[0, 1, 0, 1], [0, 1, 2, 2]]).all()
        return np.logical_or.reduce(bad) | (not camera)

    def each(self, d):
        for at in np.ndindex(*self.levels):
            yield at, self.item(fixed(d), at)

    def given(self, d, y):
        live = np.zeros((*self.levels, self.P), bool)
        for at, item in self.each(d):
            live[at] = ~self.lost(item)
        return {"live": live}

    def run(self, rng, report):
        """Where rounding may take something over a threshold, there is nothing to compare."""
        state = rng.bit_generator.state
        _, d = self.content(rng)
        rng.bit_generator.state = state
        options = {n: a for n, a in self.options.items() if n != "capacity"} | {"sh_degree": self.degree}
        needed = 1e-4 if self.dtypes["means"] == np.float32 else 1e-9
        for _, item in self.each(self.place(d)):
            lost = self.lost(item)
            shared = ("viewmat", "K", "background")
            item = {n: np.asarray(a if n in shared else a[~lost], np.float64) for n, a in item.items()}
            if not lost.all() and splats.Oracle(item, **options).margin < needed:
                report.check("away from thresholds", True, "")
                return
        super().run(rng, report)

    def content(self, rng):
        kind = pick(rng, *self.exact_kinds, "not finite", "not finite")
        scenes = []
        for _ in range(int(np.prod(self.front, dtype=int))):
            scene = splat_scenes.gaussians(rng, "plain" if kind == "not finite" else kind, self.P)
            scene["K"][:2, 2] *= self.options["width"] / 40
            if "covariances" in self.sizes:
                scene = splat_scenes.with_covariances(rng, scene, self.C)
            scene["background"] = rng.normal(size=self.C)
            scene["colors"] = 0.6 * rng.normal(size=self.sizes["colors"])
            scenes.append(scene)
        d = {n: np.stack([scene[n] for scene in scenes]).reshape(*self.front, *self.sizes[n]) for n in self.names}
        size = self.options["height"], self.options["width"]
        d |= {f"ct {n}": rng.normal(size=(*self.front, *size, *([self.C] if n == "image" else []))) for n in self.asked}
        d |= {f"v {n}": rng.normal(size=d[n].shape) for n in self.wrt}
        d = {n: a.astype(self.dtypes[n.split()[-1]]) for n, a in d.items()}
        if kind == "not finite":
            for name in some(rng, [n for n in self.names if n != "background" and d[n].size], 0.3):
                d[name].flat[rng.integers(0, d[name].size, 2)] = pick(rng, np.nan, np.inf, -np.inf)
        return kind, d

    def check_loop(self, rng, report, d, y):
        """Not once more without jit: it is a program an operation."""

    def checks(self, rng, report, kind, d, got):
        for n in self.outputs:
            y, core = got["values"][n], (self.options["height"], self.options["width"])
            want = (*self.levels, *core, *([self.C] if n == "image" else []))
            report.check("shapes", y.shape == want and y.dtype == self.dtypes[n], f"{n} is {y.shape} {y.dtype}")
        finite = all(np.isfinite(a).all() for a in jax.tree.leaves(got))
        report.check("finite", finite, "something is not")
        again = jax.tree.map(np.asarray, self.ours(d))
        same = all(np.array_equal(a, b) for a, b in zip(*map(jax.tree.leaves, (got, again)), strict=True))
        report.check("bits", same or not finite, "other bits in another run")


# ---- Running


OPS = Aggregate, Aggregate, Aggregate, Distortion, Grid, Perceptron, Splats


class Report:
    """Counts checks by kind, and prints a line for each content that fails."""

    def __init__(self, seed):
        self.seed, self.ran, self.failed = seed, collections.Counter(), collections.Counter()
        self.classes = self.contents = 0

    def start(self, number, content, problem):
        self.number, self.content, self.problem, self.kind, self.messages = number, content, problem, "", []

    def check(self, kind, ok, message):
        self.ran[kind] += 1
        if not ok:
            self.failed[kind] += 1
            self.messages.append(f"[{kind}] {message}")

    def finish(self):
        if self.messages:
            more = f"; and {len(self.messages) - 3} more" if len(self.messages) > 3 else ""
            where = f"class {self.number} content {self.content} seed {self.seed}"
            print(f"FAILED {where} ({self.problem}; {self.kind}): {'; '.join(self.messages[:3])}{more}", flush=True)

    def summary(self):
        print(f"\n{self.classes} classes, {self.contents} contents\n{'check':32}{'ran':>10}{'failed':>10}")
        for kind in sorted(self.ran):
            print(f"{kind:32}{self.ran[kind]:10}{self.failed[kind]:10}")
        failed = self.failed.total()
        print(f"{self.ran.total() - failed} passed, {failed} failed")
        return int(failed > 0)


def attempt(report, fn):
    """Whatever an op raises is a failure like any other."""
    try:
        result = fn()
        report.check("runs", True, "")
        return result
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        report.check("runs", False, f"{type(error).__name__} at {at.name}: {' '.join(str(error).split())[:300]}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--contents", type=int, default=100)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start nothing after that")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**32))
    parser.add_argument("--share", default="0/1", metavar="I/N")
    parser.add_argument("--only", metavar="CLASS[,CONTENT]")
    parser.add_argument("--verbose", action="store_true", help="print every class and how long it took")
    args = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    print(f"seed {args.seed}, jax {jax.__version__} on {helpers.PLATFORM}", flush=True)

    mine, of = map(int, args.share.split("/"))
    only = [int(n) for n in args.only.split(",")] if args.only else []
    report, end = Report(args.seed), time.monotonic() + 60 * args.minutes
    for number in only[:1] or range(mine, args.classes, of):
        start = time.monotonic()
        if start > end:
            break
        rng = np.random.default_rng([args.seed, number])
        report.start(number, -1, None)
        problem = attempt(report, lambda rng=rng: pick(rng, *OPS)(rng))
        report.finish()
        report.classes += 1
        for content in only[1:] or range(args.contents if problem else 0):
            if time.monotonic() > end:
                break
            rng = np.random.default_rng([args.seed, number, content])
            report.start(number, content, problem)
            attempt(report, lambda rng=rng, problem=problem: problem.run(rng, report))
            report.finish()
            report.contents += 1
        if args.verbose:
            print(f"class {number}, {time.monotonic() - start:.1f} s: {problem}", flush=True)
        if report.classes % 20 == 0:
            jax.clear_caches()  # programs of classes that are done
    return report.summary()


if __name__ == "__main__":
    sys.exit(main())
