"""A model and its inputs from the command line: a factory of the user's, `--input` and `--device`."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_llmkernels.cli import output
from torch_llmkernels.errors import LLMKernelsError

if TYPE_CHECKING:
    from torch_llmkernels.capture import Call


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a command the factory, `--input` and `--device`."""
    parser.add_argument(
        "factory", help="SCRIPT.py:FUNCTION or package.module:FUNCTION, which returns (model, inputs), or a model for --input"
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


def made_for(args: argparse.Namespace) -> tuple[Any, list[Call]]:
    """The factory's model on `--device`, and its calls there: one for each `--input`, else the one that the factory returned.

    Raises:
        LLMKernelsError: if the factory raises, or `--device` cannot be used here.
        UsageError: if it cannot be found or returns something else, or if the model needs inputs and there are none.
    """
    from torch_llmkernels.capture import Call

    model, call = made(args.factory)
    model, call = moved(model, call, args.device) if args.device else (model, call)
    calls = [Call(tensors(spec, model, args.device)) for spec in args.input] or [call]
    if not calls[0].args and not calls[0].kwargs and _needs_inputs(model):
        raise output.UsageError(f"{args.factory} returned no inputs: return (model, inputs) or pass --input, as in --input 8x16")
    return model, calls


def _needs_inputs(model: Any) -> bool:
    """Whether a call without arguments cannot be right; what has no signature is given the benefit of the doubt."""
    import torch

    try:
        inspect.signature(model.forward if isinstance(model, torch.nn.Module) else model).bind()
    except TypeError:
        return True
    except ValueError:
        return False
    return False


def made(factory: str) -> tuple[Callable[..., Any], Call]:
    """The model and the call that `FILE.py:NAME` or `package.module:NAME` returns.

    The function returns `(model, inputs)` with a tensor, a tuple of positional or a dict of keyword arguments, or a model alone.

    Raises:
        LLMKernelsError: if its module or the function itself raises.
        UsageError: if it cannot be found or returns something else.
    """
    from torch_llmkernels.capture import Call

    place, colon, name = factory.rpartition(":")
    if not colon or not place or not name.isidentifier():
        raise output.UsageError(f"{factory!r} names no factory; write SCRIPT.py:FUNCTION or package.module:FUNCTION")
    function = getattr(_run(place, lambda: _module(place)), name, None)
    if not callable(function):
        raise output.UsageError(f"{place} has no function {name!r}; write one that returns (model, inputs)")
    result = _run(factory, function)
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, ())
    if not callable(model):
        raise output.UsageError(
            f"{factory} returned {type(result).__name__}; it must return (model, inputs), or a model without inputs"
        )
    if isinstance(inputs, dict):
        return model, Call(kwargs=inputs)
    return model, Call(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,))


def _run(what: str, function: Callable[[], Any]) -> Any:
    """`function()`, code of the user's; an error of its own is told with its name."""
    try:
        return function()
    except LLMKernelsError:
        raise
    except Exception as error:  # a user's code may raise anything
        text = output.short(f"{type(error).__name__}: {error}")
        raise LLMKernelsError(f"{what} raised {text}; run it by itself, or with llmkernels --debug, to see where") from error


def _module(place: str) -> Any:
    if not place.endswith(".py"):
        sys.path.insert(0, "")
        return importlib.import_module(place)
    path = Path(place)
    if not path.is_file():
        raise output.UsageError(f"there is no file {path}; give the path of the script, relative to {Path.cwd()}")
    sys.path.insert(0, str(path.resolve().parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None  # for a .py file that exists
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


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
