"""Learn with a shrinkage prior, prune by the posterior, compute with what is left.

    python examples/dsm.py
    python examples/dsm.py --sampler nuts        # needs the extra tetris[bayes]
    python examples/dsm.py --prior gaussian      # a prior that does not shrink

Breast cancer in 30 measurements: a hidden layer of 16 nodes under a Dirichlet horseshoe prior with
blocks of 4x2 weights. Each block is worth E|W_B| P(|W_B| > t) under the posterior; the best ones
form one layout for all draws. Printed: test accuracy, negative log likelihood and calibration error
of the posterior, of an ensemble of sparse draws, and of their mean, one sparse network.
"""

import argparse
import warnings

import torch
from sklearn.datasets import load_breast_cancer

from tetris import bayes
from tetris.prune import DSMPruner

PRIORS = {
    "gaussian": bayes.Gaussian(),
    "horseshoe": bayes.RegularizedHorseshoe(block=(4, 2)),
    "dirichlet": bayes.DirichletHorseshoe(block=(4, 2)),
}


def main() -> None:
    """Sample, prune, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prior", default="dirichlet", choices=PRIORS)
    parser.add_argument("--sampler", default="hmc", choices=("hmc", "nuts"))
    parser.add_argument("--sparsity", type=float, default=0.75, help="share of blocks to remove")
    parser.add_argument("--draws", type=int, default=150, help="per chain, after as much warm-up")
    parser.add_argument("--tiny", action="store_true", help="too few draws to mean anything")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", "sample_")  # what did not converge is printed below
    draws = 40 if args.tiny else args.draws

    x, y = (torch.from_numpy(part) for part in load_breast_cancer(return_X_y=True))
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, test = order[:400], order[400:]
    x = (x - x[train].mean(0)) / x[train].std(0)

    network = bayes.BayesianMLP((30, 16, 2), PRIORS[args.prior], len(train), "classification")
    settings = {"chains": 1, "warmup": draws, "draws": draws}
    if args.sampler == "nuts":
        depth = 4 if args.tiny else 8
        posterior = bayes.sample_nuts(network, x[train], y[train], max_tree_depth=depth, **settings)
    else:
        posterior = bayes.sample_hmc(network, x[train][None], y[train][None], **settings)[0]
    print(posterior.convergence)

    pruner = DSMPruner(posterior, sparsity=args.sparsity, block=(4, 2))
    pruner.prune()
    print(pruner.report())
    inputs = x[test].float()
    sparse = bayes.Ensemble([pruner.finalize()], "classification")  # of one network
    for name, found in (
        ("posterior", posterior.predict(x[test])),
        ("sparse draws", pruner.ensemble(draws=20).predict(inputs)),
        ("one sparse network", sparse.predict(inputs)),
    ):
        print(
            f"{name:20}accuracy {found.accuracy(y[test]):.3f}  NLL {found.nll(y[test]):.3f}  "
            f"ECE {found.ece(y[test]):.3f}"
        )


if __name__ == "__main__":
    main()
