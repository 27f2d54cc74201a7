"""What the examples in docstrings may use without making it: a small namespace for each of them.

An example shows the call, not how to make a network. It sees its module's own names, those of
:func:`common`, and what the function that :data:`SETUPS` has for it returns. Networks are tiny, so
that all examples together take seconds.
"""

import itertools
from collections import OrderedDict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

import tetris
from tetris import bayes

# Those that cannot run here, and why.
NOT_RUN = {
    "tetris.data.external.cifar10": "downloads",
    "tetris.data.external.hugging_face": "downloads",
    "tetris.data.external.image_folder": "needs a folder of images, and torchvision",
}


def common():
    """A classifier of 64 numbers, its data, and the usual modules."""
    torch.manual_seed(0)
    model = nn.Sequential(
        OrderedDict(fc=nn.Linear(64, 64), relu=nn.ReLU(), classifier=nn.Linear(64, 10))
    )
    batches = [(torch.randn(16, 64), torch.randint(0, 10, (16,))) for _ in range(2)]
    return {
        "F": F,
        "bayes": bayes,
        "itertools": itertools,
        "nn": nn,
        "tetris": tetris,
        "torch": torch,
        "model": model,
        "weight": torch.randn(64, 64),
        "saliency": torch.rand(64, 64),
        "bias": torch.randn(64),
        "x": torch.randn(16, 64),
        "target": torch.randint(0, 10, (16,)),
        "batches": batches,
        "loader": batches,
        "criterion": F.cross_entropy,
        "optimizer": torch.optim.SGD(model.parameters(), 0.1),
    }


class Residual(nn.Module):
    """A stem, a residual block and a head."""

    def __init__(self):
        super().__init__()
        self.stem, self.conv1 = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 3, padding=1)
        self.norm = nn.BatchNorm2d(32)
        self.conv2, self.head = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 16, 1)

    def forward(self, x):
        x = F.relu(self.stem(x))
        return self.head(x + self.conv2(F.relu(self.norm(self.conv1(x)))))


def residual():
    return {"model": Residual(), "images": torch.randn(2, 16, 8, 8)}


def channels():
    """Convolutions with names, and images for them."""
    model = nn.Sequential(
        OrderedDict(
            conv1=nn.Conv2d(3, 16, 3, padding=1),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(16, 16, 3, padding=1),
            relu2=nn.ReLU(),
            conv5=nn.Conv2d(16, 16, 3, padding=1),
            relu5=nn.ReLU(),
            conv9=nn.Conv2d(16, 16, 3, padding=1),
            relu9=nn.ReLU(),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            classifier=nn.Linear(16, 10),
        )
    )
    return {
        "model": model,
        "conv2": model.conv2,
        "optimizer": torch.optim.SGD(model.parameters(), 0.01),
        "loader": [(torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))) for _ in range(2)],
    }


def synaptic():
    model = nn.Sequential(
        OrderedDict(
            stem=nn.Conv2d(3, 16, 3, padding=1),
            bn0=nn.BatchNorm2d(16),
            relu0=nn.ReLU(),
            conv1=nn.Conv2d(16, 32, 3, padding=1),
            bn1=nn.BatchNorm2d(32),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(32, 32, 3, padding=1),
            pool=nn.AdaptiveAvgPool2d(1),
            flat=nn.Flatten(),
            classifier=nn.Linear(32, 10),
        )
    )
    unused = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    return {
        "model": model,
        "batches": [(torch.randn(8, 3, 8, 8), torch.randint(0, 10, (8,))) for _ in range(2)],
        "steps": 2,
        "schedule": torch.optim.lr_scheduler.ConstantLR(unused),
    }


def parameter_groups():
    made = synaptic()
    made["pruner"] = tetris.prune.SynapticPruner(
        made["model"],
        sparsity=0.9,
        block=(8, 8),
        exclude=["stem", "classifier"],
        lr_sum=1.0,
    )
    return made


def gan():
    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 16))
    discriminator = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    return {
        "generator": generator,
        "discriminator": discriminator,
        "batches": [torch.randn(8, 16) for _ in range(2)],
    }


def images_to_images():
    generator = nn.Conv2d(3, 3, 3, padding=1)
    other = nn.Conv2d(3, 3, 3, padding=1)

    class Pruner:  # the example is about tasks; what the pruner does is another's
        def loss(self, real, inputs, *conditions):
            return torch.zeros(())

    return {
        "generator": generator,
        "other": other,
        "images": torch.randn(2, 3, 8, 8),
        "labels": torch.tensor([0, 1]),
        "wanted": torch.tensor([1, 0]),
        "pruner": Pruner(),
    }


def network():
    torch.manual_seed(0)
    return {"x": torch.randn(400, 30, dtype=torch.float64), "y": torch.randint(0, 2, (400,))}


def regression():
    """Two networks and data, with samplers that are cut short."""
    torch.manual_seed(0)
    x = torch.randn(100, 3, dtype=torch.float64)
    made = {"x": x, "y": x.sum(1), "test_x": x[:20], "test_y": x[:20].sum(1)}
    made["network"] = bayes.BayesianMLP((3, 8, 1), bayes.Gaussian(), 100)
    made["smaller"] = bayes.BayesianMLP((3, 8, 1), bayes.Gaussian(), 80)
    return made | {"sample_hmc": short(bayes.sample_hmc, warmup=20, draws=4, steps=3)}


def short(call, **settings):
    """The function as the example calls it, but with fewer iterations."""
    return lambda *args, **kwargs: call(*args, **{**kwargs, **settings})


def classes():
    torch.manual_seed(0)
    return {"x": torch.randn(64, 64), "y": torch.randint(0, 10, (64,))}


def chain():
    torch.manual_seed(0)
    x = torch.randn(40, 8)
    model = bayes.BayesianMLP((8, 16, 1), bayes.Gaussian(), 40)

    class Samplers:
        sample_nuts = staticmethod(
            lambda network, x, y: bayes.sample_hmc(
                network, x[None], y[None], warmup=20, draws=20, steps=3
            )[0]
        )

    return {"network": model, "x": x, "y": x.sum(1), "bayes": Samplers}


def drawn():
    """A network of 8, 16 and 1 nodes, 40 points, and draws of two chains."""
    made = chain()
    x, y = made["x"], made["y"]
    found = bayes.sample_hmc(made["network"], x[None], y[None], warmup=20, draws=20, steps=3)
    return {**made, "posterior": found[0]}


def by_nuts():
    made = drawn()  # by HMC: jax compiles NUTS for most of a minute
    return {**made, "sample_nuts": lambda *args, **kwargs: made["posterior"]}


def ensemble():
    made = chain()
    posterior = made["bayes"].sample_nuts(made["network"], made["x"], made["y"])
    pruner = tetris.prune.DSMPruner(posterior.chain(0), sparsity=0.5, block=(4, 2))
    pruner.prune()
    return {**made, "pruner": pruner}


def convolution(conv, *sizes):
    x = torch.randn(*sizes)
    made = {"conv": conv, "x": x}
    if not isinstance(conv, nn.ConvTranspose2d):
        made["residual"] = torch.randn_like(conv(x))
    return made


def gpt2():
    from transformers.pytorch_utils import Conv1D

    block = SimpleNamespace(mlp=SimpleNamespace(c_fc=Conv1D(128, 64)))
    return {"gpt2": SimpleNamespace(h=[block])}


def slow_enough():
    layers = OrderedDict(fc=nn.Linear(512, 512), relu=nn.ReLU(), classifier=nn.Linear(512, 10))
    return {"model": nn.Sequential(layers)}


def analyzed():
    """Layers of 256 inputs, wide enough to gain, and a classifier."""
    layers = OrderedDict(fc=nn.Linear(256, 512), relu=nn.ReLU(), classifier=nn.Linear(512, 10))
    return {"model": nn.Sequential(layers), "x": torch.randn(256, 256)}


def linear():
    return {"linear": nn.Linear(64, 64)}


def stored():
    layer = tetris.SparseLinear.from_dense(nn.Linear(64, 64), sparsity=0.9, block=(8, 8))
    return {"sparse": layer, "optimizer": torch.optim.SGD(layer.parameters(), 0.1, momentum=0.9)}


def saved():
    common_names = common()

    def build_dense_model():
        return common()["model"]

    sparse = tetris.sparsify(common_names["model"], sparsity=0.9, exclude="classifier")
    tetris.save(sparse, "model.safetensors")
    return {"sparse": sparse, "build_dense_model": build_dense_model}


def layout():
    return {"layout": tetris.BlockLayout.from_dense(torch.randn(64, 64), (8, 8), 0.9)}


def frechet():
    return {
        "features": lambda images: images.flatten(1)[:, :4],
        "generator": lambda latent: latent,
        "images": torch.randn(64, 16),
        "latent": torch.randn(64, 16),
    }


def pictures():
    def draw(z):
        return torch.rand(len(z), 1, 8, 8)

    return {"generator": draw, "sparse": draw, "z": torch.randn(4, 2)}


def fused():
    model = nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(16, 16, 3),
            bn=nn.BatchNorm2d(16),
            relu=nn.ReLU(),
            flat=nn.Flatten(),
            fc=nn.Linear(16 * 36, 10),
        )
    )
    return {"model": model}


def one_convolution():
    return {"model": nn.Sequential(nn.Conv2d(3, 16, 3, stride=16), nn.Conv2d(16, 16, 3))}


def convolved():
    return {
        "weight": torch.randn(32, 16, 3, 3),
        "x": torch.randn(2, 16, 8, 8),
        "bias": torch.randn(32),
    }


def wide():
    return {"model": nn.Sequential(nn.Linear(512, 256), nn.ReLU(), nn.Linear(256, 10))}


SETUPS = {
    "tetris.analysis.model.analyze": analyzed,
    "tetris.analysis.report.AnalysisReport": analyzed,
    "tetris.analysis.report.AnalysisReport.overrides": analyzed,
    **dict.fromkeys(
        (
            "tetris.bayes.posterior.Posterior",
            "tetris.bayes.predict.Predictive",
            "tetris.bayes.predict.fgsm",
            "tetris.bayes.scores.block_score",
            "tetris.bayes.scores.input_score",
            "tetris.bayes.scores.prune_draws",
            "tetris.bayes.shrinkage.effective_parameters",
            "tetris.bayes.shrinkage.kappa",
            "tetris.bayes.weights.Weights",
        ),
        drawn,
    ),
    "tetris.bayes.ensemble.Ensemble": ensemble,
    "tetris.bayes.map.MAP": classes,
    "tetris.bayes.network.BayesianMLP": network,
    "tetris.bayes.nuts.sample_nuts": by_nuts,
    "tetris.bayes.posterior.Posterior.held_out_noise": regression,
    "tetris.bayes.posterior.sample_hmc": regression,
    "tetris.checkpoint.load": saved,
    "tetris.checkpoint.save": saved,
    "tetris.fold.fold.fold": residual,
    "tetris.fold.report.FoldReport": residual,
    "tetris.fold.shared.shared_orders": residual,
    "tetris.frechet.frechet_distance": frechet,
    "tetris.fuse.FuseReport": fused,
    "tetris.fuse.fuse": fused,
    "tetris.layout.BlockLayout.with_blocks": layout,
    "tetris.nn.conv.SparseConv1d": lambda: convolution(nn.Conv1d(16, 32, 3), 2, 16, 9),
    "tetris.nn.conv.SparseConv2d": lambda: convolution(nn.Conv2d(16, 32, 3), 2, 16, 9, 9),
    "tetris.nn.conv_transpose.SparseConvTranspose2d": lambda: convolution(
        nn.ConvTranspose2d(16, 32, 3, stride=2, padding=1), 2, 16, 16, 16
    ),
    "tetris.nn.linear.SparseLinear": linear,
    "tetris.nn.transposed.SparseTransposedLinear": gpt2,
    "tetris.ops_conv.bsconv2d": convolved,
    "tetris.ops_conv.bsconv_transpose2d": convolved,
    "tetris.plotting.plot_images": pictures,
    "tetris.prune.dcp.channels.shrink_channels": channels,
    "tetris.prune.dcp.pruner.DCPPruner": channels,
    "tetris.prune.dsm.DSMPruner": chain,
    "tetris.prune.gan.pruner.GANPruner": gan,
    "tetris.prune.gan.tasks.ImageToImageGAN": images_to_images,
    "tetris.prune.gan.tasks.UnconditionalGAN": gan,
    "tetris.prune.latency.Latency": slow_enough,
    "tetris.prune.report.SparsifyReport.overrides": analyzed,
    "tetris.prune.orders.SharedOrder": residual,
    "tetris.prune.orders.SharedOrders": residual,
    "tetris.prune.synaptic.pruner.SynapticPruner": synaptic,
    "tetris.prune.synaptic.pruner.SynapticPruner.parameter_groups": parameter_groups,
    "tetris.prune.target.Flops": one_convolution,
    "tetris.prune.target.Parameters": wide,
    "tetris.relayout.relayout": stored,
}


def names(example: str, module) -> dict:
    """What an example sees: its module's names, the common ones, its own."""
    package = vars(bayes) if example.startswith("tetris.bayes") else {}
    return {**package, **vars(module), **common(), **SETUPS.get(example, dict)()}
