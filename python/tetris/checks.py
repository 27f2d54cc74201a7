"""What arguments must be, said once: each message names the function, the rule and the value seen.

``where`` is the function the user called.
"""

from __future__ import annotations

import copy
import dataclasses
import difflib
import inspect
import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import _C

MAX_BLOCK = 128
DTYPES = {
    "cpu": (torch.float32, torch.float64),
    "cuda": (torch.float16, torch.bfloat16, torch.float32, torch.float64),
}
"""Types that sparse layers compute with, by kind of device."""


def describe(value: object) -> str:
    """A value on one short line, or what it is where that would be long."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__name__', '?')}"
    text = repr(value)
    return text if len(text) <= 40 and "\n" not in text else kind(value)


def plain(value: object) -> object:
    """A setting as numbers, strings and tuples of them, which a state can hold and compare.

    Functions and objects stand for themselves by name; a dataclass by its fields.
    """
    if isinstance(value, (np.generic, np.ndarray)):  # of which torch.load refuses scalars, too
        value = value.tolist()
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, Integral):
        return int(value)
    if isinstance(value, Real):
        return float(value)
    if isinstance(value, (tuple, list)):
        return tuple(map(plain, value))
    if isinstance(value, (set, frozenset)):
        return tuple(sorted(map(plain, value), key=repr))
    if inspect.isroutine(value):
        return f"the function {getattr(value, '__qualname__', '?')}"
    if dataclasses.is_dataclass(value):
        return repr(value if isinstance(value, type) else _without_numpy(value))
    return repr(value) if isinstance(value, range) else kind(value)


def _without_numpy(value: Any) -> Any:
    """A copy of a dataclass that shows numbers of numpy as Python's: repr tells them apart."""
    value = copy.copy(value)
    for name in (field.name for field in dataclasses.fields(value) if field.repr):
        if isinstance(own := getattr(value, name, None), (np.generic, np.ndarray)):
            object.__setattr__(value, name, plain(own))  # of frozen ones, too
    return value


def kind(value: object) -> str:
    """What a value is, with an article."""
    name = type(value).__name__
    return f"{'an' if name[0].lower() in 'aeiou' or name.startswith('nd') else 'a'} {name}"


def listed(items: Iterable[object], word: str = "and") -> str:
    """Two or more items as a sentence has them."""
    *most, last = map(str, items)
    return f"{', '.join(most)} {word} {last}"


def check_block(where: str, block: Iterable[int]) -> tuple[int, int]:
    """Return a block shape as a pair of ints, or raise ValueError."""
    pair = tuple(block) if isinstance(block, Iterable) and not isinstance(block, str) else ()
    if len(pair) == 2 and all(is_int(b) and 1 <= b <= MAX_BLOCK for b in pair):
        return operator.index(pair[0]), operator.index(pair[1])
    raise ValueError(
        f"{where}: block must be two ints such as (4, 1), height along out and width along in, "
        f"each from 1 to {MAX_BLOCK} (got {describe(block)})"
    )


def check_sparsity(where: str, sparsity: float) -> float:
    """Return a sparsity in [0, 1] as a float, or raise ValueError."""
    number = isinstance(sparsity, Real) and not isinstance(sparsity, bool)
    if number and 0.0 <= sparsity <= 1.0:
        return float(sparsity)
    hint = f"; for {sparsity:g} % pass {sparsity / 100:g}" if number and 1 < sparsity <= 100 else ""
    raise ValueError(
        f"{where}: sparsity, the share of blocks to remove, must be a number in [0, 1] "
        f"(got {describe(sparsity)}){hint}"
    )


def check_seed(where: str, seed: int) -> int:
    """Return a seed as an int that torch takes, or raise ValueError."""
    if not is_int(seed):
        raise ValueError(f"{where}: seed must be an int (got {describe(seed)})")
    return operator.index(seed)


def check_search(
    where: str,
    *,
    seed: int = 0,
    budget: float | None = None,
    sweeps: int | None = None,
    threads: int | None = None,
    passes: int | None = None,
) -> None:
    """Raise ValueError unless these arguments of a search are in order."""
    check_seed(where, seed)
    if budget is not None and not (
        isinstance(budget, Real) and budget >= 0 and math.isfinite(budget)
    ):
        raise ValueError(
            f"{where}: budget must be a number of seconds >= 0 (got {describe(budget)})"
        )
    if budget is not None and sweeps is not None:
        raise ValueError(
            f"{where}: budget and sweeps both say how long to search; pass one of them "
            f"(got {budget:g} seconds and {describe(sweeps)} sweeps)"
        )
    for name, count in (("sweeps", sweeps), ("threads", threads), ("passes", passes)):
        if count is not None and not (is_int(count) and count >= 1):
            raise ValueError(f"{where}: {name} must be at least 1, an int (got {describe(count)})")


def check_flags(where: str, **flags: object) -> None:
    """Raise ValueError unless each is True or False: of others it is unclear what is meant."""
    for name, value in flags.items():
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"{where}: {name} must be True or False (got {describe(value)})")


def check_tensor(where: str, name: str, value: object) -> Tensor:
    """Return a dense tensor with numbers in it, or raise."""
    if not isinstance(value, Tensor):
        hint = ""
        if isinstance(value, nn.Module):
            hint = "; pass its weight"
        elif type(value).__module__ == "numpy":
            hint = "; torch.from_numpy converts it"
        raise TypeError(f"{where}: {name} must be a torch.Tensor (got {describe(value)}{hint})")
    if value.layout != torch.strided:
        raise ValueError(
            f"{where}: {name} must be a dense tensor (got {value.layout}; .to_dense() converts it)"
        )
    if value.is_meta:
        raise ValueError(
            f"{where}: {name} must hold numbers (got a tensor on the meta device, which has none)"
        )
    return value


def check_groups(where: str, groups: int, out: int, in_: int | None, convolution: bool) -> None:
    """Raise ValueError unless these groups divide the channels of a convolution."""
    if not is_int(groups) or groups < 1:
        raise ValueError(f"{where}: groups must be an int >= 1 (got {describe(groups)})")
    if groups > 1 and not convolution:
        raise ValueError(f"{where}: groups are of convolutions, a matrix has one (got {groups})")
    for name, size in (("outputs", out), ("inputs", in_)):
        if size is not None and size % groups:
            raise ValueError(
                f"{where}: groups must divide the {name} (got {groups} groups and {size} {name})"
            )


def check_model(where: str, model: object) -> nn.Module:
    """Return a module, or raise TypeError."""
    if isinstance(model, nn.Module):
        return model
    hint = ""
    if isinstance(model, type):
        hint = "; make an instance of it"
    elif isinstance(model, Mapping) and any(isinstance(v, Tensor) for v in model.values()):
        hint = ", it seems a state_dict; make the model and load the dict into it"
    elif isinstance(model, str):
        hint = "; load the model first"
    got = describe(model) if isinstance(model, (str, type)) else kind(model)
    raise TypeError(f"{where}: model must be an nn.Module (got {got}{hint})")


def check_python(where: str, model: object) -> nn.Module:
    """Return a module whose layers can be replaced, and whose calls can be followed, or raise."""
    module = check_model(where, model)
    if isinstance(module, torch.jit.ScriptModule):
        raise TypeError(
            f"{where}: model must be the module that was scripted or traced, whose layers can be "
            f"replaced (got a {type(module).__name__} of TorchScript)"
        )
    return module


def check_weight(where: str, weight: Tensor) -> None:
    """Raise ValueError unless a sparse layer can be made of a weight, and run."""
    if is_lazy(weight):
        raise ValueError(f"{where}: the weight's size is not known yet: call the layer once")
    if weight.is_meta:
        raise ValueError(
            f"{where}: the weight is on the meta device, which holds no numbers; give it some "
            "first (module.to_empty(device='cpu'), then load_state_dict)"
        )
    kind = weight.device.type
    if kind not in DTYPES or (kind == "cuda" and not _C.cuda_built()):
        raise ValueError(
            f"{where}: the weight must be on the CPU, where sparse layers of this build run "
            f"(got {weight.device}); move the model with .cpu() first{no_cuda(kind)}"
        )
    if weight.dtype not in DTYPES[kind]:
        raise ValueError(
            f"{where}: the weight must be {types_on(kind)}, other types have no kernel (got "
            f"{weight.dtype}); convert with .float() first. Under torch.autocast, sparse layers "
            f"on the CPU compute in float32"
        )


def check_dtype(where: str, dtype: torch.dtype | None, device: torch.device | str | None) -> None:
    """Raise ValueError unless a layer may be made in a type: of any device if that is None."""
    kind = "cpu" if device is None else torch.device(device).type
    if dtype is not None and dtype not in DTYPES.get(kind, DTYPES["cuda"]):
        raise ValueError(f"{where}: dtype must be {types_on(kind)} on {kind} (got {dtype})")


def types_on(kind: str) -> str:
    """The types of a kind of device, as messages have them."""
    if kind == "cpu":
        return "float32 (or float64, for checks)"
    return "float32, float16 or bfloat16 (or float64, for checks)"


def no_cuda(kind: str = "cuda") -> str:
    """How to get CUDA kernels, as the end of a message about a CUDA device; else nothing."""
    if kind != "cuda" or _C.cuda_built():
        return ""
    return (
        f", or build tetris with CUDA kernels (this build has none: {_C.cuda_why()}): "
        f"{how_to_build_cuda()}"
    )


def how_to_build_cuda() -> str:
    """What to do for CUDA kernels with the torch that is installed, as the end of a message."""
    build = "TETRIS_CUDA=1 pip install --no-build-isolation ."
    cuda = torch.version.cuda
    if cuda is None:  # which that command alone would refuse
        return (
            f"install a torch with CUDA first (this one is {torch.__version__}; "
            f"https://pytorch.org/get-started/locally), then, where nvcc is, {build}"
        )
    return f"where nvcc {cuda.partition('.')[0]} is, for this torch with CUDA {cuda}, {build}"


def check_keywords(where: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise TypeError for keyword arguments that are not among the known ones."""
    names = list(known)
    for name in given:
        if name not in names:
            near = difflib.get_close_matches(name, names, 1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise TypeError(
                f"{where}: got an unexpected argument {name!r}{hint}; it takes {', '.join(names)}"
            )


def is_int(value: object) -> bool:
    """Whether it is one integer: Python's or numpy's, no bool, no tensor."""
    if not hasattr(value, "__index__") or isinstance(value, (bool, Tensor)):
        return False
    return not isinstance(value, np.ndarray) or (value.ndim == 0 and value.dtype.kind in "iu")
