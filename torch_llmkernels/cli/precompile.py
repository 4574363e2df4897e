"""`llmkernels precompile`: find, verify and remember the kernels of a model before it is deployed."""

from __future__ import annotations

import argparse

from torch_llmkernels.cli import factory, output


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("precompile", help="find, verify and remember the kernels of a model, for this device")
    factory.add_arguments(parser)
    parser.add_argument("--training", action="store_true", help="forward and backward")
    parser.add_argument(
        "--dynamic", action="append", default=[], metavar="ARG:DIM", help="a dimension that varies: 0:0; repeatable"
    )
    parser.add_argument("--mode", help="the mode torch.compile will be given, such as reduce-overhead")
    parser.add_argument("--budget-s", type=float, default=900.0, metavar="N", help="seconds to spend (default: %(default)s)")
    parser.add_argument(
        "--budget-tokens", type=int, metavar="N",
        help="tokens that all searches of this call may use together (default: no limit but each one's own)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="print the plan with an estimate, and verify nothing")
    parser.add_argument("--export", metavar="FILE", help="write the winners to a bundle, usually *.llmk")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the table; 1 if the budget ended before everything was decided."""
    from torch_llmkernels.precompilation.run import precompile

    model, calls = factory.made_for(args)
    try:
        report = precompile(
            model,
            calls[0].args,
            calls[0].kwargs,
            more_inputs=[call.args for call in calls[1:]],
            training=args.training,
            dynamic_dims=dynamic_dims(args.dynamic),
            mode=args.mode,
            budget=args.budget_s,
            budget_tokens=args.budget_tokens,
            dry_run=args.dry_run,
            export=args.export,
        )
    except KeyboardInterrupt:
        print("interrupted; what was decided is kept, run it again to go on")
        return 130
    print(report)
    return 0 if report.complete or report.dry_run else 1


def dynamic_dims(specs: list[str]) -> dict[int | str, list[int]]:
    """`["0:0", "mask:1"]` as `{0: [0], "mask": [1]}`.

    Raises:
        UsageError: for what does not parse.
    """
    found: dict[int | str, list[int]] = {}
    for spec in specs:
        name, _, dim = spec.partition(":")
        if not name or not dim.lstrip("-").isdigit():
            raise output.UsageError(f"--dynamic {spec!r}: write ARGUMENT:DIMENSION, such as 0:0 or mask:1")
        found.setdefault(int(name) if name.isdigit() else name, []).append(int(dim))
    return found
