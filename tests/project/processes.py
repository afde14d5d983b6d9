"""Scenes, queries and points split over the devices of several processes.

    python tests/project/processes.py --launch 2                  two processes of two CPU devices each, on this machine
    python tests/project/processes.py --launch 4 --platform cuda  one process for each of four GPUs
    python tests/project/processes.py --processes 2 --id 0 --coordinator HOST:PORT [--platform cuda]  one, by hand

Each process compares its shards with what it computes alone. Exits with 0 if all agree.
"""

import argparse
import os
import pathlib
import socket
import subprocess
import sys

CPU_DEVICES = 2


def launch(processes, platform):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, __file__, "--platform", platform, "--processes", str(processes)]
    running = [
        subprocess.Popen([*command, "--coordinator", coordinator, "--id", str(i)], text=True) for i in range(processes)
    ]
    try:
        return max(abs(p.wait(timeout=300)) for p in running)
    finally:
        for p in running:
            p.kill()


def run(coordinator, processes, process_id, platform):
    import jax

    jax.config.update("jax_platforms", platform)
    jax.config.update("jax_enable_x64", True)
    gpu = {"local_device_ids": [process_id]} if platform == "cuda" else {}
    jax.distributed.initialize(coordinator, processes, process_id, **gpu)

    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))  # where helpers.py is
    import helpers
    import numpy as np
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as S

    n, K = jax.device_count(), 5
    assert jax.process_count() == processes
    rng = np.random.default_rng(int(os.environ.get("JAX_KNN_AGGREGATE_TEST_SEED", "0")))
    op = helpers.outputs("aniso", K)
    step = jax.value_and_grad(helpers.eikonal(op), range(5))

    def place(mesh, x, specs):
        return tuple(
            jax.make_array_from_callback(a.shape, NamedSharding(mesh, s), lambda at, a=a: a[at])
            for a, s in zip(x, specs, strict=True)
        )

    def compare(got, want, what):
        for g, w in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            for shard in g.addressable_shards:
                helpers.assert_close(shard.data, np.asarray(w)[shard.index], 1e-9, what)

    def check(what, fn, x, specs, want, kinds):
        compiled, x = helpers.quick_jit(fn), place(mesh, x, specs)
        found = helpers.kinds(compiled, *x)
        assert found <= kinds, f"{what}: {found}"
        compare(compiled(*x), want, what)

    def points(mesh, queries, over):
        Q = 4 * n
        x = helpers.cloud(rng, "aniso", Q, 6 * n, 2)
        specs = (queries, *[S("b")] * 4)
        part = helpers.eikonal(helpers.outputs("aniso", K, points_axis="b"))

        def loss(*x):
            return jax.lax.psum(part(*x) * (x[0].shape[-2] / Q), over)

        def whole(*x):
            return jax.shard_map(loss, mesh=mesh, in_specs=specs, out_specs=S())(*x)

        moving = {"all-reduce", "all-to-all", "all-gather", "reduce-scatter"}
        check("points", jax.value_and_grad(whole, range(5)), x, specs, helpers.quick_jit(step)(*x), moving)

    across = max(d for d in range(1, n + 1) if n % d == 0 and d * d <= n)
    for kind in AxisType.Auto, AxisType.Explicit:
        mesh = jax.make_mesh((across, n // across), ("a", "b"), axis_types=(kind,) * 2)
        x = helpers.cloud(rng, "aniso", 4 * n, 9, 2, batch=(2 * across,))
        specs = (S("a", "b"), *[S("a")] * 4)
        check("scenes and queries", op, x, specs, helpers.quick_jit(op)(*x), set())
        check("their Eikonal step", step, x, specs, helpers.quick_jit(step)(*x), {"all-reduce"})
        points(mesh, S("a"), ("a",))
        points(mesh, S(("a", "b")), ("a", "b"))
    print(f"process {process_id} of {processes}, {n} devices: ok", flush=True)
    jax.distributed.shutdown()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launch", type=int, metavar="N", help="start N processes on this machine")
    parser.add_argument("--platform", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--coordinator")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--id", type=int)
    args = parser.parse_args()
    if args.launch:
        sys.exit(launch(args.launch, args.platform))
    if args.platform == "cpu":
        os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={CPU_DEVICES}"
    run(args.coordinator, args.processes, args.id, args.platform)
