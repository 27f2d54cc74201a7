"""What sparse layers have in common: values and layout as parameters and buffers, and their state.

``from_dense`` and ``to_dense`` copy parameters; :func:`make_sparse` and :func:`make_dense`, which
the functions on whole models use, share them.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast, get_args

import torch
from torch import Tensor, nn

from .. import ops
from ..blocking import Blocking
from ..checks import (
    DTYPES,
    check_block,
    check_dtype,
    check_keywords,
    check_weight,
    describe,
    listed,
)
from ..importance import Importance, saliency_or_weight
from ..layout import BlockLayout, search_layout
from ..layout_search import SearchOptions
from ..ops import Activation
from ..parameters import replace_data
from ..sharding import check_whole, fill, is_sharded
from .weight import ABSENT, AbsentWeight

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_ACTIVATIONS = get_args(ops.Activation)
INDEX = ("row_ptr", "col_idx", "row_perm", "col_perm")

Dense = TypeVar("Dense", bound=nn.Module)


class SparseLayer(nn.Module, Generic[Dense]):
    """A layer with a block-sparse weight: what all of them share.

    :class:`tetris.SparseLinear` explains the attributes, and what ``state_dict`` loads into. A
    subclass says which dense layer it stands for and calls :meth:`_build` in ``__init__``.
    """

    dense_type: ClassVar[type[nn.Module]]
    """The dense layer this one stands for."""
    settings: ClassVar[tuple[str, ...]]
    """Arguments of both constructors that are attributes of both layers too."""

    values: nn.Parameter
    bias: nn.Parameter | None
    row_ptr: Tensor
    col_idx: Tensor
    row_perm: Tensor | None
    col_perm: Tensor | None
    activation: Activation

    # -- what a subclass says -----------------------------------------------------------------

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The sizes that layouts and states must share, by name: outputs and inputs come first."""

    @property
    @abstractmethod
    def _dense_shape(self) -> tuple[int, ...]:
        """Of the dense layer's weight."""

    @abstractmethod
    def _blocking(self, block: tuple[int, int]) -> Blocking:
        """The weight, cut into blocks."""

    @abstractmethod
    def gradient_of(self, layout: BlockLayout, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of blocks of the weight, whether the layer stores them or not.

        Args:
            layout: Which blocks; of the layer's sizes.
            x: Input of :meth:`forward`.
            grad: Gradient of its result before the activation.

        Returns:
            [nnzb, bi, bo], values' gradient of a layer that stores these blocks.
        """

    @staticmethod
    def oriented(weight: Tensor, groups: int) -> Tensor:
        """The dense layer's weight as ``[out, in / groups, ...]``, or back."""
        return weight

    @classmethod
    def dense_name(cls) -> str:
        """Name of the dense layer in messages."""
        return f"nn.{cls.dense_type.__name__}"

    @classmethod
    def arguments_of(cls, module: nn.Module) -> dict[str, Any]:
        """Arguments of the constructor that a dense layer, or a sparse one, stands for."""
        return {name: getattr(module, name) for name in cls.settings}

    def _empty_dense(self, bias: bool) -> nn.Module:
        """The dense layer on the meta device."""
        return self.dense_type(**self.arguments_of(self), bias=bias, device="meta")

    # -- making one ---------------------------------------------------------------------------

    def _build(
        self,
        bias: bool,
        layout: BlockLayout,
        activation: Activation,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Check the arguments that all layers share, make parameters and buffers."""
        where = type(self).__name__
        _check_layout(where, layout)
        check_dtype(where, dtype, device)
        own = self._blocking(layout.block)
        if layout.blocking != own:
            names = "out x in" if own.kernel_size is None else "out x in/groups x kernel"
            raise ValueError(
                f"{where}: layout must be of the layer's size, {names} "
                f"(got {layout.blocking} and {own})"
            )
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"{where}: activation must be one of {', '.join(_ACTIVATIONS)} "
                f"(got {describe(activation)})"
            )
        self.activation = activation
        bo, bi = layout.block
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty((layout.nnz_blocks, bi, bo), **factory))
        self.bias = nn.Parameter(torch.empty(own.out_features, **factory)) if bias else None
        for name in INDEX:
            index = getattr(layout, name)
            # A copy: the module's buffers may be loaded into, a layout never changes.
            self.register_buffer(
                name, None if index is None else index.clone().to(self.values.device)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw values and bias anew; entries beyond the edge of the weight are zero."""
        stored = self.values.numel() / self._blocking(self.block).out_features
        bound = 1 / math.sqrt(max(1.0, stored))
        with torch.no_grad():
            self.values.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)
            self._zero_padding()

    @classmethod
    def from_dense(
        cls,
        module: Dense,
        *,
        layout: BlockLayout | None = None,
        sparsity: float | None = None,
        block: tuple[int, int] | None = None,
        importance: Importance | None = None,
        activation: Activation = "none",
        **search: Unpack[SearchOptions],
    ) -> Self:
        """Keep the blocks of a dense layer that a layout stores; the dense layer is not changed.

        Args:
            module: The dense layer.
            layout: What to store. Either this or ``sparsity``.
            sparsity: Share of blocks to remove; a layout is then searched as by
                :meth:`tetris.BlockLayout.from_dense`.
            block: (bo, bi), by default (4, 1); with ``sparsity`` only, like all that follow except
                ``activation``.
            importance: What a weight is worth.
            activation: Function to fuse behind the layer.
            **search: ``reorder``, ``seed``, ``budget``, ``sweeps``, ``balanced``,
                ``allow_empty_rows`` and ``tie_kernel``, as :meth:`tetris.BlockLayout.from_dense`
                explains them.

        Returns:
            The sparse layer, on the device and in the type, mode and ``requires_grad`` of the
            dense one.

        Raises:
            TypeError: not a layer of the kind this one stands for.
            ValueError: both or neither of ``layout`` and ``sparsity``, or one that does not fit; a
                weight that no kernel computes with: half precision on the CPU, or a device that
                this build has no kernels for.
        """
        where = f"{cls.__name__}.from_dense"
        if not isinstance(module, cls.dense_type):
            hint = ""
            if isinstance(module, nn.Module):
                hint = "; tetris.sparsify converts the linear layers and convolutions of a model"
            raise TypeError(
                f"{where}: module must be an {cls.dense_name()} (got {type(module).__name__}{hint})"
            )
        if (layout is None) == (sparsity is None):
            raise ValueError(
                f"{where}: pass either layout= or sparsity= "
                f"(got {'neither' if layout is None else 'both'})"
            )
        check_keywords(where, search, SearchOptions.__annotations__)
        weight = cast(Tensor, module.weight)
        check_weight(where, weight)
        if layout is None:
            assert sparsity is not None
            groups = getattr(module, "groups", 1)
            saliency, absolute = saliency_or_weight(where, weight, importance)
            layout, _ = search_layout(
                where,
                cls.oriented(saliency, groups),
                (4, 1) if block is None else block,
                sparsity,
                groups=groups,
                absolute=absolute,
                **search,
            )
        else:
            _check_layout(where, layout)
            given = [*search] + ["importance"] * (importance is not None)
            if block is not None and check_block(where, block) != layout.block:
                given = ["block", *given]
            if given:
                names = listed(given) if len(given) > 1 else given[0]
                raise ValueError(
                    f"{where}: {names} would only matter to a search; layout= says what is stored"
                )
        return make_sparse(cls, module, layout, bias=_copy(module.bias), activation=activation)

    def to_dense(self) -> Dense:
        """The dense layer with the same weight, zero where nothing is stored.

        Raises:
            ValueError: the layer has a fused activation, which the dense layer cannot express.
        """
        if self.activation != "none":
            raise ValueError(
                f"{type(self).__name__}.to_dense: {self.dense_name()} has no activation "
                f"(this layer fuses {self.activation!r}); set layer.activation = 'none' and apply "
                "the function after the layer"
            )
        return make_dense(self, bias=_copy(self.bias))

    @property
    def weight(self) -> Tensor:
        """Type, device and shape of the dense layer's weight, which models may ask for in forward.

        Raises:
            RuntimeError: anything else is asked of it: there are stored values only.
        """
        values = self._parameters.get("values")
        return AbsentWeight.like(self.values if values is None else values, self._dense_shape)

    @weight.setter
    def weight(self, value: object) -> None:
        self._refuse_weight()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of ``nn.Module``, also for an assigned Parameter; there can be no ``weight``."""
        if name == "weight":
            self._refuse_weight()
        super().register_parameter(name, param)

    def _refuse_weight(self) -> None:
        raise AttributeError(f"{type(self).__name__}: weight cannot be set: {ABSENT}")

    # -- the layout ---------------------------------------------------------------------------

    @property
    def block(self) -> tuple[int, int]:
        """(bo, bi), read from ``values``."""
        return self.values.shape[2], self.values.shape[1]

    @property
    def layout(self) -> BlockLayout:
        """The layout, made from the buffers (and checked) at each access."""
        return self._layout_of(self.block, {name: getattr(self, name) for name in INDEX})

    def _layout_of(self, block: tuple[int, int], index: Mapping[str, Any]) -> BlockLayout:
        sizes = self._blocking(block)
        return BlockLayout(
            block,
            sizes.out_features,
            sizes.in_features,
            index["row_ptr"],
            index["col_idx"],
            index.get("row_perm"),
            index.get("col_perm"),
            sizes.kernel_size,
            sizes.groups,
        )

    def _operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
        """values, row_ptr, col_idx, row_perm, col_perm, as every op takes them."""
        # NOTE: an attribute that Module.__getattr__ finds costs ten dict items, and an op call is a
        # few microseconds. The attribute is for values that something else provides (parametrize).
        values, buffers = self._parameters.get("values"), self._buffers
        return (
            self.values if values is None else values,
            buffers["row_ptr"],  # type: ignore[return-value]
            buffers["col_idx"],
            buffers["row_perm"],
            buffers["col_perm"],
        )

    def _explain(self, error: Exception, x: Tensor, residual: Tensor | None = None) -> None:
        """Raise what an op raised in the layer's words, where these say what to do.

        Called when an op has failed: a check before would cost every call.
        """
        where, values = type(self).__name__, self.values
        if x.layout is not torch.strided:
            hint = "" if x.layout is torch.jagged else "; .to_dense() converts it"
            raise ValueError(
                f"{where}: input must be a dense tensor (got {x.layout}{hint})"
            ) from error
        # Of other types the op says which it has kernels for; autocast may have converted them.
        types = DTYPES.get(x.device.type, ())
        if (
            x.dtype is not values.dtype
            and x.dtype in types
            and values.dtype in types
            and not torch.is_autocast_enabled(x.device.type)
        ):
            raise TypeError(
                f"{where}: input must be of the type of the layer's values (got {x.dtype} and "
                f"{values.dtype}); convert it with input.to({values.dtype}), or the layer with "
                f"layer.to({x.dtype})"
            ) from error

    def _bias(self) -> Tensor | None:
        parameters = self._parameters
        return parameters["bias"] if "bias" in parameters else self.bias

    def _sparse_repr(self) -> str:
        """The end of ``extra_repr``: what is stored."""
        bo, bi = self.block
        blocks = math.prod(self._blocking(self.block).grid)
        stored = self.values.shape[0]
        axes = [
            n for n, p in (("rows", self.row_perm), ("columns", self.col_perm)) if p is not None
        ]
        text = (
            f"bias={self.bias is not None}, block={bo}x{bi}, blocks={stored}/{blocks}, "
            f"sparsity={1 - stored / blocks:.1%}, reordered={'+'.join(axes) or 'none'}"
        )
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    def _zero_padding(self) -> None:
        """Clear the entries beyond the edge of the weight."""
        (bo, bi), (out, in_) = self.block, self._blocking(self.block).group_shape
        if (out % bo == 0 and in_ % bi == 0) or self.values.is_meta:
            return
        layout = self.layout
        inside = torch.ones(layout.weight_shape, dtype=torch.bool, device=layout.device)
        with torch.no_grad():
            outside = ~layout.pack(inside)
            if is_sharded(self.values):
                fill(self.values, outside, 0.0)
            elif self.values[outside].count_nonzero():
                # A new tensor: the old one may be the caller's.
                self.values.data = self.values.masked_fill(outside, 0.0)

    # -- state --------------------------------------------------------------------------------

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        names = ("values", *INDEX, "bias")
        found = {n: state_dict[prefix + n] for n in names if prefix + n in state_dict}
        if self._parameters.get("values") is not None and any(n in found for n in INDEX):
            try:
                self._check_sizes(state_dict.get(prefix + "_extra_state"))
                self._check_state(found)
            except (ValueError, TypeError) as error:
                error_msgs.append(
                    f"{type(self).__name__} {prefix.rstrip('.') or '(root)'}: {error}; "
                    "nothing of this layer was loaded"
                )
                return
            self._make_room(found)
        elif "values" not in found and any(
            prefix + dense in state_dict for dense in ("weight", "parametrizations.weight.original")
        ):
            error_msgs.append(
                f"{type(self).__name__} {prefix.rstrip('.') or '(root)'}: the state has a dense "
                "weight; load it into the dense model, then make that sparse (tetris.sparsify, or "
                f"{type(self).__name__}.from_dense). To resume with a pruner, load its state "
                "before the model's, which it makes room for"
            )
        super()._load_from_state_dict(
            state_dict,
            prefix,
            local_metadata,
            strict,
            missing_keys,
            unexpected_keys,
            error_msgs,  # type: ignore[arg-type]
        )
        if "values" in found:
            self._zero_padding()

    def get_extra_state(self) -> Tensor:
        """The sizes, which the index alone does not tell."""
        return torch.tensor(list(self.sizes.values()))

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: a state of other sizes is refused before."""

    def _check_sizes(self, state: Tensor | None) -> None:
        """Raise where a state says that it is of a layer of other sizes."""
        if isinstance(state, Tensor) and not state.is_meta:
            names, sizes = zip(*self.sizes.items(), strict=True)
            if state.tolist() != list(sizes):
                raise ValueError(
                    f"{listed(names)} must be those of the state "
                    f"(got {listed(sizes)}, the state has {listed(state.tolist())})"
                )

    def _check_state(self, found: Mapping[str, Any]) -> None:
        """Raise unless the tensors found make one valid layer of this module's sizes."""
        absent = [n for n in ("values", "row_ptr", "col_idx") if n not in found]
        if absent:
            raise ValueError(
                "values, row_ptr and col_idx only make sense together "
                f"(the state has {', '.join(found)} but not {', '.join(absent)})"
            )
        for name, tensor in found.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor (got {type(tensor).__name__})")
            if tensor.is_meta:
                return  # shapes without contents: nothing to check
        values, bias = found["values"], found.get("bias")
        if values.dim() != 3 or not values.is_floating_point():
            raise ValueError(
                f"values must be a floating [nnzb, bi, bo] (got {values.dtype}{list(values.shape)})"
            )
        if values.shape != self.values.shape:
            check_whole(
                f"values are {list(values.shape)} in the state, {list(self.values.shape)} here",
                [self.values],
                "give the layer the layout of the state before fully_shard (tetris.load)",
            )
        nnzb, bi, bo = values.shape
        layout = self._layout_of((bo, bi), found)
        if layout.nnz_blocks != nnzb:
            raise ValueError(
                "values.size(0) and col_idx must both be nnzb, the stored blocks "
                f"(got {nnzb} and {layout.nnz_blocks})"
            )
        if bias is not None and self.bias is not None and bias.shape != self.bias.shape:
            raise ValueError(f"bias must be [{layout.out_features}] (got {list(bias.shape)})")

    def _make_room(self, found: Mapping[str, Tensor]) -> None:
        """Give parameters and buffers the shapes of the tensors about to be copied in."""
        values, new = self.values, found["values"]
        if values.shape != new.shape:
            values.grad = None
            replace_data(values, values.new_empty(new.shape))
        for name in INDEX:
            index = found.get(name)
            if index is not None:
                index = torch.empty(index.shape, dtype=torch.int32, device=values.device)
            self._buffers[name] = index


Layer = TypeVar("Layer", bound=SparseLayer)


def make_sparse(
    cls: type[Layer],
    module: nn.Module,
    layout: BlockLayout,
    *,
    bias: nn.Parameter | None,
    values: nn.Parameter | None = None,
    activation: Activation = "none",
) -> Layer:
    """Sparse counterpart of a dense layer, with these very Parameter objects in it."""
    weight = cast(Tensor, module.weight)
    result = cls(
        **cls.arguments_of(module),
        bias=bias is not None,
        layout=layout,
        activation=activation,
        device="meta",  # no initial values: they would be drawn from the user's random numbers
    )
    layout = layout.to(weight.device)
    if values is None:
        dense = cls.oriented(weight.detach(), layout.groups)
        values = nn.Parameter(layout.pack(dense), requires_grad=weight.requires_grad)
    result.values = values
    result.bias = bias
    for name in INDEX:
        index = getattr(layout, name)
        result._buffers[name] = None if index is None else index.clone()
    result.train(module.training)
    return result


def make_dense(
    layer: SparseLayer[Dense], *, bias: nn.Parameter | None, weight: nn.Parameter | None = None
) -> Dense:
    """Dense counterpart of a sparse layer, with these very Parameter objects in it."""
    check_whole(
        f"{type(layer).__name__}.to_dense",
        [layer.values],
        "load the full state dict into a layer that is not sharded first",
    )
    result = layer._empty_dense(bias is not None)
    if weight is None:
        layout = layer.layout
        dense = layer.oriented(layout.unpack(layer.values.detach()), layout.groups).contiguous()
        weight = nn.Parameter(dense, requires_grad=layer.values.requires_grad)
    result.weight = weight
    result.bias = bias  # type: ignore[assignment]
    result.train(layer.training)
    return cast(Dense, result)


def _copy(bias: object) -> nn.Parameter | None:
    if not isinstance(bias, Tensor):
        return None
    return nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)


def _check_layout(where: str, layout: object) -> None:
    if not isinstance(layout, BlockLayout):
        hint = "; BlockLayout.from_mask makes one" if isinstance(layout, Tensor) else ""
        raise TypeError(f"{where}: layout must be a BlockLayout (got {describe(layout)}{hint})")
