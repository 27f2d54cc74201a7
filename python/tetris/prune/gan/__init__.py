"""Self-supervised compression of generators."""

from .guard import DivergenceError as DivergenceError
from .pruner import GANPruner as GANPruner
from .tasks import ConditionalGAN as ConditionalGAN
from .tasks import GANTask as GANTask
from .tasks import ImageToImageGAN as ImageToImageGAN
from .tasks import UnconditionalGAN as UnconditionalGAN
