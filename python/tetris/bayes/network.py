"""A Bayesian multilayer perceptron: from one flat vector to weights, prior and likelihood."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, nn

from ..checks import describe
from .data import check_count
from .laws import InverseGamma
from .priors import Gaussian, Prior, Scale, Shrinkage
from .weights import Activation, Task, Weights

NOISE = "noise"
NOISE_LAW = InverseGamma(3.0, 2.0)


@dataclass(frozen=True)
class BayesianMLP:
    r"""Layers ``x -> activation(W x + b)``, the last without activation, and what is known of them.

    A state is a vector theta [..., size] of unconstrained numbers: per layer z (see
    :mod:`tetris.bayes.priors`), the logarithms of the prior's scales and the biases, and for
    regression the logarithm of the noise. Leading dimensions are chains, data sets or draws.

    * regression: ``y ~ N(f(x), s^2)``, ``s ~ InvGamma(3, 2)``;
    * classification: ``y ~ Categorical(softmax(f(x)))``.

    Args:
        sizes: Inputs, hidden widths, outputs (classes, of classification).
        prior: Prior of the first weight, or of as many as are passed; others are N(0, 1), and so
            are biases, as in the authors' models. With wide layers pass ``Gaussian(sd)`` for these.
        samples: Number of data points, which the horseshoes' tau0 needs.
        task: ``"regression"`` or ``"classification"``.
        activation: ``"tanh"`` or ``"relu"``.

    Raises:
        ValueError: a setting out of its range, such as a horseshoe's p0 against its inputs.

    Example:
        >>> network = BayesianMLP((30, 16, 2), DirichletHorseshoe(), 400, "classification")
        >>> theta = network.start(torch.Generator().manual_seed(0), 4)   # [4, network.size]
        >>> network.log_joint(theta, x, y).shape
        torch.Size([4])
    """

    sizes: tuple[int, ...]
    prior: Prior | Sequence[Prior]
    samples: int
    task: Task = "regression"
    activation: Activation = "tanh"
    priors: tuple[Prior, ...] = field(init=False, repr=False)
    slots: Mapping[str, tuple[slice, tuple[int, ...]]] = field(init=False, repr=False)
    normal: int = field(init=False, repr=False)  # theta[:normal] is N(0, 1) before data
    size: int = field(init=False)

    def __post_init__(self) -> None:
        where = "BayesianMLP"
        if not isinstance(self.sizes, Sequence) or len(self.sizes) < 2:
            raise ValueError(
                f"{where}: sizes must be inputs, hidden widths and outputs, such as (10, 16, 1) "
                f"(got {describe(self.sizes)})"
            )
        sizes = tuple(check_count(where, "each of sizes", size, 1) for size in self.sizes)
        for name, value, known in (
            ("task", self.task, ("regression", "classification")),
            ("activation", self.activation, ("tanh", "relu")),
        ):
            if value not in known:
                raise ValueError(
                    f"{where}: {name} must be {known[0]!r} or {known[1]!r} (got {describe(value)})"
                )
        if self.task == "classification" and sizes[-1] < 2:
            raise ValueError(
                f"{where}: classification needs two outputs or more, one per class "
                f"(got {sizes[-1]}); two classes are two outputs"
            )
        samples = check_count(where, "samples, the number of data points,", self.samples, 1)
        given: tuple[Prior, ...] = (
            (self.prior,) if isinstance(self.prior, Prior) else _as_tuple(self.prior)
        )
        layers = len(sizes) - 1
        if not 1 <= len(given) <= layers or not all(isinstance(p, Prior) for p in given):
            raise ValueError(
                f"{where}: prior must be a Prior, or one for each of the first layers, of which "
                f"there are {layers} (got {describe(self.prior)})"
            )
        priors = given + (Gaussian(1.0),) * (layers - len(given))
        slots: dict[str, tuple[slice, tuple[int, ...]]] = {}
        end = 0

        def place(name: str, shape: tuple[int, ...]) -> None:
            nonlocal end
            slots[name] = (slice(end, end + math.prod(shape)), shape)
            end += math.prod(shape)

        for index, prior in enumerate(priors):
            in_, out = sizes[index], sizes[index + 1]
            prior.check(where, in_)
            place(f"{index}.z", (out, in_))
            place(f"{index}.bias", (out,))
        normal = end
        for index, prior in enumerate(priors):
            for name, scale in prior.scales(sizes[index + 1], sizes[index]).items():
                place(f"{index}.{name}", scale.shape)
        if self.task == "regression":
            place(NOISE, (1,))
        made = {
            "sizes": sizes,
            "samples": samples,
            "priors": priors,
            "slots": slots,
            "normal": normal,
            "size": end,
        }
        for name, value in made.items():
            object.__setattr__(self, name, value)

    @property
    def layers(self) -> int:
        """Number of weight matrices."""
        return len(self.priors)

    def scales(self) -> dict[str, Scale]:
        """Name -> scale, of all layers and the noise, named as in :attr:`slots`."""
        result = {
            f"{index}.{name}": scale
            for index, prior in enumerate(self.priors)
            for name, scale in prior.scales(*self.shape(index)).items()
        }
        if self.task == "regression":
            result[NOISE] = Scale((1,), NOISE_LAW)
        return result

    def shape(self, index: int) -> tuple[int, int]:
        """(out, in) of a layer."""
        return self.sizes[index + 1], self.sizes[index]

    def get(self, theta: Tensor, name: str) -> Tensor:
        """A part of theta, [..., *shape], a view."""
        where, shape = self.slots[name]
        return theta[..., where].view(*theta.shape[:-1], *shape)

    def unpack(self, theta: Tensor) -> dict[str, Tensor]:
        """All parts of theta: :meth:`get` of each name, with one node of a gradient's graph."""
        if theta.shape[-1:] != (self.size,):
            raise ValueError(
                f"BayesianMLP: theta must be [..., {self.size}] (got {list(theta.shape)})"
            )
        flat = theta.split([math.prod(shape) for _, shape in self.slots.values()], -1)
        return {
            name: part.view(*theta.shape[:-1], *shape)
            for (name, (_, shape)), part in zip(self.slots.items(), flat, strict=True)
        }

    def pack(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Theta [..., size] of its parts [..., *shape]: the inverse of :meth:`get`."""
        flat = [
            parts[name].flatten(parts[name].dim() - len(shape))
            for name, (_, shape) in self.slots.items()
        ]
        return torch.cat(flat, -1)

    def start(
        self,
        generator: torch.Generator,
        *batch: int,
        dtype: torch.dtype = torch.float64,
        spread: float = 0.5,
    ) -> Tensor:
        """Random states [*batch, size] from which to sample or to descend.

        tau starts at one instead of tau0, so that weights have about the size that networks start
        with; at tau0 a wide layer's would be too small for gradients to reach the ones before it.

        Args:
            generator: Random numbers.
            *batch: Leading dimensions.
            dtype: Of the result.
            spread: Standard deviation of the logarithms of scales around their start; 0 has the
                inputs of a node start alike, apart from z.
        """
        theta = torch.randn((*batch, self.size), generator=generator, dtype=dtype)
        for name in self.scales():
            self.get(theta, name).mul_(spread)
        for index, prior in enumerate(self.priors):
            if isinstance(prior, Shrinkage):
                in_ = self.sizes[index]
                self.get(theta, f"{index}.tau").sub_(prior.log_tau0(in_, self.samples))
        return theta

    def prior_variance(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """Variance [size] of theta before data, the first metric of samplers."""
        result = torch.ones(self.size, dtype=dtype)
        for name, scale in self.scales().items():
            result[self.slots[name][0]] = scale.law.variance
        return result

    def log_sd(self, theta: Tensor, index: int) -> Tensor | float:
        """Log prior standard deviation of a layer's weights given its scales."""
        return self._log_sd(self.unpack(theta), index)

    def _log_sd(self, parts: Mapping[str, Tensor], index: int) -> Tensor | float:
        prior, shape = self.priors[index], self.shape(index)
        logs = {name: parts[f"{index}.{name}"] for name in prior.scales(*shape)}
        return prior.log_sd(logs, *shape, self.samples)

    def weights(self, theta: Tensor) -> Weights:
        """Weights, biases and noise of states; differentiable."""
        return self._weights(self.unpack(theta))

    def _weights(self, parts: Mapping[str, Tensor]) -> Weights:
        layers = []
        for index in range(self.layers):
            log_sd = self._log_sd(parts, index)
            sd = math.exp(log_sd) if not isinstance(log_sd, Tensor) else log_sd.exp()
            layers.append((parts[f"{index}.z"] * sd, parts[f"{index}.bias"]))
        noise = parts[NOISE].exp().squeeze(-1) if self.task == "regression" else None
        return Weights(tuple(layers), noise, self.task, self.activation)

    def log_prior(self, theta: Tensor) -> Tensor:
        """Log density [...] of theta before data, normalized."""
        return self._log_prior(theta, self.unpack(theta))

    def _log_prior(self, theta: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
        normal = theta[..., : self.normal]
        result = -0.5 * normal.square().sum(-1) - 0.5 * self.normal * math.log(2 * math.pi)
        for name, scale in self.scales().items():
            part = parts[name].flatten(theta.dim() - 1)
            result = result + scale.law.log_density(part).sum(-1)
        return result

    def log_likelihood(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Log likelihood [..., N] of each point; x [..., N, in] and y [..., N] broadcast."""
        weights = self.weights(theta)
        return weights.log_likelihood(weights(x), y)

    def log_joint(self, theta: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Log of prior times likelihood of all points, [...]."""
        parts = self.unpack(theta)
        weights = self._weights(parts)
        return self._log_prior(theta, parts) + weights.log_likelihood(weights(x), y).sum(-1)

    def module(self, weights: Weights) -> nn.Sequential:
        """An ordinary float32 network with these weights, of one state: ``linear1 tanh1 ...``."""
        made: OrderedDict[str, nn.Module] = OrderedDict()
        for index, (weight, bias) in enumerate(weights.layers):
            if weight.dim() != 2:
                raise ValueError(
                    "BayesianMLP.module: the weights of one state are needed "
                    f"(got shape {list(weight.shape)}); take a draw or the mean"
                )
            out, in_ = weight.shape
            layer = nn.Linear(in_, out)
            with torch.no_grad():
                layer.weight.copy_(weight)
                layer.bias.copy_(bias)
            made[layer_name(index)] = layer
            if index < self.layers - 1:
                made[f"{self.activation}{index + 1}"] = _MODULES[self.activation]()
        return nn.Sequential(made)


def _as_tuple(priors: Sequence[Prior]) -> tuple[Prior, ...]:
    """What was passed for priors; what is none becomes one, for the check to tell."""
    return tuple(priors) if isinstance(priors, (list, tuple)) else (priors,)  # type: ignore[return-value]


def layer_name(index: int) -> str:
    """Name in :meth:`BayesianMLP.module` of the layer with this index."""
    return f"linear{index + 1}"


_MODULES: dict[Literal["tanh", "relu"], type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
