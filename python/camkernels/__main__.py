# SPDX-License-Identifier: MIT
"""`python -m camkernels`: info, check, bench, fit, render. Exit status 2 with one sentence for what a user can mend."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from . import _bench
from .fit.command import add_fit, add_render
from .fit.errors import UserError, is_out_of_memory


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command line; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m camkernels", description="Kernels for neural fields in PyTorch.")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = subparsers.add_parser("info", help="what this installation can run, and why not the rest")
    info.add_argument("--json", action="store_true", help="the same as JSON")
    info.set_defaults(run=_info)
    check = subparsers.add_parser("check", help="compare every backend with the reference on this machine")
    check.set_defaults(run=_check)
    bench = subparsers.add_parser("bench", help="a short table of speeds on this machine")
    _bench.add_arguments(bench)
    bench.set_defaults(run=_bench.run)
    add_fit(subparsers)
    add_render(subparsers)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except UserError as error:
        print(f"camkernels: error: {error}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).splitlines()[0] if str(error) else "an allocation failed"
        print(f"camkernels: error: not enough memory ({reason}); ask for less at once, see --help", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("camkernels: stopped by Ctrl-C", file=sys.stderr)
        return 130


def _info(args: argparse.Namespace) -> int:
    from ._info import print_info

    return print_info(as_json=args.json)


def _check(args: argparse.Namespace) -> int:
    from ._check import check_backends

    return check_backends()


if __name__ == "__main__":
    sys.exit(main())
