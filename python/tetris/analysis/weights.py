"""Analysis of the weights in a file, without the code of the model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..cost import store
from ..cost.calls import Call
from ..cost.model import come_from_memory
from ..cost.problem import Problem
from ..importance import saliency_of
from ..progress import steps
from ..prune.options import LayerOptions
from ..prune.tree import LEAST_CHANNELS
from .layers import Subject, analyze_layer
from .model import checked_grid, search_of
from .report import AnalysisReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..layout_search import SearchOptions

LEAST_FEATURES = 16
"""Weights with fewer rows or columns are not looked at."""


def analyze_file(
    path: str | os.PathLike[str],
    *,
    tokens: int = 512,
    size: tuple[int, int] = (14, 14),
    batch: int = 1,
    blocks: Iterable[tuple[int, int]],
    sparsities: Iterable[float],
    include: Sequence[str] = ("*",),
    exclude: Sequence[str] = (),
    threads: int | None = None,
    progress: bool = False,
    **search: Unpack[SearchOptions],
) -> AnalysisReport:
    """As :func:`tetris.analyze`, of a safetensors file.

    Its 2-D tensors called ``weight`` are taken for linear layers, 4-D ones for convolutions with
    stride 1, padding that keeps the size of the map, and one group. A table of embeddings looks
    like a linear layer: exclude it. A ``Conv1D`` of transformers (GPT-2) is stored transposed,
    ``[in, out]``, which a file does not say: analyze such a model by :func:`tetris.analyze`.

    Args:
        path: The file.
        tokens: Of every linear layer.
        size: Height and width of every convolution's input.
        batch: Images.
        blocks: Block shapes.
        sparsities: Shares of the blocks to remove.
        include: fnmatch patterns of names of tensors.
        exclude: The same; wins over include.
        threads: To predict for; by default torch's number.
        progress: Show a progress bar.
        **search: As for :func:`tetris.analyze`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no safetensors file, or holds no weight to analyze.
    """
    where = "tetris analyze"
    shapes, shares = checked_grid(where, blocks, sparsities)
    how = search_of(LayerOptions(**search, where=where))
    cost, threads = store.load(), threads or torch.get_num_threads()
    skipped: dict[str, str] = {}
    with _opened(where, path) as file:
        names = {n: file.get_slice(n).get_shape() for n in sorted(file.keys())}
        chosen = _choose(names, include, exclude, skipped)
        if not chosen and "tetris" in (file.metadata() or {}):
            raise ValueError(
                f"{os.fspath(path)!r} is a file of tetris.save: its layers are sparse already; "
                "analyze the dense model's"
            )
        if not chosen:
            reasons = "; ".join(f"{n}: {why}" for n, why in list(skipped.items())[:5])
            raise ValueError(
                f"{os.fspath(path)!r} holds no weight of a linear layer or convolution to analyze "
                f"({reasons or f'{len(names)} tensors, none 2-D or 4-D and called weight'})"
            )
        cold = come_from_memory(4 * sum(torch.Size(names[n]).numel() for n in chosen))
        found = []
        with steps(progress, "analyzing", len(chosen) * len(shapes) * len(shares)) as advance:
            for name in chosen:
                weight = file.get_tensor(name).float()
                if not weight.isfinite().all():
                    skipped[name] = "not finite"
                    for _ in range(len(shapes) * len(shares)):
                        advance()
                    continue
                saliency = saliency_of(f"{where}: {name!r}", weight, "magnitude")
                call = _call(weight, tokens, size, batch)
                subject = Subject(name, saliency, 1, [call], cold)
                fitting = [b for b in shapes if b[0] < weight.shape[0] and b[1] < weight.shape[1]]
                found.append(
                    analyze_layer(
                        where,
                        subject,
                        fitting or shapes,
                        shares,
                        cost,
                        threads,
                        False,
                        how,
                        advance,
                    )
                )
    return AnalysisReport(tuple(found), skipped, threads, cost.source)


def _opened(where: str, path: str | os.PathLike[str]):
    text = os.fspath(path)
    if not os.path.exists(text):
        raise FileNotFoundError(f"there is no file {text!r}")
    if os.path.isdir(text):
        raise ValueError(f"{text!r} is a folder; name a safetensors file in it")
    try:
        return safe_open(text, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"{text!r} is no safetensors file, or not a whole one ({error}); torch.load reads "
            "files of torch.save, safetensors.torch.save_file writes what is needed here"
        ) from None
    except OSError as error:
        raise ValueError(f"{text!r} cannot be read: {error}") from None


def _choose(
    names: dict[str, list[int]],
    include: Sequence[str],
    exclude: Sequence[str],
    skipped: dict[str, str],
) -> list[str]:
    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(name == p or fnmatchcase(name, p) for p in patterns)

    for pattern in (*include, *exclude):
        if not any(matches(name, [pattern]) for name in names):
            raise ValueError(f"no tensor matches {pattern!r} (the first: {_some(names)})")
    chosen = []
    for name, shape in names.items():
        if name.split(".")[-1] != "weight" or len(shape) not in (2, 4):
            continue
        if not matches(name, include) or matches(name, exclude):
            skipped[name] = "excluded" if matches(name, exclude) else "not included"
        elif len(shape) == 4 and shape[1] < LEAST_CHANNELS:
            skipped[name] = f"{shape[1]} input channels per group (fewer than {LEAST_CHANNELS})"
        elif min(shape[:2]) < LEAST_FEATURES:
            skipped[name] = f"{shape[0]}x{shape[1]} (fewer than {LEAST_FEATURES} on a side)"
        else:
            chosen.append(name)
    return chosen


def _some(names: Iterable[str]) -> str:
    first = list(names)[:4]
    return ", ".join(first) or "it holds none"


def _call(weight: Tensor, tokens: int, size: tuple[int, int], batch: int) -> Call:
    outputs, inputs, *kernel = weight.shape
    if not kernel:
        return Call(Problem.linear(tokens, inputs, outputs), (tokens, inputs))
    problem = Problem.convolution(
        batch, inputs, size, outputs, kernel, padding=[k // 2 for k in kernel]
    )
    return Call(problem, (batch, inputs, *size))
