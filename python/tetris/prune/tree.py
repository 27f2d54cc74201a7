"""Finding the layers of a model that may become sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase

from torch import Tensor, fx, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from ..checks import check_python, describe, listed
from ..modules import hooks_of
from ..nn.base import SparseLayer
from ..nn.kinds import (
    DENSE_TYPES,
    SPARSE_TYPES,
    DenseLayer,
    LinearLayer,
    exact_type,
    groups_of,
    oriented,
    sparse_type,
)
from ..sharding import check_unwrapped, check_whole
from .masks import BEFORE, BlockMask
from .options import LayerOptions, LayerOverride

#: Convolutions with fewer input channels in a group stay dense: they are expected not to win. For
#: each output value a dense layer does ``channels * kernel positions`` multiplications, 32 a cycle
#: on AVX-512: five cycles for 16 channels and a 3x3 kernel, less than one for the 3 channels of a
#: picture or the one of a depthwise layer. Copying the input and writing the output should take
#: most of a cycle however few weights are left. An estimate, not a measurement. Such layers also
#: hold few weights, and tend to lose accuracy first.
LEAST_CHANNELS = 16

Selector = str | type | nn.Module
"""A name, an fnmatch pattern of names, a module type, or a module; stands for all layers below."""


@dataclass
class Selection:
    """Layers that become sparse, and those that do not.

    Attributes:
        layers: name -> layer, in the model's order; a layer used under several names once.
        tied: name -> names of the selected layers that share its weight Parameter, itself first.
            Only the first of such a group is a key.
        skipped: name -> reason, for the linear layers and convolutions that stay dense.
        own_block: Layers whose block an override sets, see :func:`layer_options`.
    """

    layers: dict[str, DenseLayer] = field(default_factory=dict)
    tied: dict[str, list[str]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    own_block: set[str] = field(default_factory=set)


def select_layers(
    where: str,
    model: nn.Module,
    include: Selector | Iterable[Selector] | None,
    exclude: Selector | Iterable[Selector] | None,
    types: tuple[type[nn.Module], ...],
) -> Selection:
    """Choose layers, as :func:`tetris.sparsify` explains.

    Raises:
        ValueError: an entry of include or exclude matches nothing, nothing is left to do, or a
            weight is shared with something that stays dense.
        TypeError: an entry is of no known kind.
    """
    check_python(where, model)
    check_unwrapped(where, model)
    check_whole(where, model.parameters(), BEFORE)
    if not isinstance(types, (tuple, list)) or not all(isinstance(t, type) for t in types):
        raise TypeError(
            f"{where}: types must be a tuple of classes, such as (nn.Linear,) "
            f"(got {describe(types)})"
        )
    tree = _Tree(model)
    include = None if include is None else list(_several(include))
    named = {id(m) for n, m in tree.names if any(e is m or e == n for e in include or ())}
    included = None if include is None else tree.resolve(where, "include", include)
    excluded = set() if exclude is None else tree.resolve(where, "exclude", exclude)
    inside_attention = {
        id(child): name
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        for child in module.modules()
    }
    result = Selection()
    for name, module in model.named_modules():
        if isinstance(module, SparseLayer) or not isinstance(module, _CANDIDATES):
            continue
        if id(module) in excluded:
            result.skipped[name] = "excluded"
        elif included is not None and id(module) not in included:
            result.skipped[name] = "not included"
        elif id(module) in inside_attention:
            result.skipped[name] = "nn.MultiheadAttention uses the weight itself, not the layer"
        elif parametrize.is_parametrized(module):
            result.skipped[name] = (
                "masked by a pruner: its finalize() or remove() comes first"
                if any(isinstance(m, BlockMask) for m in module.modules())
                else "parametrized: remove the parametrizations first"
            )
        elif not isinstance(module, DenseLayer):
            result.skipped[name] = f"there is no sparse {type(module).__name__}"
        elif (own := module._parameters.get("weight")) is not None and is_lazy(own):
            result.skipped[name] = "its size is not known yet: call the model once"
        elif not {type(module), exact_type(module)} & {*types}:
            result.skipped[name] = (
                f"a {type(module).__name__}, which may use its weight in ways of its own; pass "
                f"types= if it is an ordinary {sparse_type(module).dense_name().rpartition('.')[2]}"
                if exact_type(module) not in DENSE_TYPES
                else f"a {type(module).__name__}, which types= leaves out"
            )
        elif not isinstance(weight := module._parameters.get("weight"), nn.Parameter):
            result.skipped[name] = (
                "weight is not a Parameter of the layer: undo weight_norm or prune first "
                "(torch.nn.utils.remove_weight_norm, prune.remove)"
            )
        elif not weight.is_floating_point() or weight.numel() == 0:
            result.skipped[name] = f"weight is {weight.dtype}{list(weight.shape)}"
        elif id(module) not in named and (reason := _too_thin(module)):
            result.skipped[name] = reason
        else:
            result.layers[name] = module
    if not result.layers:
        reasons = "; ".join(f"{n or '(root)'}: {r}" for n, r in result.skipped.items())
        if not reasons and any(isinstance(m, SparseLayer) for m in model.modules()):
            reasons = "its layers are sparse already: tetris.densify(model) first"
        if not reasons and isinstance(model, fx.GraphModule):
            reasons = "a traced graph calls functions, not layers: take the model it was made of"
        known = listed((t.dense_name() for t in SPARSE_TYPES), "or")
        raise ValueError(
            f"{where}: no layer to prune in {type(model).__name__} "
            f"({reasons or f'it has no {known}'})"
        )
    for name, layer in result.layers.items():
        if layer.weight.is_meta:
            raise ValueError(
                f"{where}: layer {name!r} is on the meta device, which holds no numbers; load the "
                "weights first (model.to_empty(device='cpu'), then load_state_dict), or exclude it"
            )
    _find_ties(where, model, result)
    return result


def layer_options(
    where: str,
    model: nn.Module,
    selection: Selection,
    default: LayerOptions,
    overrides: Mapping[str, LayerOverride] | None,
) -> tuple[dict[str, LayerOptions], set[str]]:
    """Settings of each selected layer, and the layers whose sparsity an override fixes.

    Later overrides win over earlier ones. Layers with a block of their own are noted in the
    selection. A block that covers a whole layer is made smaller, such
    that there are two.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(
            f"{where}: overrides must be a dict from name or pattern to settings, such as "
            f"{{'decoder.*': {{'sparsity': 0.8}}}} (got {describe(overrides)})"
        )
    options = dict.fromkeys(selection.layers, default)
    fixed: set[str] = set()
    tree = _Tree(model)
    for pattern, changes in (overrides or {}).items():
        matched = tree.resolve(where, "overrides", [pattern])
        names = [n for n, layer in selection.layers.items() if id(layer) in matched]
        if not names:
            raise ValueError(f"{where}: overrides[{pattern!r}] matches no layer that is pruned")
        for name in names:
            options[name] = options[name].override(f"{where}: overrides[{pattern!r}]", changes)
            if "sparsity" in changes:
                fixed.add(name)
            if "block" in changes:
                selection.own_block.add(name)
    for name, layer in selection.layers.items():
        options[name] = replace(options[name], block=fitting_block(layer, options[name].block))
    for first, group in selection.tied.items():
        for other in group[1:]:
            if options[other] != options[first]:
                raise ValueError(
                    f"{where}: {first!r} and {other!r} share one weight and need equal overrides"
                )
    return options, fixed


def fitting_block(layer: DenseLayer, block: tuple[int, int]) -> tuple[int, int]:
    """The block, or half of the layer if that is one block at each kernel position of a group."""
    out, in_ = oriented(layer, layer.weight.detach()).shape[:2]
    return fit(block, out // groups_of(layer), in_)


def fit(block: tuple[int, int], out: int, in_: int) -> tuple[int, int]:
    """The block, or half of a weight that it would cover."""
    if block[0] < out or block[1] < in_:
        return block
    return (out, -(-in_ // 2)) if in_ >= out else (-(-out // 2), in_)


def check_hooks(where: str, name: str, module: nn.Module, parameter: Tensor | None = None) -> None:
    """Raise if replacing a module, and the Parameter that is passed, would lose hooks."""
    if found := hooks_of(module, parameter, state=True):
        kind, otherwise = "sparse", ", or exclude the layer"
        if isinstance(module, SparseLayer):
            kind, otherwise = "dense", ""
        raise ValueError(
            f"{where}: layer {name!r} has {found}, which its {kind} replacement would not have; "
            f"remove them and register them on the result{otherwise}"
        )


class _Tree:
    """All names of all modules."""

    def __init__(self, model: nn.Module) -> None:
        self.names = list(model.named_modules(remove_duplicate=False))

    def resolve(
        self, where: str, argument: str, selectors: Selector | Iterable[Selector]
    ) -> set[int]:
        """Ids of all modules at or below what the selectors match; each must match something."""
        found: set[int] = set()
        for selector in _several(selectors):
            test = _test(where, argument, selector)
            hits = [module for name, module in self.names if test(name, module)]
            below = {id(m): m for hit in hits for m in hit.modules()}
            if not hits:
                known = ", ".join(n for n, m in self.names if isinstance(m, DENSE_TYPES)) or "none"
                raise ValueError(
                    f"{where}: {argument} entry {selector!r} matches no module "
                    f"(linear layers and convolutions: {known})"
                )
            if argument == "include" and not any(
                isinstance(m, DENSE_TYPES) for m in below.values()
            ):
                kinds = ", ".join(sorted({type(hit).__name__ for hit in hits}))
                raise ValueError(
                    f"{where}: include entry {selector!r} matches no linear layer or convolution "
                    f"(only {kinds})"
                )
            found.update(below)
        return found


#: What a user may expect to be pruned: the other convolutions are listed as staying dense.
_CANDIDATES = (*DENSE_TYPES, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose3d)


def _several(selectors: Selector | Iterable[Selector]) -> Iterable[Selector]:
    if isinstance(selectors, (str, type, nn.Module)) or not isinstance(selectors, Iterable):
        return [selectors]  # type: ignore[list-item]
    return selectors


def _too_thin(module: DenseLayer) -> str | None:
    """Why a layer stays dense unless it is asked for by name, or None."""
    if isinstance(module, LinearLayer):
        return None
    groups = groups_of(module)
    channels = module.in_channels // groups
    if channels >= LEAST_CHANNELS:
        return None
    what = f"{channels} input channel{'s' * (channels != 1)}" + " per group" * (groups > 1)
    return (
        f"{what} (fewer than {LEAST_CHANNELS}), expected not to win; to prune it all the same, "
        "include it by its own name or as a module"
    )


def _test(where: str, argument: str, selector: Selector) -> Callable[[str, nn.Module], bool]:
    if isinstance(selector, str):
        return lambda name, module: name == selector or fnmatchcase(name, selector)
    if isinstance(selector, type):
        return lambda name, module: isinstance(module, selector)
    if isinstance(selector, nn.Module):
        return lambda name, module: module is selector
    hint = f"; names are strings: {str(selector)!r}" if isinstance(selector, int) else ""
    raise TypeError(
        f"{where}: {argument} takes names, patterns, module types and modules, one or several "
        f"(got {describe(selector)}{hint})"
    )


def _find_ties(where: str, model: nn.Module, selection: Selection) -> None:
    users: dict[int, list[tuple[str, nn.Module, str]]] = {}
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                users.setdefault(id(parameter), []).append((name, module, key))
    selected = {id(layer): name for name, layer in selection.layers.items()}
    for name, layer in selection.layers.items():
        group = []
        for other_name, other, key in users[id(layer.weight)]:
            if id(other) not in selected or key != "weight":
                raise ValueError(
                    f"{where}: {name!r} shares its weight with {other_name + '.' + key!r}, which "
                    f"stays dense; exclude {name!r}, or give it a weight of its own"
                )
            same = selection.layers[selected[id(other)]]
            if (sparse_type(same), groups_of(same)) != (sparse_type(layer), groups_of(layer)):
                raise ValueError(
                    f"{where}: {name!r} and {other_name!r} share a weight but read it differently "
                    f"({type(layer).__name__} with {groups_of(layer)} groups and "
                    f"{type(same).__name__} with {groups_of(same)}); give each a weight of its "
                    "own, or exclude both"
                )
            group.append(selected[id(other)])
        if group[0] == name:
            selection.tied[name] = group
