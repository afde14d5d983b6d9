"""The command line: `jax-knn-aggregate fit` and `jax-knn-aggregate doctor`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import __version__

PROGRAM = "jax-knn-aggregate"


def _at_least(least: int) -> Callable[[str], int]:
    def integer(text: str) -> int:
        number = int(text)
        if number < least:
            raise argparse.ArgumentTypeError(f"{text} is not at least {least}")
        return number

    return integer


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description="Nearest-point feature aggregation for JAX.")
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    fit = commands.add_parser(
        "fit",
        help="fit a signed distance field to a scan",
        description="Fits a signed distance field to oriented points or a mesh, and writes DIR/mesh.ply, "
        "DIR/picture.png and DIR/metrics.json. Without SCAN it fits a built-in solid and reports the true error.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    fit.add_argument("scan", nargs="?", type=Path, metavar="SCAN", help="mesh or oriented points: .ply .obj .off .xyz")
    fit.add_argument("--shape", choices=("links", "torus", "plate"), default="links", help="fitted without SCAN")
    fit.add_argument("--out", type=Path, default=Path("sdf"), metavar="DIR", help="where the results go")
    fit.add_argument("--steps", type=_at_least(1), default=1200, metavar="N", help="training steps")
    # Lengths are in units of the distance from one feature point to the next, and half a batch lies in free space.
    fit.add_argument("--points", type=_at_least(2), default=4000, metavar="P", help="feature points")
    fit.add_argument("--neighbours", type=_at_least(1), default=12, metavar="K", help="feature points a query meets")
    fit.add_argument(
        "--batch", type=_at_least(2), default=1024, metavar="Q", help="surface queries a step; as many off"
    )
    fit.add_argument("--cells", type=_at_least(1), default=192, metavar="N", help="grid cells along the longest side")
    fit.add_argument("--seed", type=_at_least(0), default=0, help="everything random follows from it")
    fit.add_argument("--up", choices=("x", "y", "z"), default="y", help="the axis that is up in the picture")
    fit.add_argument("--implementation", choices=("ffi", "xla"), help="of the op; the fastest there is when not given")
    commands.add_parser("doctor", help="check the installation")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after one line on stderr about what was wrong."""
    arguments = _parser().parse_args(argv)
    if arguments.command == "doctor":
        from .doctor import main as doctor

        return doctor()
    try:
        from .sdf.run import run
        from .sdf.scan import ScanError
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(__package__):
            raise
        return _fail(f'fit needs the package {error.name}: pip install "jax_knn_aggregate[sdf]"')
    try:
        run(arguments)
    except (ScanError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return 130
    return 0


def _fail(message: str) -> int:
    print(f"{PROGRAM}: error: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
