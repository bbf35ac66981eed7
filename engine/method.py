"""The contract of a method: the events the loop calls by name, and the run they work on.

A method is a frozen dataclass whose fields are its hyperparameters, in one file of `methods/`. What
it needs between its events is its own typed `State`, made by `prepare` and handed to every later
event. The engine never looks inside, except to save it (`engine/checkpoints/method_state.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from letheon.engine.checkpoints.method_state import State
from letheon.engine.checkpoints.sweep_state import Sweeps
from letheon.engine.distributed import Ranks
from letheon.engine.gradient_sync import Flat
from letheon.engine.memory.sample_rows import SampleRows
from letheon.engine.memory.shards import Shards, cut, own_parts
from letheon.engine.models.classifier import Classifier
from letheon.engine.models.initial import initial_copy
from letheon.engine.models.teacher import Teachers, shared_copy
from letheon.engine.numbers.image_memory import ImageMemory
from letheon.engine.precision import Precision
from letheon.engine.recipe import Recipe
from letheon.errors import InputError
from letheon.loaders.batch import Batch, Loader, Reads, Stream
from letheon.loaders.datasets.image_set import ImageSet
from letheon.loaders.order import stream_sizes

Loss = Callable[[nn.Module, Batch], Tensor]
"""(net, batch) -> scalar to descend, the mean over this rank's samples. Pure: no host sync."""
PartsLoss = Callable[[nn.Module, Batch], Mapping[str, Tensor]]
"""(net, batch) -> scalars by name, whose gradients stay apart; see `Phase.parts`."""

Kind = Literal["unlearning", "control", "reference", "training"]
"""What a method is for. unlearning: it makes a trained model forget; control: it only looks as if;
reference: what the others are compared with (a retrained model); training: it makes the original.
"""


@dataclass(frozen=True)
class Phase:
    """One pass over one stream with one loss."""

    name: str
    """In records, and the key of the compiled graph: one loss per name in a run."""
    reads: Reads
    loss: Loss | PartsLoss
    batch_norm: Literal["recipe", "frozen"] = "recipe"
    """frozen: running statistics are used and kept, whatever the recipe says. The right choice
    where only forget samples are read, which would otherwise become the statistics."""
    slot: str = "main"
    """Which optimizer steps; each slot has its own momentum and its own rate."""
    image_size: int | None = None
    """Pixels to train at; None: the model's own. Another size is another `name`."""
    batch_size: int | None = None
    """Samples of a global batch; None: the recipe's."""
    share: float = 1.0
    """Share of the epoch's batches that are read, the first of its order."""
    steps: int | None = None
    """Exactly so many batches: a longer stream is cut, a shorter one begins anew in a new order."""
    retain_share: float = 1.0
    """Of a ``mixed`` phase: the share of the retain samples that is read, the same samples in every
    epoch; all forget samples are."""
    source: str = "train"
    """`train`, or one of `Method.sources`, whose images are read as a ``mixed`` stream."""
    parts: tuple[str, ...] = ()
    """Names of the scalars that the loss returns. Their gradients reach `edit_grads` apart, in
    `Run.grad_parts`; unless it joins them otherwise, their sum is what the optimizer sees."""
    beside: Phase | None = None
    """Interleaved: after each step of this phase, one step of that one, on its own stream, which is
    cut or begun anew to as many steps."""
    every: int = 1
    """Steps of this phase for one of the phase beside it, which follows the first of them."""
    rows: SampleRows | None = field(default=None, compare=False)
    """What its loss gets of each sample beside the image, as `Batch.rows`: of all that it reads."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        if self.every < 1:
            raise InputError(f"got a step beside every {self.every} steps; expected 1 or more")
        if self.beside is not None:
            if self.beside.beside is not None:
                raise InputError(f"got three interleaved phases ({self.name}); expected two")
            if self.beside.name == self.name:
                raise InputError(f"got two interleaved phases named {self.name}; name them apart")
        if self.retain_share < 1 and self.reads != "mixed":
            raise InputError(
                f"got phase {self.name}, which reads {self.reads}, with a retain share of "
                f"{self.retain_share}; expected mixed: use share for the other streams"
            )
        if self.source != "train" and self.reads != "mixed":
            raise InputError(
                f"got phase {self.name}, which reads {self.reads} of {self.source}; expected "
                "mixed: only training images are split into forget and retain"
            )

    @property
    def stream(self) -> Stream:
        """What its loader is asked for."""
        return Stream(
            self.reads, self.batch_size, self.image_size, self.share, self.steps, self.retain_share
        )


class Accuracies(NamedTuple):
    """Top-1 accuracy as fractions, test transform; equal on every rank. None: no such image."""

    forget: float | None
    retain: float | None
    held_out_forget: float | None
    held_out_retain: float | None


@dataclass(frozen=True)
class BackTo:
    """End the training with the weights as they were at the end of an earlier epoch."""

    epoch: int  # counted from 0


Decision = Literal["go on", "stop"] | BackTo
"""What `Method.after_epoch` may decide."""


@dataclass
class Run:
    """What a method may touch. Everything but `loader` and `ranks` is equal on every rank."""

    model: Classifier  # the network being edited, unwrapped, on the device
    loader: Loader  # the training set, split into forget and retain
    recipe: Recipe
    ranks: Ranks
    seed: int
    forget: Tensor  # (N,) bool on the device: which training samples are to be forgotten
    forget_classes: tuple[int, ...]  # sorted ids; empty when single samples are forgotten
    precision: Precision = field(default_factory=Precision)
    request: str = ""
    """Digest of what is to be forgotten; empty where nothing says."""
    images: str = ""
    """Digest of the training images; on the first rank alone, which looks at every file."""
    epoch: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.int64))
    """0-dim int64 on the device, set by the loop; a loss reads it without being recompiled."""
    epoch_number: int = 0
    """The same on the host, for edits."""
    notes: list[str] = field(default_factory=list)
    """What the user sees at the start, such as which loader was chosen; for the first rank."""
    warnings: list[str] = field(default_factory=list)
    reads: dict[str, Tensor] = field(default_factory=dict)
    """On the first rank, by "what a phase reads/its name": (N,) int32 reads of each sample."""
    """What the user sees at the end, such as a network that collapsed; also in the record."""
    flat: Flat | None = None
    """Weights and gradients as one buffer each, where the run keeps them so; set by the loop."""
    shards: Shards | None = None
    """The network's parts, where it is split over the ranks; set before it is prepared."""
    grad_parts: dict[str, list[Tensor]] = field(default_factory=dict)
    """Within `edit_grads` of a phase with `parts`: the gradient of each, one tensor per parameter
    of `parameters`, unscaled and equal on every rank."""
    held_out: Callable[[], Loader] | None = None
    """Opens the held-out images, split like the training set; where there are some."""
    open_images: Callable[[ImageSet], Loader] | None = None
    """A loader of further images, as this rank reads them, for `Method.sources`."""
    shared: dict[Any, Any] | None = None
    """Where `engine/statistics.py` keeps statistics over sets for the other runs of the call; None
    once `prepare` is over: the weights that a run has moved are no other run's."""
    teachers: Teachers = field(default_factory=Teachers)
    """Where `teacher` looks for the copy that another run of the call holds."""
    image_memory: ImageMemory | None = None
    """Where the runs of a call keep images that were decoded for sums and accuracies."""
    sweeps: Sweeps | None = None
    """Where the passes over sets that lie before training are saved; None afterwards."""

    def __post_init__(self) -> None:
        """Refuse what does not go together."""
        compile_mode = self.precision.compile
        if self.recipe.batch_norm == "sync" and self.ranks.world > 1 and compile_mode != "off":
            raise InputError(
                f"got batch-norm sync with compile {compile_mode}; its exchange between the ranks "
                "would cut the graph; use batch-norm local or frozen, or compile off",
                option="batch_norm",
            )
        if self.recipe.activation_checkpoint and compile_mode != "off":
            raise InputError(
                f"got an activation checkpoint with compile {compile_mode}, which chooses by "
                "itself what it computes again; leave one of them out",
                option="activation_checkpoint",
            )

    @property
    def named_parameters(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name, in the model's order: those of the architecture under
        its own keys, then added ones as ``extra.<name>``. Of a network that is split over the
        ranks, this rank's part of each."""  # noqa: D205, D209
        if self.shards is not None:
            return {k.removeprefix("net."): part for k, part in self.shards.weights.items()}
        return {
            name.removeprefix("net."): parameter
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }

    @property
    def weights(self) -> dict[str, Tensor]:
        """Every weight of the network by name, frozen ones too, detached; of a network that is
        split over the ranks, this rank's part of each."""  # noqa: D205, D209
        return own_parts(dict(self.model.net.named_parameters()))

    def untrained_teacher(self, seed: int) -> Classifier:
        """A frozen copy of the network with new weights, as `teacher`: a function of (architecture,
        seed)."""  # noqa: D205, D209
        if self.shards is not None:
            return self.shards.copy(initial_copy(self.shards.host_copy(), seed))
        return shared_copy(initial_copy(self.model, seed), self.precision, self.teachers)

    def own_part(self, whole: Tensor) -> Tensor:
        """Return what of a tensor that fits a whole weight belongs to this rank: all of it, or its
        part where the network is split over the ranks."""  # noqa: D205, D209
        return whole if self.shards is None else cut(whole, self.ranks)

    def whole_shape(self, parameter: Tensor) -> torch.Size:
        """Shape of the weight of which one of `parameters` is all, or this rank's part."""
        return parameter.shape if self.shards is None else self.shards.whole_shape(parameter)

    def own_parameter(self, weight: Tensor) -> Tensor:
        """Return what is trained of a weight of the model: itself, or this rank's part of it."""
        return weight if self.shards is None else self.shards.own(weight)

    @property
    def splits(self) -> bool:
        """Whether the network is to be split over the ranks."""
        return self.precision.reduction(self.ranks.world) == "shard"

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable parameters, in the order of `named_parameters`."""
        return list(self.named_parameters.values())

    def stream(self, phase: Phase) -> Stream:
        """What the loader is asked for in a phase: ranks get whole batch-norm groups."""
        return phase.stream._replace(group=self.recipe.batch_norm_group)

    def fewest_parts(self, stream: Stream, samples: int | None = None) -> int:
        """Parts in which ranks can share the smallest global batch of a stream: its samples, or
        its batch-norm groups.

        `samples` is the size of another set than the training set, which is read as a whole.
        """  # noqa: D205
        forget = self.forget.cpu().numpy() if samples is None else np.zeros(samples, np.bool_)
        count = min(stream_sizes(stream, forget, self.recipe.batch_size))
        return -(-count // max(1, self.recipe.batch_norm_group))

    def add_module(self, name: str, module: nn.Module) -> nn.Module:
        """Train further parameters beside the network's, such as an adapter or a noise image.

        Call it in `prepare`, with equal weights on every rank. They are moved to the device, join
        `parameters`, and are dropped after `Method.finish`, which merges what is to stay. Weights
        inside the network itself that a method replaces or widens must be put back there, too: the
        loop refuses a model whose keys or shapes are not those it had.
        """
        if not hasattr(self.model, "extra"):
            self.model.add_module("extra", nn.ModuleDict())
        self.model.get_submodule("extra").add_module(name, module.to(self.ranks.device))
        return module

    def teacher(self) -> Classifier:
        """A frozen copy of the model as it is now; keep it in the state, `rebuilt`.

        Batch-norm is folded into its convolutions and the weights are in the type of the run's
        autocast, under which it is to be called. Runs of one call that start from the same weights
        have one teacher. Of a network that is split over the ranks it is split alike, with
        its batch-norm. Ask it by `teacher_output`.
        """
        if self.shards is not None:
            return self.shards.copy()
        return shared_copy(self.model, self.precision, self.teachers)


class Definition(NamedTuple):
    """A method in words, as its help and `docs/methods.md` have it.

    F is the forget set, R the retain set, CE the mean cross-entropy, f the pooled feature, z the
    logits, o the original model, KL_T the divergence at temperature T times T^2.
    """

    alias: str
    """Names in the field."""
    reads: str
    """Sets that an epoch reads."""
    formula: str
    """What is descended, or done to the weights."""
    cost: str
    """Of an image that is read (1: forward and backward; 1/3: forward alone); or of the whole run:
    images whose gradient is taken (g), or that are only looked at (l), of N, N_f or N_r."""
    source: str
    """Authors and year; equations."""


class Method:
    """One way to forget. Override only what differs; every default does nothing.

    A one-shot method returns no phases and does its work in `prepare`. `run` is the same object in
    every event; `state` is what `prepare` returned.
    """

    name: ClassVar[str] = ""
    """On the command line and in records; a plug-in without one has that of its entry point."""
    definition: ClassVar[Definition | None] = None
    """Formula, cost and source for the help; None: the docstring alone."""
    kind: ClassVar[Kind] = "unlearning"
    ranges: ClassVar[Mapping[str, tuple[float, float]]] = {}
    """Settings that a search for the best ones tries beside the rate, from lowest to highest."""
    from_scratch: ClassVar[bool] = False
    """True for a method that starts from new weights instead of the trained ones."""
    recipe: Recipe

    def stream_seed(self, seed: int) -> int:
        """The seed of first weights, order and augmentation, from that of the run's settings."""
        return seed

    def check(self, run: Run) -> None:
        """Before anything is written, on every rank alone: refuse input that does not fit the run.

        Raises:
            InputError: such as a file that is not there.
        """

    def sample_bytes(self, run: Run) -> int:
        """Bytes that it keeps of each forget sample, on the device, on the rank whose share of them
        it is in: of a plan's memory."""  # noqa: D205, D209
        return 0

    def prepare(self, run: Run) -> State:
        """Once, before compile and DDP: teachers, masks, surgery, one-shot edits of the weights."""
        return State()

    def sources(self, run: Run) -> Mapping[str, ImageSet]:
        """Further images by name, for phases with that `source`; labels are the set's own."""
        return {}

    def phases(self, run: Run, state: State, epoch: int) -> Sequence[Phase]:
        """The passes of one epoch, in order. Pure: asking twice, or for any epoch, changes nothing.

        It is asked while the run is planned, too.
        """
        return []

    def optimizer(self, run: Run, state: State, slot: str) -> torch.optim.Optimizer:
        """What steps the phases of a slot; asked once, at the slot's first batch."""
        return run.recipe.build_optimizer(run.parameters)

    def rate(self, run: Run, slot: str, epoch: float) -> float:
        """Learning rate of a slot at a moment, counted in epochs (2.5: half through the third)."""
        return run.recipe.rate(epoch)

    def edit_grads(self, run: Run, state: State, phase: Phase) -> None:
        """Gradients are unscaled and equal on all ranks; the optimizer has not stepped."""

    def edit_weights(self, run: Run, state: State, phase: Phase) -> None:
        """The optimizer has stepped."""

    @property
    def watches_epochs(self) -> bool:
        """Whether `after_epoch` is to be asked."""
        return type(self).after_epoch is not Method.after_epoch

    def after_epoch(self, run: Run, state: State, accuracies: Accuracies) -> Decision:
        """Go on, stop, or go back to the end of an earlier epoch.

        Only a method that overrides this pays for it: the accuracies are measured, and where it may
        go back the weights of every epoch are kept on the host (`goes_back`).
        """
        return "go on"

    goes_back: ClassVar[bool] = False
    """True for a method whose `after_epoch` may return `BackTo`."""
    reads_accuracies: ClassVar[Literal["all", "forget", "none"]] = "all"
    """Those that `after_epoch` needs: forget, of the forget set's training images alone; the others
    are not measured, and None."""
    replaces_head: ClassVar[bool] = False
    """True where the head has another shape while it trains, or is written as a whole at the end:
    no mask fits it."""
    separates_forget: ClassVar[bool] = False
    """True where an epoch reads the forget set in a pass of its own, and others in another pass."""

    elementwise: ClassVar[bool] = False
    """True where it touches weights and gradients element by element alone, through
    `Run.named_parameters` and `Run.weights`, and the network by forward passes of whole batches: so
    a network may be split over the ranks, each of which has a part of every tensor. Not inherited:
    a subclass that adds an edit of its own says anew whether it is so. Sums over all weights come
    from `engine/memory/products.py`; shapes are changed within `whole_network` of
    `engine/memory/sharding.py`."""

    def __init_subclass__(cls, **options: Any) -> None:
        """Forget what a base class says of itself alone."""
        super().__init_subclass__(**options)
        if "elementwise" not in vars(cls):
            cls.elementwise = False

    def finish(self, run: Run, state: State) -> None:
        """Remove or merge what was added; leave a model of the architecture it had."""
