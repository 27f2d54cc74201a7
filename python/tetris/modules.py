"""Models as trees of modules: copying them, exchanging modules, seeing their hooks."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from types import MethodType

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from .checks import check_flags
from .nn.base import SparseLayer


def copy_or_same(
    where: str, model: nn.Module, inplace: bool, keep: Iterable[Tensor] = ()
) -> nn.Module:
    """The model to change: itself, or a deep copy, which shares the tensors to keep.

    Raises:
        ValueError: the model cannot be copied, or inplace is neither True nor False.
    """
    check_flags(where, inplace=inplace)
    if inplace:
        return model
    try:
        return copy.deepcopy(model, {id(tensor): tensor for tensor in keep})
    except MemoryError:
        raise
    except Exception as error:  # an attribute that refuses, in its own words
        raise ValueError(
            f"{where}: {type(model).__name__} cannot be copied ({type(error).__name__}: {error}); "
            "pass inplace=True, or detach or remove what its modules keep as attributes"
        ) from error


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> nn.Module:
    """Put modules in place of others, under every name these have.

    Returns:
        The model; if its root is replaced, the new root.
    """
    by_id = {id(model.get_submodule(name)): module for name, module in new.items()}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is not None and id(child) in by_id:
                parent._modules[name] = by_id[id(child)]
    model = by_id.get(id(model), model)
    _set_fast_paths(model)
    return model


def own_forward(module: nn.Module) -> bool:
    """Whether the object has a forward in place of its class's, as wrappers put there.

    Some put the class's back as ``module.forward = original``, which is none of its own.
    """
    forward = vars(module).get("forward")
    known = getattr(type(module), "forward", None)  # TorchScript's class has none
    ours = isinstance(forward, MethodType) and forward.__self__ is module
    return forward is not None and not (ours and forward.__func__ is known)


def hooks_of(
    module: nn.Module, *parameters: Tensor | None, state: bool = False, forward: bool = True
) -> str:
    """The kinds of hooks a module has, or an empty string.

    Args:
        module: The module; hooks of its forward and backward passes count.
        *parameters: Of the module: their hooks count, too.
        state: Those of its state_dict and load_state_dict count, too.
        forward: So does a forward of its own, see :func:`own_forward`.
    """
    kinds = ["_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"]
    found = [kind for kind in kinds if getattr(module, kind, None)]
    for kind in _STATE_HOOKS if state else ():
        if not all(map(_nothing_lost, getattr(module, kind, {}).values())):
            found.append(kind)
    for parameter in parameters:
        found += [f"parameter{kind}" for kind in _TENSOR_HOOKS if getattr(parameter, kind, None)]
    if forward and own_forward(module):
        found.append("a forward of its own")
    return ", ".join(kind.strip("_") for kind in found)


_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)
_TENSOR_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")


def _nothing_lost(hook: object) -> bool:
    """Of torch or ours: weight_norm leaves one behind, a mask takes its own along when it goes."""
    function = getattr(hook, "hook", hook)
    return str(getattr(function, "__module__", "")).startswith(("torch.", "tetris."))


def unparametrize(module: nn.Module, name: str, *, leave_parametrized: bool) -> None:
    """``torch.nn.utils.parametrize.remove_parametrizations``, without harm to deep copies.

    torch takes the tensor from the class, which a deep copy shares: give the module its own first.
    The tensor comes before the module's others again, as optimizers count them.
    """
    kind = type(module)
    own = type(kind.__name__, kind.__bases__, dict(vars(kind)))
    module.__class__ = own  # type: ignore[assignment]
    parametrize.remove_parametrizations(module, name, leave_parametrized=leave_parametrized)
    for other in [key for key in module._parameters if key != name]:
        module._parameters[other] = module._parameters.pop(other)


def _set_fast_paths(model: nn.Module) -> None:
    """Keep torch's fused encoder layer from reading weights that are gone.

    In inference nn.TransformerEncoderLayer passes ``linear1.weight`` to a fused kernel, unless its
    activation is none that the kernel knows; 0 says so, and the layer then calls its submodules.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            sparse = any(isinstance(m, SparseLayer) for m in (module.linear1, module.linear2))
            module.activation_relu_or_gelu = 0 if sparse else _activation_code(module.activation)
        elif isinstance(module, nn.TransformerEncoder):
            if any(isinstance(m, SparseLayer) for m in module.modules()):
                module.use_nested_tensor = False


def _activation_code(activation: object) -> int:
    if activation is F.relu or isinstance(activation, nn.ReLU):
        return 1
    return 2 if activation is F.gelu or isinstance(activation, nn.GELU) else 0
