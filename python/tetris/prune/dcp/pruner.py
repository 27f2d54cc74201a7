"""DCP: keep the channels, or blocks, that a classifier right behind them asks for."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ...blocking import removed_count
from ...checks import describe
from ...layout import BlockLayout
from ...modules import copy_or_same, unparametrize
from ...nn.kinds import DENSE_TYPES, DenseLayer, groups_of, oriented
from ...progress import steps as steps_shown
from ...sharding import check_whole
from .. import ranks
from ..batches import fitting, undisturbed
from ..options import LayerOptions, LayerOverride, shows_settings
from ..orders import Share
from ..plan import Scope
from ..pruner import Execution, Pruner
from ..report import SparsifyReport, warn_of_shortfall
from ..saliency import layer_saliency, prepare_importance
from ..states import check_count, check_mapping
from ..target import Target
from ..tree import Selector
from .atoms import Atom, Atoms
from .channels import ChannelReport, shrink_channels
from .forward import Forward
from .greedy import Batch, Loss, Objective, Score, Selection, Stopped, select_atoms
from .head_training import MOMENTUM, WEIGHT_DECAY, train_jointly, train_stage
from .heads import Head, Stage, place_heads

if TYPE_CHECKING:
    from typing_extensions import Unpack


class DCPPruner(Pruner):
    """Chooses blocks or input channels by what they do for reconstruction and discrimination.

    Heads, small classifiers, are attached in the middle of the network. The layers before a head
    are pruned one after the other, each from nothing: the atoms with the largest gradient of
    ``L = L_M + lam * L_S`` enter, and SGD fits the weights that have entered. ``L_M`` is half the
    mean squared difference of the layer's outputs to those in the unpruned network, ``L_S`` the
    cross-entropy of the head (Zhuang et al., "Discrimination-aware Channel Pruning for Deep Neural
    Networks", NeurIPS 2018, algorithms 1 and 2).

    An atom is a block, under the permutations that the search finds for the importance of the
    dense weights, or with ``atom="channel"`` an input channel with all its weights (bi of them with
    a block of that width). Channels end in a smaller dense network, blocks in sparse layers.

    Where this departs from the paper: several atoms enter per round, and every block row keeps its
    best block, counted in the budget, unless ``allow_empty_rows``. As in the paper, and unlike its
    released code, an atom is scored by the Frobenius norm of its whole gradient, L_M has its half,
    and heads are trained one after the other (``joint=True`` is the code's order). The unpruned
    network of L_M is the one that :meth:`select` is given, not what training of heads makes of it.

    Args:
        model: The model, which ``torch.fx`` must be able to trace and which returns logits
            [N, classes]; changed in place until :meth:`remove` or :meth:`finalize`.
        options: Settings of the layers as one object, in place of the keywords below.
        heads: Layers behind which heads stand, by name; or a number, spread over the pruned
            layers; None for one per five pruned layers, and one where there are fewer. A layer is
            judged by the first head that depends on it.
        atom: ``"block"`` or ``"channel"``.
        lam: Weight of L_S; 0 leaves it out.
        reconstruction: Weight of L_M; 0 leaves it out.
        score: What chooses atoms: ``"gradient"``; ``"random"`` or ``"norm"``, the norm of the old
            weights, are to compare with, by the same solver.
        joint: Train all heads together once, weighted by ``max(0.01, (depth / last depth)^2)``, and
            choose in all layers then, as the authors' code does; otherwise head after head.
        include: Layers to prune; this and the rest as for :func:`tetris.sparsify`.
        exclude: Layers to leave alone: the first and the last as a rule.
        types: Exact types to prune.
        overrides: Settings for some layers.
        scope: ``"layer"`` or ``"global"``, which shares the budget by importance.
        target: What is to be left, in place of ``sparsity``; blocks only.
        share: Channels whose order several layers share, see :class:`SharedOrder`; blocks only.
        execution: ``"masked"`` or ``"sparse"``, from the selection on; channels are masked.
        optimizers: With ``"sparse"``: whose states follow the blocks.
        progress: Show a progress bar.
        sparsity: Share of atoms to remove; this and the rest as for :func:`tetris.sparsify`.
        block: (bo, bi); for channels bi is the number of channels of an atom.
        importance: What a weight is worth in the search for permutations, which shares the budget
            with scope ``"global"``.
        reorder: Search to use.
        balanced: Not supported.
        allow_empty_rows: Let block rows lose all their blocks.
        tie_kernel: All kernel positions of a block of channels are one atom.
        seed: Of the search, heads, batches and random atoms.
        budget: Seconds per layer for the search.
        sweeps: Sweeps instead of seconds.

    Attributes:
        stages: Heads, and the layers chosen under each.
        selections: name -> :class:`Selection`, how :meth:`select` went.
        shrunk: What :meth:`finalize` made of channels.

    Raises:
        ValueError: as :func:`tetris.sparsify`; the model cannot be traced; a layer is not called
            exactly once, or has no atom left; a head is misplaced.

    Example:
        >>> pruner = tetris.prune.DCPPruner(
        ...     model, heads=["conv5", "conv9"], atom="channel", sparsity=0.5,
        ...     exclude=["conv1", "classifier"],
        ... )
        >>> pruner.select(loader)              # trains heads, chooses channels
        >>> for x, target in loader:           # then fine-tune as ever
        ...     optimizer.zero_grad()
        ...     criterion(model(x), target).backward()
        ...     optimizer.step()
        ...     pruner.step()
        >>> small = pruner.finalize()          # dense, with fewer channels
        >>> print(pruner.shrunk)

    BatchNorm statistics of the unpruned model do not fit the pruned one: before it is used without
    fine-tuning, pass training data through ``torch.optim.swa_utils.update_bn``.
    """

    @shows_settings
    def __init__(
        self,
        model: nn.Module,
        options: LayerOptions | None = None,
        *,
        heads: int | Iterable[str] | None = None,
        atom: Atom = "block",
        lam: float = 1.0,
        reconstruction: float = 1.0,
        score: Score = "gradient",
        joint: bool = False,
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        types: tuple[type[nn.Module], ...] = DENSE_TYPES,
        overrides: Mapping[str, LayerOverride] | None = None,
        scope: Scope = "layer",
        target: Target | None = None,
        share: Share = (),
        execution: Execution = "masked",
        optimizers: Optimizer | Iterable[Optimizer] = (),
        progress: bool = False,
        **settings: Unpack[LayerOverride],
    ) -> None:
        for name, value, known in (("atom", atom, Atom), ("score", score, Score)):
            if value not in get_args(known):
                raise ValueError(
                    f"{self.name}: {name} must be one of "
                    f"{', '.join(map(repr, get_args(known)))} (got {describe(value)})"
                )
        for name, value in (("lam", lam), ("reconstruction", reconstruction)):
            _check_number(self.name, name, value)
        if lam == reconstruction == 0:
            raise ValueError(
                f"{self.name}: lam and reconstruction are both 0, which leaves no loss"
            )
        self.atom: Atom = atom
        self.lam, self.reconstruction = float(lam), float(reconstruction)
        self.score: Score = score
        self.joint = joint
        self.selections: dict[str, Selection] = {}
        self.shrunk: ChannelReport | None = None
        super().__init__(
            model,
            options,
            include=include,
            exclude=exclude,
            types=types,
            overrides=overrides,
            scope=scope,
            target=target,
            share=share,
            execution=execution,
            optimizers=optimizers,
            progress=progress,
            **settings,
        )
        self._check_layers(target)
        if atom == "channel":
            for name, own in self.layer_options.items():
                if own.block[1] == 1:  # then no order of rows or columns changes a channel
                    self.layer_options[name] = replace(own, reorder="identity")
        with undisturbed(model):  # the graph is that in eval mode, as in the choice
            self.stages = place_heads(self.name, heads, Forward(self.name, model), self.layers)

    def select(
        self,
        data: Dataset | Iterable[Batch],
        *,
        epochs: int = 1,
        lr: float = 0.01,
        rounds: int = 8,
        steps: int = 8,
        step_lr: float = 0.01,
        epsilon: float | None = None,
        samples: int = 10_000,
        batch: int = 64,
        loss: Loss = F.cross_entropy,
    ) -> SparsifyReport:
        """Train heads, choose what every layer keeps, and keep it from now on.

        Per head: ``epochs`` epochs, in each step of which SGD descends the head's loss and then the
        network's; then the layers before it are pruned, one after the other, in eval mode. Both
        use Nesterov's momentum 0.9 and weight decay 1e-4.

        A model in training mode is trained in the modes its modules have: batch norm that was set
        to eval keeps its statistics. One in eval mode is set to training for that time. Frozen
        parameters stay as they are. Batches of one sample are left out of training.

        Args:
            data: Pairs of inputs and targets: batches that can be gone through several times (a
                DataLoader, a list), or a Dataset.
            epochs: Passes over the data per head, and for the network's own loss.
            lr: Learning rate in these.
            rounds: The budget of a layer enters in so many rounds, or in fewer if it has fewer
                atoms. Where the empty layer has no gradient at all, the first round takes the atoms
                with the largest norms.
            steps: SGD steps on the layer after each round.
            step_lr: Learning rate in these.
            epsilon: Stop adding to a layer when a round changes its loss by no more than
                ``epsilon`` times that of the empty layer (DCP-Adapt): ``sparsity`` is then the
                least that is removed. None keeps as many as ``sparsity`` says. As changes shrink
                with the round, more rounds need a smaller epsilon.
            samples: The first so many samples are the set that losses and gradients of the
                selection are computed on.
            batch: Size of batches of a Dataset.
            loss: ``(logits, target) -> scalar``, a mean over the batch; of heads and network.

        Returns:
            What is kept.

        Raises:
            RuntimeError: the selection has been made; the pruner has ended.
            TypeError: data are no pairs of tensors, or can be read only once.
            ValueError: there are no data; the model returns something else than [N, classes]; a
                layer to prune is frozen; a loss is not finite; with ``execution="sparse"``, a layer
                has hooks, or an optimizer's states cannot follow its blocks. The model is as it was
                then.
        """
        self._check_attached("select")
        if self.selections:
            raise RuntimeError(
                f"{self.name}.select: the layers have been chosen; remove() this pruner and make a "
                "new one to choose again"
            )
        if ranks.count() > 1:
            raise RuntimeError(
                f"{self.name}.select: it trains, and would train otherwise in each of "
                f"{ranks.count()} processes; call it in one process, save state_dict() and the "
                "model's, and load both in all of them"
            )
        check_whole(f"{self.name}.select", self.model.parameters(), "fully_shard after select()")
        self._check_counts(epochs=epochs, rounds=rounds, steps=steps, samples=samples, batch=batch)
        for name, value in (("lr", lr), ("step_lr", step_lr), ("epsilon", epsilon)):
            if value is not None or name != "epsilon":
                _check_number(f"{self.name}.select", name, value)
        frozen = [n for n, layer in self.layers.items() if not layer.weight.requires_grad]
        if frozen:
            raise ValueError(
                f"{self.name}.select: the weight of layer {frozen[0]!r} is frozen, and choosing "
                "fits what is kept; set requires_grad_(True), or exclude the layer"
            )
        for name, mask in self._masks.items():
            # Now, not after hours. Of a shared budget a layer may keep all it has.
            if self.scope == "layer" and self.layer_options[name].sparsity > 0.0:
                mask.check(f"{self.name}.select", self._optimizers, self.steps > 0)
        device = next(iter(self.layers.values())).weight.device
        reference = copy.deepcopy(self.model).eval().requires_grad_(False)
        modes = [(module, module.training) for module in self.model.modules()]
        training = self.model.training
        chosen: dict[str, BlockLayout] = {}
        with _seeded(self.options.seed, device), ExitStack() as bars:
            try:
                batches = self._batches(data, batch, device)
                sample = list(_first(batches(), samples))
                atoms, budgets = self._atoms()  # with bars of its own
                trainings = epochs * (1 if self.joint else len(self.stages))
                advance = bars.enter_context(
                    steps_shown(self.progress, "heads", len(self.layers) + trainings)
                )
                x, target = sample[0]
                with fitting(f"{self.name}.select", "the model does not take the inputs"):
                    logits = reference(x)
                heads = self._heads(x)
                with fitting(f"{self.name}.select", "the loss does not take logits and targets"):
                    loss(logits, target)
                passes = self._passes(batches, epochs, advance)
                unpruned = Forward(self.name, reference)
                for number, stage in enumerate(self.stages):
                    advance(0, now=f"head behind {stage.head or 'the output'}")
                    if number == 0 or not self.joint:
                        if training:
                            _set_modes(modes)
                        else:
                            self.model.train()
                        joint = None if self.joint else stage
                        self._train(joint, heads, passes(), lr, loss, chosen)
                    self.model.eval()
                    forward = Forward(self.name, self.model)
                    for name in stage.layers:
                        advance(0, now=f"choosing in {name}")
                        objective = self._objective(
                            name, stage, heads, forward, unpruned, sample, loss
                        )
                        kept, log = select_atoms(
                            objective,
                            atoms[name],
                            budgets[name],
                            where=f"{self.name}.select: layer {name!r}",
                            score=self.score,
                            rounds=rounds,
                            steps=steps,
                            lr=step_lr,
                            momentum=MOMENTUM,
                            weight_decay=WEIGHT_DECAY,
                            epsilon=epsilon,
                            seed=(self.layer_options[name].seed, list(self.layers).index(name)),
                        )
                        chosen[name] = atoms[name].stored(kept)
                        self.selections[name] = log
                        advance()
                _set_modes(modes)  # before new layers take them over
                self.model.zero_grad(set_to_none=True)
                self.keep(chosen)
            except BaseException:
                self.model.load_state_dict(reference.state_dict())
                self.selections = {}
                raise
            finally:
                _set_modes(modes)
                self.model.zero_grad(set_to_none=True)
        if epsilon is None and self.scope == "layer":
            warn_of_shortfall(
                self.name,
                {name: layout.sparsity for name, layout in chosen.items()},
                {name: options.sparsity for name, options in self.layer_options.items()},
            )
        return self.report()

    def step(self, *, skipped: bool = False) -> None:
        """Call after each ``optimizer.step()`` of the fine-tuning: zero what is not kept.

        Args:
            skipped: The optimizer has made no step; see :meth:`Pruner.step`.

        Raises:
            RuntimeError: nothing has been chosen yet, see :meth:`select`.
        """
        self._check_selected("step")
        super().step(skipped=skipped)

    def _check_selected(self, method: str) -> None:
        self._check_attached(method)
        if not self.selections:
            raise RuntimeError(
                f"{self.name}.{method}: nothing has been chosen yet; call select(data) first"
            )

    def finalize(self, *, inplace: bool = False) -> nn.Module:
        """Return the model with sparse layers, or with ``atom="channel"`` a smaller dense one.

        It computes what the masked model computes, up to rounding. Of channels, :attr:`shrunk` says
        where rows of the layers before could go, too (see :func:`shrink_channels`).

        Args:
            inplace: Change the model itself; the pruner is done then. Otherwise the result is a
                deep copy and training may go on.

        Raises:
            RuntimeError: nothing has been chosen yet, see :meth:`select`.
            ValueError: as :meth:`Pruner.finalize`, and as :func:`shrink_channels`.
        """
        self._check_selected("finalize")
        if self.atom == "block":
            return super().finalize(inplace=inplace)
        if inplace:
            self.finalize()  # raises where the model cannot be changed, which keeps its masks then
        keep = {name: _input_channels(layout) for name, layout in self.layouts().items()}
        target = copy_or_same(f"{self.name}.finalize", self.model, inplace)
        masked = [n for n in keep if parametrize.is_parametrized(target.get_submodule(n), "weight")]
        for name in masked:
            unparametrize(target.get_submodule(name), "weight", leave_parametrized=True)
        target, self.shrunk = shrink_channels(target, keep, inplace=True)
        if inplace:
            self._end()
        return target

    def extra_state(self) -> dict[str, Any]:
        """How the selection went, and what the atoms are."""
        return {
            "atom": self.atom,
            "selections": {name: copy.deepcopy(vars(s)) for name, s in self.selections.items()},
        }

    def check_extra_state(self, where: str, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless atoms are the same, and selections of these layers."""
        super().check_extra_state(where, state)
        if state["atom"] != self.atom:
            raise ValueError(
                f"{where}: the state is of atom={state['atom']!r}, this pruner has {self.atom!r}"
            )
        known = [f.name for f in fields(Selection)]
        for name, selection in check_mapping(where, "selections", state["selections"]).items():
            if name not in self.layers:
                raise ValueError(
                    f"{where}: selections of the state has layer {name!r}, this pruner has "
                    f"{', '.join(self.layers)}"
                )
            check_mapping(where, f"selections of layer {name!r}", selection, known)
            whole = Selection(**selection)
            lists = isinstance(whole.chosen, list) and isinstance(whole.losses, list)
            if not lists or whole.stopped not in get_args(Stopped):
                raise ValueError(
                    f"{where}: selections of layer {name!r} in the state must be lists chosen and "
                    f"losses, an int and one of {get_args(Stopped)} (got {describe(whole)})"
                )
            check_count(where, f"atoms of layer {name!r}", whole.atoms)

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take back what :meth:`extra_state` gave."""
        self.selections = {n: Selection(**copy.deepcopy(s)) for n, s in state["selections"].items()}

    # -- inside -------------------------------------------------------------------------------

    def _check_layers(self, target: Target | None) -> None:
        for name, layer in self.layers.items():
            options = self.layer_options[name]
            if options.sparsity >= 1.0:
                raise ValueError(
                    f"{self.name}: layer {name!r} keeps nothing with "
                    f"sparsity={options.sparsity:g}; give a smaller one, or exclude it"
                )
            if options.balanced:
                raise ValueError(
                    f"{self.name}: blocks are chosen wherever they are, which balanced=True "
                    f"forbids (layer {name!r}); leave it out"
                )
            if self.atom == "channel" and groups_of(layer) > 1:
                raise ValueError(
                    f"{self.name}: layer {name!r} has {groups_of(layer)} groups, which cannot lose "
                    "single input channels; exclude it, or use atom='block'"
                )
        if self.atom == "channel" and self.execution == "sparse":
            raise ValueError(
                f"{self.name}: atom='channel' ends in a smaller dense network and has no stored "
                "blocks to train on; use execution='masked'"
            )
        if self.atom == "channel" and self.share:
            raise ValueError(
                f"{self.name}: share= gives blocks of several layers one order, which channels do "
                "not need; leave it out"
            )
        if self.atom == "channel" and (target is not None or self.scope == "global"):
            raise ValueError(
                f"{self.name}: target= and scope='global' share blocks between layers, not "
                "channels; give sparsity=, and overrides= for single layers"
            )

    def _check_counts(self, **numbers: int) -> None:
        for name, value in numbers.items():
            least = 0 if name in ("epochs", "steps") else 1
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(
                    f"{self.name}.select: {name} must be an int of at least {least} "
                    f"(got {describe(value)})"
                )

    def _batches(
        self, data: object, batch: int, device: torch.device
    ) -> Callable[[], Iterator[Batch]]:
        """A function that starts a pass over the data."""
        where = f"{self.name}.select"
        if isinstance(data, Dataset):
            data = DataLoader(data, batch, shuffle=not isinstance(data, IterableDataset))
        if not isinstance(data, Iterable) or isinstance(data, Iterator):
            raise TypeError(
                f"{where}: data must be a Dataset, a DataLoader or a list of (inputs, targets), "
                f"which is read several times (got {describe(data)})"
            )
        passes: Iterable[Any] = data

        def read() -> Iterator[Batch]:
            count = 0
            for pair in passes:
                if not (isinstance(pair, (tuple, list)) and len(pair) == 2):
                    raise TypeError(
                        f"{where}: data must give pairs of inputs and targets "
                        f"(got {describe(pair)})"
                    )
                if not all(isinstance(part, Tensor) and part.dim() for part in pair):
                    raise TypeError(
                        f"{where}: inputs and targets must be one tensor each, [N, ...] "
                        f"(got {describe(pair[0])} and {describe(pair[1])}); wrap a model of "
                        "several inputs in one that takes them apart"
                    )
                count += 1
                yield pair[0].to(device), pair[1].to(device)
            if not count:
                raise ValueError(f"{where}: data must hold at least one batch (got none)")

        return read

    def _passes(
        self, batches: Callable[[], Iterator[Batch]], epochs: int, done: Callable[[], None]
    ) -> Callable[[], Iterator[Batch]]:
        """A function that starts the epochs of one training: batches that batch norm can train on.

        One sample has no variance; the last batch of an epoch may be such.
        """

        def read() -> Iterator[Batch]:
            seen = 0
            for _ in range(epochs):
                for x, target in batches():
                    if len(x) > 1:
                        seen += 1
                        yield x, target
                done()
            if epochs and not seen:
                raise ValueError(
                    f"{self.name}.select: heads are trained with batch norm, which needs batches "
                    "of at least two samples (got none); give larger batches, or epochs=0"
                )

        return read

    def _atoms(self) -> tuple[dict[str, Atoms], dict[str, int]]:
        """Atoms of each layer, and how many it may keep."""
        prepare_importance(self.model, self.layers, self.layer_options)
        importance = {
            name: layer_saliency(self.name, name, layer, self.layer_options[name].importance)
            for name, layer in self.layers.items()
        }
        atoms, budgets = {}, {}
        for name, plan in self.search(importance).items():
            options = plan.options
            own = Atoms.of(
                plan.layout.to(self.layers[name].weight.device),
                self.atom,
                tie_kernel=options.tie_kernel,
                floor=not options.allow_empty_rows,
            )
            atoms[name] = own
            # 0.29 * 100 is a little less than 29.
            removed = removed_count(options.sparsity, own.count)
            budgets[name] = max(own.count - removed, own.rows)
        return atoms, budgets

    @torch.no_grad()
    def _heads(self, x: Tensor) -> dict[str, Head]:
        """A new head for each stage that ends at one."""
        logits = self.model.eval()(x)
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(x):
            got = list(logits.shape) if isinstance(logits, Tensor) else describe(logits)
            raise ValueError(
                f"{self.name}.select: the model must return logits [N, classes] (got {got} for "
                f"{len(x)} inputs)"
            )
        names = [stage.head for stage in self.stages if stage.head is not None]
        layers = {name: self.model.get_submodule(name) for name in names}
        return {n: Head(layer, logits.shape[1]) for n, layer in layers.items()}  # type: ignore[arg-type]

    def _train(
        self,
        stage: Stage | None,
        heads: Mapping[str, Head],
        batches: Iterable[Batch],
        lr: float,
        loss: Loss,
        chosen: Mapping[str, BlockLayout],
    ) -> None:
        """Train the network with the head of a stage, or for None with all heads."""
        forward = Forward(self.name, self.model)  # in the mode it is trained in
        if stage is None:
            joined = forward.with_heads(heads.items())
            weights = [max(0.01, (forward.depth[n] / len(forward.depth)) ** 2) for n in heads]
            train_jointly(joined, heads.values(), [*weights, 1.0], batches, lr, loss)
            return
        until = None if stage.head is None else forward.until(stage.head)
        head = None if stage.head is None else heads[stage.head]
        train_stage(self.model, until, head, batches, lr, loss, self._element_masks(chosen))

    def _objective(
        self,
        name: str,
        stage: Stage,
        heads: Mapping[str, Head],
        forward: Forward,
        unpruned: Forward,
        sample: list[Batch],
        loss: Loss,
    ) -> Objective:
        return Objective(
            layer=self.layers[name],
            before=forward.before(name, stage.head),
            after=forward.after(name, stage.head),
            head=nn.Identity() if stage.head is None else heads[stage.head],
            reference=unpruned.until(name),
            batches=sample,
            loss=loss,
            lam=self.lam,
            reconstruction=self.reconstruction,
        )

    def _element_masks(self, chosen: Mapping[str, BlockLayout]) -> list[tuple[Tensor, Tensor]]:
        """Weights of the layers that have been pruned, and what they keep."""
        layers: list[tuple[Tensor, DenseLayer, BlockLayout]] = [
            (self.layers[name].weight, self.layers[name], layout) for name, layout in chosen.items()
        ]
        return [(weight, oriented(layer, layout.mask())) for weight, layer, layout in layers]


def _first(batches: Iterable[Batch], samples: int) -> Iterator[Batch]:
    """Batches of the first samples, the last one cut."""
    for x, target in batches:
        yield x[:samples], target[:samples]
        samples -= len(x)
        if samples <= 0:
            return


def _input_channels(layout: BlockLayout) -> Tensor:
    """bool[in], the input channels of which anything is stored, in original order."""
    columns = layout.block_mask().any(0).view(layout.blocking.positions, -1).any(0)
    packed = columns.repeat_interleave(layout.block[1])[: layout.in_features]
    if layout.col_perm is None:
        return packed
    kept = torch.empty_like(packed)
    kept[layout.col_perm.long()] = packed
    return kept


def _set_modes(modes: Iterable[tuple[nn.Module, bool]]) -> None:
    for module, mode in modes:
        module.training = mode


def _check_number(where: str, name: str, value: object) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type,operator]
        raise ValueError(
            f"{where}: {name} must be a finite number of at least 0 (got {describe(value)})"
        )


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Random numbers of a seed inside, and those of before outside."""
    with torch.random.fork_rng([] if device.type == "cpu" else [device]):
        torch.manual_seed(seed)
        yield
