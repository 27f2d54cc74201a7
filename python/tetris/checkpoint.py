"""Sparse models in files: safetensors, with what it takes to rebuild the layers.

The tensors are those of ``state_dict``. The header's metadata says in addition, under the key
``tetris``, which layers are sparse and how, which names share one tensor, and a digest of it all:
a file that was cut or altered is refused before anything of it is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from . import _C
from .checks import check_model, check_weight, kind
from .layout import BlockLayout
from .modules import hooks_of, replace_modules
from .nn.base import INDEX, SparseLayer, make_sparse
from .nn.kinds import SPARSE_TYPES
from .ops import Activation
from .sharding import check_whole
from .undo import all_or_nothing

FORMAT = 1
"""Version of the metadata. A reader refuses versions that it does not know."""

_KEY = "tetris"
_TYPES = {t.__name__: t for t in SPARSE_TYPES}
_NEEDED = ("values", "row_ptr", "col_idx", "_extra_state")  # of every sparse layer


@dataclass(frozen=True)
class StoredLayer:
    """What a file says of one sparse layer, beside its tensors."""

    type: str
    """Name of the class in :mod:`tetris`."""
    sizes: dict[str, int]
    """As :attr:`tetris.nn.base.SparseLayer.sizes` has them."""
    kernel_size: list[int] | None
    groups: int
    activation: str


@dataclass(frozen=True)
class Checkpoint:
    """A file's contents, checked.

    Attributes:
        layers: The sparse layers, by name.
        tensors: Everything, under every name that ``state_dict`` has.
        aliases: Names that share the tensor of another name.
        version: Of the library that wrote it.
    """

    layers: dict[str, StoredLayer]
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    version: str

    def layout(self, name: str) -> BlockLayout:
        """The layout of a sparse layer."""
        layer = self.layers[name]
        index = {n: self.tensors.get(_prefix(name) + n) for n in INDEX}
        values = self.tensors[_prefix(name) + "values"]
        out, in_ = list(layer.sizes.values())[:2]
        return BlockLayout(
            (values.shape[2], values.shape[1]),
            out,
            in_,
            kernel_size=None if layer.kernel_size is None else tuple(layer.kernel_size),
            groups=layer.groups,
            **cast(Any, index),
        )


def save(model: nn.Module, path: str | PathLike[str]) -> None:
    """Write a model with sparse layers to a safetensors file.

    The file holds values and layouts, nothing dense: at 90 % sparsity a tenth of the dense bytes
    plus the index. It is complete or absent: an interrupted save leaves what was there before.

    Args:
        model: Any module. Masks of a pruner must have been turned into layouts
            (``pruner.finalize()``), or removed.
        path: The file, by custom ``NAME.safetensors``.

    Raises:
        TypeError: not a module, or one whose extra state is no tensor.
        ValueError: a weight is parametrized, as it is while a pruner masks it; tensors on the meta
            device.
        OSError: the file cannot be written.

    Example:
        >>> tetris.save(sparse, "model.safetensors")
        >>> sparse = tetris.load("model.safetensors", build_dense_model())
    """
    where = "tetris.save"
    check_model(where, model)
    check_whole(
        where,
        model.parameters(),
        "load the full state dict into a model that is not sharded and save that one, in one "
        "process (docs/distributed.md)",
    )
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module):
            raise ValueError(
                f"{where}: {name or 'the model'} is parametrized "
                f"({', '.join(cast(Any, module.parametrizations))}), as weights are while a pruner "
                "masks them; call pruner.finalize() (or remove the parametrization) first"
            )
    tensors, aliases = _distinct(where, model.state_dict())
    layers = {
        name: asdict(_stored(module))
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, SparseLayer)
    }
    about = {"format": FORMAT, "version": _C.version, "layers": layers, "aliases": aliases}
    about["digest"] = _digest(about, tensors)
    _write(where, Path(path), tensors, {_KEY: json.dumps(about)})


def load(path: str | PathLike[str], model: nn.Module) -> nn.Module:
    """Load a file that :func:`save` wrote into a freshly built model.

    The model may be dense, as its own code builds it: layers that are sparse in the file are
    replaced by sparse ones. It may also be sparse already, with any sparsity. No code that pruned
    it is needed. Everything is checked first; if anything does not fit, nothing changes. Tensors go
    to the model's devices and floating types; meanwhile the CPU's memory holds the file and the
    model once more.

    Args:
        path: The file.
        model: The architecture, on any device; changed in place.

    Returns:
        The model. If its root is itself a layer that becomes sparse, that layer.

    Raises:
        TypeError: not a module.
        ValueError: the file is cut or altered, not of this library, of a newer format, or of
            another architecture; a layer that would be replaced has hooks, or a weight that no
            kernel computes with (half precision on the CPU); tensors on the meta device.
        OSError: there is no such file.

    Example:
        >>> model = tetris.load("model.safetensors", build_dense_model())
    """
    where = "tetris.load"
    if isinstance(path, nn.Module) and not isinstance(model, nn.Module):
        raise TypeError(f"{where}: the path comes first, the model second")
    check_model(where, model)
    file = read(where, path)
    dense = {name: _find(where, model, name, layer) for name, layer in file.layers.items()}
    _check_names(where, model, file, dense)
    _check_tensors(where, model, file)
    new = _sparse_layers(where, file, dense)
    with all_or_nothing(model):
        result = replace_modules(model, new)
        for name, layer in file.layers.items():
            cast(SparseLayer, result.get_submodule(name)).activation = cast(Any, layer.activation)
        try:
            result.load_state_dict(file.tensors)
        except RuntimeError as error:
            raise ValueError(f"{where}: the model refuses what the file holds: {error}") from error
    return result


def read(where: str, path: str | PathLike[str]) -> Checkpoint:
    """A file's contents, verified."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{where}: there is no file {os.fspath(path)!r}")
    # Here, not above: on a machine that only computes, the rest of the library does without.
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        other = "it may be cut, or of another format"
        if zipfile.is_zipfile(path):
            other = "it is one of torch.save, which torch.load reads"
        raise ValueError(
            f"{where}: {os.fspath(path)!r} is not a whole safetensors file: {other} ({error})"
        ) from None
    if _KEY not in metadata:
        raise ValueError(
            f"{where}: {os.fspath(path)!r} was not written by tetris.save (no {_KEY!r} in its "
            "metadata); load a plain state with safetensors and model.load_state_dict"
        )
    try:
        about: dict[str, Any] = json.loads(metadata[_KEY])
        format, version, digest = about["format"], about["version"], about.pop("digest")
        intact = digest == _digest(about, tensors)
        layers = {name: StoredLayer(**layer) for name, layer in about["layers"].items()}
        aliases = dict(about["aliases"])
        tensors.update({name: tensors[first] for name, first in aliases.items()})
    except (KeyError, TypeError, AttributeError, RecursionError, json.JSONDecodeError):
        format, version, intact, layers, aliases = FORMAT, "?", False, {}, {}
    if format != FORMAT:
        raise ValueError(
            f"{where}: {os.fspath(path)!r} is of format {format!r}, this version of tetris reads "
            f"format {FORMAT}; it was written by tetris {version}"
        )
    if not intact:
        raise ValueError(
            f"{where}: {os.fspath(path)!r} was altered after it was written: its digest does not "
            "match its contents"
        )
    return Checkpoint(layers, tensors, aliases, version)


def _stored(layer: SparseLayer) -> StoredLayer:
    layout = layer.layout
    kernel = None if layout.kernel_size is None else list(layout.kernel_size)
    name = next(t.__name__ for t in type(layer).__mro__ if t in SPARSE_TYPES)
    return StoredLayer(name, dict(layer.sizes), kernel, layout.groups, layer.activation)


def _distinct(where: str, state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of a state, contiguous, each once; and which names stand for which others."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{where}: only tensors can be stored (got {kind(tensor)} under {name!r}); a "
                "module whose extra state is something else needs torch.save"
            )
        if tensor.is_meta:
            raise ValueError(f"{where}: {name!r} is on the meta device, which holds no numbers")
        if tensor.layout is not torch.strided:
            raise ValueError(f"{where}: {name!r} must be a strided tensor (got {tensor.layout})")
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().cpu().contiguous()
    # Views that overlap without being equal would be refused by safetensors: give each its own.
    storages: set[int] = set()
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage().data_ptr()
        if tensor.numel() and storage in storages:
            tensors[name] = tensor.clone()
        storages.add(storage)
    return tensors, aliases


def _digest(about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of everything in a file, whatever the order."""
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(where: str, path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write beside the file and rename, so that it is whole at every moment."""
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{where}: there is no folder {str(path.parent)!r}")
    from safetensors.torch import save_file

    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(descriptor)
    try:
        save_file(tensors, temporary, metadata)
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp's files are the owner's alone
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _find(where: str, model: nn.Module, name: str, stored: StoredLayer) -> nn.Module:
    """The layer of a model that a file's sparse layer goes into."""
    try:
        layer = model.get_submodule(name)
    except AttributeError:
        raise ValueError(
            f"{where}: the file has a sparse layer {name!r}, which the model has not; build the "
            f"architecture that was saved.{_wrapped(model, [name])}"
        ) from None
    cls = _TYPES.get(stored.type)
    if cls is None:
        raise ValueError(f"{where}: {_shown(name)} is a {stored.type}, which this version has not")
    if not isinstance(layer, (cls, cls.dense_type)):
        raise ValueError(
            f"{where}: {_shown(name)} is a {stored.type} in the file and must be that or an "
            f"{cls.dense_name()} in the model (got {kind(layer)})"
        )
    if stored.activation not in get_args(Activation):
        raise ValueError(
            f"{where}: {_shown(name)} fuses {stored.activation!r}, which this version has not"
        )
    if not isinstance(layer, SparseLayer):
        weight = cast(Tensor, layer.weight)
        check_weight(f"{where}: {_shown(name)}", weight)
        if hooks := hooks_of(layer, weight, state=True):
            raise ValueError(
                f"{where}: {_shown(name)} has {hooks}, which would be lost when the layer is "
                "replaced; load first and register them afterwards"
            )
    return layer


def _check_names(
    where: str, model: nn.Module, file: Checkpoint, layers: Mapping[str, nn.Module]
) -> None:
    """Raise unless model and file have the same tensors outside of what a sparse layer replaces."""
    own = {_prefix(name) for name in layers}
    of_layers = {n for n in file.tensors if _owner(n) in own}
    known = {prefix + n for prefix in own for n in (*_NEEDED, *INDEX, "bias")}
    needed = {prefix + n for prefix in own for n in _NEEDED}
    if needed - of_layers or of_layers - known:
        raise ValueError(
            f"{where}: the file's sparse layers lack {_some(sorted(needed - of_layers))} and have "
            f"{_some(sorted(of_layers - known))} more"
        )
    theirs = {n for n in file.tensors if _owner(n) not in own}
    ours = {n for n in model.state_dict() if _owner(n) not in own}
    for name, layer in layers.items():
        biased = layer.bias is not None
        if biased != (f"{_prefix(name)}bias" in file.tensors):
            raise ValueError(
                f"{where}: {_shown(name)} has {'a' if biased else 'no'} bias in the model, other "
                "than in the file"
            )
    if theirs != ours:
        missing, unexpected = sorted(ours - theirs), sorted(theirs - ours)
        sparse = [n for n, m in model.named_modules() if isinstance(m, SparseLayer)]
        dense = [n for n in sparse if f"{_prefix(n)}weight" in theirs]
        hint = _wrapped(model, unexpected)
        if dense:
            hint = f" Dense in the file, sparse here: {_some(dense)}. Load into a dense model."
        elif not hint and any(n.endswith("running_mean") for n in missing):
            hint = " If the model was fused: save before tetris.fuse, and fuse after loading."
        raise ValueError(
            f"{where}: the model is not of the architecture that was saved: the file lacks "
            f"{_some(missing)} and has {_some(unexpected)} more.{hint}"
        )


def _check_tensors(where: str, model: nn.Module, file: Checkpoint) -> None:
    """Raise unless tensors that both have are of one shape and kind, and shared alike."""
    sparse = {_prefix(name) for name in file.layers}
    first: dict[int, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        new = file.tensors.get(name)
        if new is None or _owner(name) in sparse or not isinstance(tensor, Tensor):
            continue
        if tensor.is_meta:
            raise ValueError(
                f"{where}: {name!r} is on the meta device in the model, which holds no numbers; "
                "give it some first (model.to_empty(device='cpu'))"
            )
        if new.shape != tensor.shape:
            raise ValueError(
                f"{where}: {name!r} must be {list(tensor.shape)} as in the model "
                f"(got {list(new.shape)})"
            )
        if new.dtype != tensor.dtype and not (
            new.dtype.is_floating_point and tensor.is_floating_point()
        ):
            raise ValueError(
                f"{where}: {name!r} must be {tensor.dtype} as in the model (got {new.dtype})"
            )
        other = first.setdefault(id(tensor), name)
        if other != name and not _same(new, file.tensors[other]):
            raise ValueError(
                f"{where}: {other!r} and {name!r} are one tensor in the model and must be equal in "
                "the file (got two different ones)"
            )


def _sparse_layers(
    where: str, file: Checkpoint, layers: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """A sparse layer with the file's layout for each dense one; those that shared values, share.

    Layers that are sparse already take another layout in ``load_state_dict``; here they are checked
    as it will check them.
    """
    new: dict[str, nn.Module] = {}
    shared: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        stored, prefix = file.layers[name], _prefix(name)
        try:
            layout = file.layout(name)
            if isinstance(layer, SparseLayer):
                sparse = layer
            else:
                weight = cast(Tensor, layer.weight)
                key = file.aliases.get(f"{prefix}values", f"{prefix}values")
                if key not in shared:
                    empty = torch.empty_like(
                        file.tensors[key], device=weight.device, dtype=weight.dtype
                    )
                    shared[key] = nn.Parameter(empty, requires_grad=weight.requires_grad)
                sparse = new[name] = make_sparse(
                    _TYPES[stored.type],
                    layer,
                    layout,
                    bias=cast("nn.Parameter | None", layer.bias),
                    values=shared[key],
                )
            if sparse.sizes != stored.sizes:
                raise ValueError(f"the file's sizes are {stored.sizes} (got {sparse.sizes})")
            sparse._check_sizes(file.tensors[f"{prefix}_extra_state"])
            sparse._check_state(
                {
                    n: file.tensors[prefix + n]
                    for n in ("values", *INDEX, "bias")
                    if prefix + n in file.tensors
                }
            )
        except (ValueError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(
                f"{where}: {_shown(name)} does not fit the model's layer: {error}"
            ) from error
    return new


def _wrapped(model: nn.Module, names: Iterable[str]) -> str:
    """What to do where the model, or else the file with these names, is of a wrapper."""
    children = [name for name, _ in model.named_children()]
    for wrapper, of in (("_orig_mod", "torch.compile"), ("module", "DistributedDataParallel")):
        if children == [wrapper]:
            return f" Load into what {of} wraps, model.{wrapper}."
        if any(name.split(".")[0] == wrapper for name in names):
            return f" It was saved from a wrapper of {of}: save model.{wrapper} instead."
    return ""


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape are equal in every bit."""
    a, b = (t.contiguous().reshape(-1).view(torch.uint8) for t in (a, b))
    return torch.equal(a, b)


def _prefix(name: str) -> str:
    """What the names of a module's tensors begin with."""
    return f"{name}." if name else ""


def _shown(name: str) -> str:
    return repr(name) if name else "the model"


def _owner(name: str) -> str:
    """The prefix of the module that a tensor of a state belongs to."""
    return name[: name.rfind(".") + 1]


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
