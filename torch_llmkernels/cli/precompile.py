"""`llmkernels precompile`: find, verify and remember the kernels of a model before it is deployed."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from torch_llmkernels.cli import explain, output
from torch_llmkernels.errors import LLMKernelsError

if TYPE_CHECKING:
    from torch_llmkernels.capture import Call


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("precompile", help="find, verify and remember the kernels of a model, for this device")
    parser.add_argument(
        "factory", help="SCRIPT.py:FUNCTION or package.module:FUNCTION, which returns a model, or (model, inputs)"
    )
    parser.add_argument(
        "--input",
        action="append",
        default=[],
        metavar="SPEC",
        help="inputs of one call, instead of the factory's: 8x3x224x224 or 8x16:int64,8x16:float16; "
        "repeat it for several input shapes",
    )
    parser.add_argument("--device", help="move model and inputs there: cpu, cuda, cuda:1")
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

    model, call = made(args)
    calls = [tensors(spec, model, args.device) for spec in args.input] or [call.args]
    try:
        report = precompile(
            model,
            calls[0],
            None if args.input else call.kwargs,
            more_inputs=calls[1:],
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


def made(args: argparse.Namespace) -> tuple[Any, Call]:
    """The factory's model and the call it returned, moved to `--device`.

    Raises:
        LLMKernelsError: if the factory raises, or `--device` cannot be used here.
        UsageError: if it cannot be found or returns something else.
    """
    try:
        model, call = explain.made(args.factory)
    except (LLMKernelsError, KeyboardInterrupt):
        raise
    except Exception as error:  # a user's code may raise anything
        raise LLMKernelsError(f"{args.factory} raised {type(error).__name__}: {error}; run it by itself to see where") from error
    return moved(model, call, args.device) if args.device else (model, call)


def moved(model: Any, call: Call, device: str) -> tuple[Any, Call]:
    """Model and call on `device`; tensors inside lists and dicts of the call too.

    Raises:
        LLMKernelsError: if this machine, or this build of torch, does not have the device.
    """
    import torch

    from torch_llmkernels.capture import Call

    try:
        model = model.to(device) if isinstance(model, torch.nn.Module) else model
        args, kwargs = torch.utils._pytree.tree_map_only(torch.Tensor, lambda t: t.to(device), (call.args, dict(call.kwargs)))
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise LLMKernelsError(f"--device {device}: {error}; llmkernels doctor shows what is here") from error
    return model, Call(args, kwargs)


def tensors(spec: str, model: Any, device: str | None) -> tuple[Any, ...]:
    """The inputs that `8x3x224x224:float16,8:int64` describes: normal data, or integers 0 and 1.

    A tensor without a dtype gets that of the model's first parameter (float32 if it has none).

    Raises:
        UsageError: for what does not parse.
    """
    import torch

    first = next(iter(model.parameters()), None) if isinstance(model, torch.nn.Module) else None
    home = torch.device(device) if device else first.device if first is not None else torch.device("cpu")
    made = []
    for part in spec.split(","):
        sizes, _, name = part.strip().partition(":")
        dtype = getattr(torch, name, None) if name else first.dtype if first is not None else torch.float32
        if not isinstance(dtype, torch.dtype) or not all(size.isdigit() for size in sizes.split("x")):
            raise output.UsageError(f"--input {part!r}: write sizes and a dtype, such as 8x3x224x224 or 8x16:int64")
        shape = [int(size) for size in sizes.split("x")]
        made.append(torch.randn(shape).to(home, dtype) if dtype.is_floating_point else torch.randint(0, 2, shape).to(home, dtype))
    return tuple(made)


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
