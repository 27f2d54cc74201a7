"""Priors of a weight matrix: Gaussian, regularized horseshoe, Dirichlet scale mixtures.

All are non-centred, ``W = exp(log_sd) * z`` with ``z ~ N(0, 1)``: what the scales are is the prior.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_block, describe
from .data import check_positive
from .laws import Gamma, HalfCauchy, HalfStudentT, InverseGamma, Law


@dataclass(frozen=True)
class Scale:
    """Positive variables of a prior.

    Attributes:
        shape: Of the tensor.
        law: Of each entry; entries are independent.
    """

    shape: tuple[int, ...]
    law: Law


class Prior(ABC):
    """Prior of a weight [out, in], ``W = exp(log_sd) * z`` with ``z ~ N(0, 1)``.

    A prior of your own says which :meth:`scales` it has, if any, and how they make standard
    deviations, :meth:`log_sd`. It is for :func:`sample_hmc` and :class:`MAP`; numpyro knows those
    below.

    Example:
        >>> class FanIn(Prior):
        ...     def log_sd(self, logs, out, in_, samples):
        ...         return -0.5 * math.log(in_)                     # w ~ N(0, 1 / in)
        >>> network = BayesianMLP((8, 16, 1), [FanIn(), FanIn()], samples=40)
    """

    def scales(self, out: int, in_: int) -> dict[str, Scale]:
        """Name -> positive variables that the standard deviations are made of."""
        return {}

    @abstractmethod
    def log_sd(
        self, logs: Mapping[str, Tensor], out: int, in_: int, samples: int
    ) -> Tensor | float:
        """Log standard deviation of the weights given the scales.

        Args:
            logs: name -> logarithms [..., *shape] of :meth:`scales`.
            out: Outputs.
            in_: Inputs.
            samples: Data points that the network learns from.

        Returns:
            What broadcasts to [..., out, in].
        """

    def check(self, where: str, in_: int) -> None:  # noqa: B027 (most exist for any size)
        """Raise ValueError if the prior does not exist for so many inputs."""


@dataclass(frozen=True)
class Gaussian(Prior):
    """w ~ N(0, sd^2), by default of sd ``1 / sqrt(out)``.

    Args:
        sd: Standard deviation of all weights.

    Raises:
        ValueError: sd is not positive.

    Example:
        >>> network = BayesianMLP((8, 1024, 1), [Gaussian(), Gaussian(1 / 32)], samples=40)
    """

    sd: float | None = None

    def __post_init__(self) -> None:
        if self.sd is not None:
            check_positive("Gaussian", sd=self.sd)

    def log_sd(self, logs: Mapping[str, Tensor], out: int, in_: int, samples: int) -> float:
        """See :meth:`Prior.log_sd`."""
        return -0.5 * math.log(out) if self.sd is None else math.log(self.sd)


@dataclass(frozen=True)
class Shrinkage(Prior):
    r"""What the horseshoes share: a global scale, local scales and a slab that bounds them.

    * ``tau ~ C+(0, tau0)`` with ``tau0 = p0 / (in - p0) / sqrt(samples)``; stored in units of tau0;
    * ``c_J^2 ~ InvGamma(*slab)`` for each row of blocks J;
    * ``lt^2 = c^2 lambda^2 / (c^2 + tau^2 lambda^2)`` from local scales lambda.

    (Piironen and Vehtari, "Sparsity information and regularization in the horseshoe and other
    shrinkage priors", 2017, section 3.)

    Args:
        p0: How many inputs are thought to matter; fewer than there are.
        slab: Shape and scale of the inverse gamma law of c^2.
        block: (bo, bi), the weights that share scales; (1, 1) is the prior of the paper.
    """

    p0: float = 4.0
    slab: tuple[float, float] = (2.0, 4.0)
    block: tuple[int, int] = (1, 1)

    def __post_init__(self) -> None:
        where = type(self).__name__
        if not (isinstance(self.slab, (tuple, list)) and len(self.slab) == 2):
            raise ValueError(
                f"{where}: slab must be shape and scale of an inverse gamma law, such as (2, 4) "
                f"(got {describe(self.slab)})"
            )
        check_positive(where, p0=self.p0, slab_shape=self.slab[0], slab_scale=self.slab[1])
        object.__setattr__(self, "block", check_block(where, self.block))

    def check(self, where: str, in_: int) -> None:
        """See :meth:`Prior.check`."""
        if in_ <= self.p0:
            raise ValueError(
                f"{where}: {type(self).__name__} needs more inputs than p0, the number thought to "
                f"matter (got {in_} and {self.p0:g}); pass a smaller p0"
            )

    def grid(self, out: int, in_: int) -> tuple[int, int]:
        """Blocks along out and in."""
        return -(-out // self.block[0]), -(-in_ // self.block[1])

    def log_tau0(self, in_: int, samples: int) -> float:
        """Log of the scale of tau."""
        return math.log(self.p0 / (in_ - self.p0)) - 0.5 * math.log(samples)

    def _log_local(self, logs: Mapping[str, Tensor], in_: int, samples: int) -> Tensor:
        """log(tau * lt), [..., *shape of lambda]."""
        tau = self.log_tau0(in_, samples) + logs["tau"]
        local, slab = logs["lambda"], logs["c2"]
        tau = tau.view(*tau.shape[:-1], *[1] * (local.dim() - tau.dim() + 1))
        slab = slab.view(*slab.shape, *[1] * (local.dim() - slab.dim()))
        both = tau + local
        # lt^2 tau^2 = c^2 s / (c^2 + s) with s = (tau lambda)^2
        return both + 0.5 * (slab - torch.logaddexp(slab, 2 * both))

    def _expand(self, blocks: Tensor, out: int, in_: int) -> Tensor:
        """[..., G, C] to [..., out, in]; axes of size one are left to broadcasting."""
        for axis, size, step in ((-2, out, self.block[0]), (-1, in_, self.block[1])):
            if step > 1 and blocks.shape[axis] > 1:
                blocks = blocks.repeat_interleave(step, axis).narrow(axis, 0, size)
        return blocks


@dataclass(frozen=True)
class RegularizedHorseshoe(Shrinkage):
    """Regularized horseshoe: ``w_ji ~ N(0, tau^2 lt_ji^2)``, ``lambda_ji ~ C+(0, 1)`` per block.

    * ``tau ~ C+(0, tau0)`` with ``tau0 = p0 / (in - p0) / sqrt(samples)``;
    * ``lt^2 = c^2 lambda^2 / (c^2 + tau^2 lambda^2)``, ``c_J^2 ~ InvGamma(*slab)`` for each row of
      blocks J.

    (Piironen and Vehtari, "Sparsity information and regularization in the horseshoe and other
    shrinkage priors", Electronic Journal of Statistics 2017.)

    Args:
        p0: How many inputs are thought to matter; fewer than there are.
        slab: Shape and scale of the inverse gamma law of c^2.
        block: (bo, bi), the weights that share a lambda; (1, 1) is the prior of the paper.

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> prior = RegularizedHorseshoe(p0=4, block=(4, 2))
        >>> network = BayesianMLP((8, 16, 1), prior, samples=40)
    """

    def scales(self, out: int, in_: int) -> dict[str, Scale]:
        """See :meth:`Prior.scales`."""
        rows, columns = self.grid(out, in_)
        return {
            "tau": Scale((1,), HalfCauchy()),
            "lambda": Scale((rows, columns), HalfCauchy()),
            "c2": Scale((rows,), InverseGamma(*self.slab)),
        }

    def log_sd(self, logs: Mapping[str, Tensor], out: int, in_: int, samples: int) -> Tensor:
        """See :meth:`Prior.log_sd`."""
        return self._expand(self._log_local(logs, in_, samples), out, in_)


@dataclass(frozen=True)
class DirichletHorseshoe(Shrinkage):
    r"""DHS: the inputs of a node share its variance, ``w_ji ~ N(0, tau^2 lt_j^2 phi_ji)``.

    ``lambda_j ~ C+(0, 1)`` and ``phi_j ~ Dirichlet(alpha, ..., alpha)`` over inputs. With blocks,
    lambda and c^2 are of a row of blocks and phi is over blocks of inputs: a weight of block (J, I)
    has variance ``tau^2 lt_J^2 phi_JI / bi``, so that a node's total variance is that of 1x1
    blocks. (Arnstad et al., "Dirichlet scale mixture priors for Bayesian neural networks",
    arXiv 2602.19859, after the authors' Stan files. Their regression file divides by
    ``sqrt(in)`` once more, unlike their Student t one; we use the form above for both.)

    phi is made of gammas, ``phi = softmax(v)`` with ``exp(v_i) ~ Gamma(alpha, 1)``: exact, and
    without the corners of the simplex where a density with alpha < 1 is infinite.

    Args:
        p0: See :class:`RegularizedHorseshoe`, as for tau and the slab.
        slab: Likewise.
        block: (bo, bi), the weights that share a phi; (1, 1) is the prior of the paper.
        alpha: Concentration; below one, few inputs get most of the variance.

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> prior = DirichletHorseshoe(p0=8, block=(16, 16), alpha=0.1)
        >>> network = BayesianMLP((64, 256, 10), prior, 400, "classification", "relu")
    """

    alpha: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(type(self).__name__, alpha=self.alpha)

    def local(self) -> Law:
        """Law of lambda."""
        return HalfCauchy()

    def scales(self, out: int, in_: int) -> dict[str, Scale]:
        """See :meth:`Prior.scales`."""
        rows, columns = self.grid(out, in_)
        return {
            "tau": Scale((1,), HalfCauchy()),
            "lambda": Scale((rows,), self.local()),
            "c2": Scale((rows,), InverseGamma(*self.slab)),
            "gamma": Scale((rows, columns), Gamma(self.alpha)),
        }

    def log_sd(self, logs: Mapping[str, Tensor], out: int, in_: int, samples: int) -> Tensor:
        """See :meth:`Prior.log_sd`."""
        local = self._log_local(logs, in_, samples)
        share = F.log_softmax(logs["gamma"], -1) - math.log(self.block[1])
        return self._expand(local.unsqueeze(-1) + 0.5 * share, out, in_)


@dataclass(frozen=True)
class DirichletStudentT(DirichletHorseshoe):
    """DST: :class:`DirichletHorseshoe` with ``lambda_j ~ half-t(df)``, whose tail is lighter.

    Args:
        p0: See :class:`RegularizedHorseshoe`.
        slab: Likewise.
        block: See :class:`DirichletHorseshoe`.
        alpha: Likewise.
        df: Degrees of freedom.

    Raises:
        ValueError: a setting out of its range.

    Example:
        >>> network = BayesianMLP((8, 16, 1), DirichletStudentT(df=3.0), samples=40)
    """

    df: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_positive(type(self).__name__, df=self.df)

    def local(self) -> Law:
        """Law of lambda."""
        return HalfStudentT(self.df)
