"""SparseLinear: a drop-in ``nn.Linear`` that stores and computes kept blocks only."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from . import ops
from .checks import DTYPES, check_keywords, check_weight, describe
from .layout import BlockLayout, Importance, SearchOptions, check_matrix, saliency_of, search_layout
from .ops import Activation

if TYPE_CHECKING:
    from typing_extensions import Unpack

_bsmm = torch.ops.tetris.bsmm.default
_ACTIVATIONS = get_args(ops.Activation)
_INDEX = ("row_ptr", "col_idx", "row_perm", "col_perm")


class SparseLinear(nn.Module):
    """Linear layer with a block-sparse weight, ``y = activation(x @ W.T + bias)``.

    Attributes:
        values: Parameter [nnzb, bi, bo], the stored blocks; entries beyond the edge of the weight
            are zero and receive a zero gradient.
        bias: Parameter [out] or None.
        row_ptr, col_idx, row_perm, col_perm: int32 buffers, the layout; permutations may be None.
        in_features, out_features, activation: as passed.

    ``state_dict`` holds values, bias and layout, and loads into a module of any other sparsity,
    block or order with the same features. Such a load is checked as a whole before anything
    changes. It keeps the Parameter objects; an optimizer that has already stepped holds moments of
    the old shape and must be made anew.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Learn a bias.
        layout: Which blocks are stored.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``, applied in the same
            pass.
        device: Where the parameters and the layout go.
        dtype: Type of the parameters: float32, or float64 for checks (slow).

    Values and bias start uniform in ``+-1 / sqrt(inputs an output really sees, on average)``, the
    bound of ``nn.Linear`` for the weights that are there.

    Raises:
        ValueError: the layout is of another size, or the activation is unknown.

    Example:
        >>> sparse = tetris.SparseLinear.from_dense(linear, sparsity=0.9, block=(8, 1))
        >>> y = sparse(x)                           # x: [..., in], y: [..., out]
    """

    values: nn.Parameter
    bias: nn.Parameter | None
    row_ptr: Tensor
    col_idx: Tensor
    row_perm: Tensor | None
    col_perm: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        layout: BlockLayout,
        activation: Activation = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_layout("SparseLinear", layout)
        if dtype is not None and dtype not in DTYPES:
            raise ValueError(
                f"SparseLinear: dtype must be float32, or float64 for checks (got {dtype})"
            )
        if (layout.out_features, layout.in_features) != (out_features, in_features):
            raise ValueError(
                "SparseLinear: layout must be of the layer's size, out x in (got "
                f"{layout.out_features}x{layout.in_features} and {out_features}x{in_features})"
            )
        if activation not in _ACTIVATIONS:
            raise ValueError(
                f"SparseLinear: activation must be one of {', '.join(_ACTIVATIONS)} "
                f"(got {describe(activation)})"
            )
        self.in_features = in_features
        self.out_features = out_features
        self.activation: Activation = activation
        bo, bi = layout.block
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.values = nn.Parameter(torch.empty((layout.nnz_blocks, bi, bo), **factory))
        self.bias = nn.Parameter(torch.empty(out_features, **factory)) if bias else None
        for name in _INDEX:
            index = getattr(layout, name)
            # A copy: the module's buffers may be loaded into, a layout never changes.
            self.register_buffer(
                name, None if index is None else index.clone().to(self.values.device)
            )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw values and bias anew; entries beyond the edge of the weight are zero."""
        stored = self.values.numel() / self.out_features
        bound = 1 / math.sqrt(max(1.0, stored))
        with torch.no_grad():
            self.values.uniform_(-bound, bound)
            if self.bias is not None:
                self.bias.uniform_(-bound, bound)
            self._zero_padding()

    @classmethod
    def from_dense(
        cls,
        module: nn.Linear,
        *,
        layout: BlockLayout | None = None,
        sparsity: float | None = None,
        block: tuple[int, int] = (4, 1),
        importance: Importance | None = None,
        activation: Activation = "none",
        **search: Unpack[SearchOptions],
    ) -> SparseLinear:
        """Keep the blocks of a dense layer that a layout stores; the dense layer is not changed.

        Args:
            module: The dense layer.
            layout: What to store. Either this or ``sparsity``.
            sparsity: Share of blocks to remove; a layout is then searched as by
                :meth:`tetris.BlockLayout.from_dense`.
            block: (bo, bi), with ``sparsity`` only, like all that follow except ``activation``.
            importance: What a weight is worth.
            activation: Function to fuse behind the layer.
            **search: ``reorder``, ``seed``, ``budget``, ``sweeps``, ``balanced`` and
                ``allow_empty_rows``, as :meth:`tetris.BlockLayout.from_dense` explains them.

        Returns:
            The sparse layer, on the device and in the type, mode and ``requires_grad`` of the
            dense one.

        Raises:
            NotImplementedError: a convolution.
            TypeError: not a linear layer.
            ValueError: both or neither of ``layout`` and ``sparsity``, or one that does not fit; a
                weight that no kernel computes with: half precision, another device than the CPU.
        """
        where = "SparseLinear.from_dense"
        if isinstance(module, nn.modules.conv._ConvNd):
            check_matrix(where, "weight", module.weight)
        if not isinstance(module, nn.Linear):
            hint = ""
            if isinstance(module, nn.Module):
                hint = "; tetris.sparsify converts the linear layers of a model"
            raise TypeError(
                f"{where}: module must be an nn.Linear (got {type(module).__name__}{hint})"
            )
        if (layout is None) == (sparsity is None):
            raise ValueError(
                f"{where}: pass either layout= or sparsity= "
                f"(got {'neither' if layout is None else 'both'})"
            )
        check_keywords(where, search, SearchOptions.__annotations__)
        check_weight(where, module.weight)
        if layout is None:
            assert sparsity is not None
            saliency = saliency_of(where, module.weight, importance)
            layout, _ = search_layout(where, saliency, block, sparsity, **search)
        else:
            _check_layout(where, layout)
        bias = module.bias
        if bias is not None:
            bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return sparse_linear(module, layout, bias=bias, activation=activation)

    def to_dense(self) -> nn.Linear:
        """The dense layer with the same weight, zero where nothing is stored.

        Raises:
            ValueError: the layer has a fused activation, which ``nn.Linear`` cannot express.
        """
        if self.activation != "none":
            raise ValueError(
                "SparseLinear.to_dense: nn.Linear has no activation (this layer fuses "
                f"{self.activation!r}); set layer.activation = 'none' and apply the function after "
                "the layer"
            )
        bias = self.bias
        if bias is not None:
            bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return dense_linear(self, bias=bias)

    @property
    def block(self) -> tuple[int, int]:
        """(bo, bi), read from ``values``."""
        return self.values.shape[2], self.values.shape[1]

    @property
    def layout(self) -> BlockLayout:
        """The layout, made from the buffers (and checked) at each access."""
        return BlockLayout(
            self.block,
            self.out_features,
            self.in_features,
            self.row_ptr,
            self.col_idx,
            self.row_perm,
            self.col_perm,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if not isinstance(x, Tensor) or x.dim() == 0:
            raise TypeError(
                "SparseLinear: x must be a tensor [..., in_features], such as "
                f"torch.as_tensor(array) (got {describe(x)})"
            )
        if x.size(-1) != self.in_features:
            raise ValueError(
                "SparseLinear: x.size(-1) must equal in_features "
                f"(got {x.size(-1)} and {self.in_features}; x has shape {list(x.shape)})"
            )
        # NOTE: an attribute that Module.__getattr__ finds costs ten dict items, and an op call is a
        # few microseconds. The attribute is for values that something else provides (parametrize).
        parameters, buffers = self._parameters, self._buffers
        values = parameters.get("values")
        return _bsmm(
            x,
            self.values if values is None else values,
            buffers["row_ptr"],
            buffers["col_idx"],
            buffers["row_perm"],
            buffers["col_perm"],
            parameters["bias"] if "bias" in parameters else self.bias,
            self.out_features,
            self.activation,
        )

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        bo, bi = self.block
        blocks = math.ceil(self.out_features / bo) * math.ceil(self.in_features / bi)
        stored = self.values.shape[0]
        axes = [
            n for n, p in (("rows", self.row_perm), ("columns", self.col_perm)) if p is not None
        ]
        text = (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, block={bo}x{bi}, blocks={stored}/{blocks}, "
            f"sparsity={1 - stored / blocks:.1%}, reordered={'+'.join(axes) or 'none'}"
        )
        return text if self.activation == "none" else f"{text}, activation={self.activation}"

    def _zero_padding(self) -> None:
        """Clear the entries beyond the edge of the weight."""
        bo, bi = self.block
        if (self.out_features % bo == 0 and self.in_features % bi == 0) or self.values.is_meta:
            return
        layout = self.layout
        inside = torch.ones(
            (self.out_features, self.in_features), dtype=torch.bool, device=self.values.device
        )
        with torch.no_grad():
            outside = ~layout.pack(inside)
            if self.values[outside].count_nonzero():
                # A new tensor: the old one may be the caller's.
                self.values.data = self.values.masked_fill(outside, 0.0)

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
        names = ("values", *_INDEX, "bias")
        found = {n: state_dict[prefix + n] for n in names if prefix + n in state_dict}
        if self._parameters.get("values") is not None and any(n in found for n in _INDEX):
            try:
                self._check_features(state_dict.get(prefix + "_extra_state"))
                self._check_state(found)
            except (ValueError, TypeError) as error:
                error_msgs.append(
                    f"SparseLinear {prefix.rstrip('.') or '(root)'}: {error}; "
                    "nothing of this layer was loaded"
                )
                return
            self._make_room(found)
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
        """The features, which the index alone does not tell: ``[out_features, in_features]``."""
        return torch.tensor([self.out_features, self.in_features])

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing: a state of other features is refused before."""

    def _check_features(self, state: Tensor | None) -> None:
        """Raise where a state says that it is of a layer with other features."""
        if isinstance(state, Tensor) and not state.is_meta:
            features = state.tolist()
            if features != [self.out_features, self.in_features]:
                raise ValueError(
                    "out_features and in_features must be those of the state "
                    f"(got {self.out_features} and {self.in_features}, the state has "
                    f"{' and '.join(map(str, features))})"
                )

    def _check_state(self, found: Mapping[str, Any]) -> None:
        """Raise unless the tensors found make one valid layer of this module's features."""
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
        nnzb, bi, bo = values.shape
        layout = BlockLayout(
            (bo, bi),
            self.out_features,
            self.in_features,
            found["row_ptr"],
            found["col_idx"],
            found.get("row_perm"),
            found.get("col_perm"),
        )
        if layout.nnz_blocks != nnzb:
            raise ValueError(
                "values.size(0) and col_idx must both be nnzb, the stored blocks "
                f"(got {nnzb} and {layout.nnz_blocks})"
            )
        if bias is not None and self.bias is not None and bias.shape != self.bias.shape:
            raise ValueError(f"bias must be [{self.out_features}] (got {list(bias.shape)})")

    def _make_room(self, found: Mapping[str, Tensor]) -> None:
        """Give parameters and buffers the shapes of the tensors about to be copied in."""
        values, new = self.values, found["values"]
        if values.shape != new.shape:
            values.data = torch.empty(new.shape, dtype=values.dtype, device=values.device)
            values.grad = None
        for name in _INDEX:
            index = found.get(name)
            if index is not None:
                index = torch.empty(index.shape, dtype=torch.int32, device=values.device)
            self._buffers[name] = index


def _check_layout(where: str, layout: object) -> None:
    if not isinstance(layout, BlockLayout):
        hint = "; BlockLayout.from_mask makes one" if isinstance(layout, Tensor) else ""
        raise TypeError(f"{where}: layout must be a BlockLayout (got {describe(layout)}{hint})")


# -- used by the model-level functions, which share parameters instead of copying them -------------


def sparse_linear(
    module: nn.Linear,
    layout: BlockLayout,
    *,
    bias: nn.Parameter | None,
    values: nn.Parameter | None = None,
    activation: Activation = "none",
) -> SparseLinear:
    """Sparse counterpart of a dense layer, with these very Parameter objects in it."""
    weight = module.weight
    result = SparseLinear(
        module.in_features,
        module.out_features,
        bias=bias is not None,
        layout=layout,
        activation=activation,
        device="meta",  # no initial values: they would be drawn from the user's random numbers
    )
    layout = layout.to(weight.device)
    if values is None:
        values = nn.Parameter(layout.pack(weight.detach()), requires_grad=weight.requires_grad)
    result.values = values
    result.bias = bias
    for name in _INDEX:
        index = getattr(layout, name)
        result._buffers[name] = None if index is None else index.clone()
    result.train(module.training)
    return result


def dense_linear(
    module: SparseLinear, *, bias: nn.Parameter | None, weight: nn.Parameter | None = None
) -> nn.Linear:
    """Dense counterpart of a sparse layer, with these very Parameter objects in it."""
    result = nn.Linear(
        module.in_features, module.out_features, bias=bias is not None, device="meta"
    )
    if weight is None:
        dense = module.layout.unpack(module.values.detach())
        weight = nn.Parameter(dense, requires_grad=module.values.requires_grad)
    result.weight = weight
    result.bias = bias  # type: ignore[assignment]
    result.train(module.training)
    return result
