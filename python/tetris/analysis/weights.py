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
from ..prune.tree import LEAST_CHANNELS, fit
from .layers import Subject, analyze_layer
from .model import checked_grid, search_of
from .report import AnalysisReport

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from ..layout_search import SearchOptions


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
    stride 1, padding that keeps the size of the map, and one group. Layers are called as
    :func:`tetris.sparsify` calls them, by the name of the module: ``fc1``, not ``fc1.weight``.
    Other tensors of two dimensions and more are among what the report lists as skipped. A table of
    embeddings looks like a linear layer: exclude it. A ``Conv1D`` of transformers (GPT-2) is stored
    transposed, ``[in, out]``, which a file does not say: analyze such a model by
    :func:`tetris.analyze`.

    Args:
        path: The file.
        tokens: Of every linear layer.
        size: Height and width of every convolution's input.
        batch: Images.
        blocks: Block shapes.
        sparsities: Shares of the blocks to remove.
        include: fnmatch patterns of names of modules, which stand for all layers below.
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
        shaped = {n: file.get_slice(n).get_shape() for n in sorted(file.keys())}
        chosen = _choose(shaped, include, exclude, skipped)
        if not chosen and "tetris" in (file.metadata() or {}):
            raise ValueError(
                f"{os.fspath(path)!r} is a file of tetris.save: its layers are sparse already; "
                "analyze the dense model's"
            )
        if not chosen:
            reasons = "; ".join(f"{n or '(root)'}: {why}" for n, why in list(skipped.items())[:5])
            raise ValueError(
                f"{os.fspath(path)!r} holds no weight of a linear layer or convolution to analyze "
                f"({reasons or f'{len(shaped)} tensors, none of two dimensions or more'})"
            )
        cold = come_from_memory(4 * sum(torch.Size(shaped[t]).numel() for t in chosen.values()))
        found = []
        with steps(progress, "analyzing", len(chosen) * len(shapes) * len(shares)) as advance:
            for name, tensor in chosen.items():
                weight = file.get_tensor(tensor).float()
                if not weight.isfinite().all():
                    skipped[name] = "not finite"
                    for _ in range(len(shapes) * len(shares)):
                        advance()
                    continue
                saliency = saliency_of(f"{where}: {name!r}", weight, "magnitude")
                call = _call(weight, tokens, size, batch)
                subject = Subject(name, saliency, 1, [call], cold)
                fitting = list(dict.fromkeys(fit(b, *weight.shape[:2]) for b in shapes))
                found.append(
                    analyze_layer(
                        where,
                        subject,
                        fitting,
                        shares,
                        cost,
                        threads,
                        False,
                        how,
                        advance,
                    )
                )
    return AnalysisReport(tuple(found), skipped, threads, cost.source_for(threads))


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
    shapes: dict[str, list[int]],
    include: Sequence[str],
    exclude: Sequence[str],
    skipped: dict[str, str],
) -> dict[str, str]:
    """Module -> tensor, of what is analyzed; what is not goes into ``skipped`` with the reason."""
    modules = {tensor: tensor.rpartition(".")[0] for tensor in shapes}
    above = {module: {module, *_parents(module)} for module in modules.values()}
    for pattern in (*include, *exclude):
        if not any(_matches(names, [pattern]) for names in above.values()):
            hint = "; modules are named, without .weight" if pattern.endswith(".weight") else ""
            first = _some(m for t, m in modules.items() if len(shapes[t]) > 1)
            raise ValueError(f"no module matches {pattern!r} (the first: {first}{hint})")
    chosen = {}
    for tensor, shape in shapes.items():
        if len(shape) < 2:
            continue
        module = modules[tensor]
        if tensor.rpartition(".")[2] != "weight":
            skipped[tensor] = "a tensor not called weight, so of no linear layer or convolution"
        elif _matches(above[module], exclude):
            skipped[module] = "excluded"
        elif not _matches(above[module], include):
            skipped[module] = "not included"
        elif len(shape) not in (2, 4):
            skipped[module] = (
                f"{len(shape)}-D, not analyzed from a file: tetris.analyze(model, example_inputs) "
                "knows whether it is a layer"
            )
        elif 0 in shape:
            skipped[module] = "empty"
        elif len(shape) == 4 and shape[1] < LEAST_CHANNELS:
            skipped[module] = f"{shape[1]} input channels per group (fewer than {LEAST_CHANNELS})"
        else:
            chosen[module] = tensor
    return chosen


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:n]) for n in range(1, len(parts))]


def _matches(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(name == p or fnmatchcase(name, p) for name in names for p in patterns)


def _some(names: Iterable[str]) -> str:
    first = list(dict.fromkeys(names))[:4]
    return ", ".join(n or "(root)" for n in first) or "it holds none"


def _call(weight: Tensor, tokens: int, size: tuple[int, int], batch: int) -> Call:
    outputs, inputs, *kernel = weight.shape
    if not kernel:
        return Call(Problem.linear(tokens, inputs, outputs), (tokens, inputs))
    problem = Problem.convolution(
        batch, inputs, size, outputs, kernel, padding=[k // 2 for k in kernel]
    )
    return Call(problem, (batch, inputs, *size))
