"""Bayesian networks with shrinkage priors: where to prune is a matter of the posterior.

    network -> posterior (HMC, NUTS) or MAP -> scores -> layouts -> sparse modules

Torch only, but for :func:`sample_nuts`, which needs the extra ``tetris[bayes]``.
"""

from .convergence import Convergence as Convergence
from .convergence import effective_size as effective_size
from .convergence import split_rhat as split_rhat
from .ensemble import Ensemble as Ensemble
from .hmc import hmc as hmc
from .map import MAP as MAP
from .network import BayesianMLP as BayesianMLP
from .nuts import sample_nuts as sample_nuts
from .posterior import Posterior as Posterior
from .posterior import sample_hmc as sample_hmc
from .predict import Predictive as Predictive
from .predict import fgsm as fgsm
from .priors import DirichletHorseshoe as DirichletHorseshoe
from .priors import DirichletStudentT as DirichletStudentT
from .priors import Gaussian as Gaussian
from .priors import Prior as Prior
from .priors import RegularizedHorseshoe as RegularizedHorseshoe
from .scores import block_score as block_score
from .scores import input_score as input_score
from .scores import prune_draws as prune_draws
from .shrinkage import effective_parameters as effective_parameters
from .shrinkage import kappa as kappa
from .weights import Weights as Weights
