"""A protocol as a record of records: tasks, network, outer optimiser, and a learner's settings."""

import dataclasses
import operator
from collections.abc import Mapping
from typing import Annotated, Any, Literal, get_args

import jax
import optax
from jax.nn import initializers

from imaml_jax.learners.algorithm import LearnerSettings
from imaml_jax.learners.base import LossFn, cross_entropy, learned_rates
from imaml_jax.learners.imaml_dev import ImamlDevSettings
from imaml_jax.learners.registry import ALGORITHMS, settings_class
from imaml_jax.learners.settings import (
    Count,
    Fixed,
    NotNegative,
    Positive,
    Range,
    Record,
    When,
    check_value,
    nearest,
    values_of,
    words,
)
from imaml_jax.networks import Network, conv4, mlp
from imaml_jax.networks.mlp import SMALL_NORMAL
from imaml_jax.types import MetaLearner

Rotations = Literal["augment", "classes"]
OmniglotSplit = Literal["finn", "lake", "mamlpp", "reptile", "vinyals"]
_INITIALIZERS = {
    "zero": initializers.zeros,
    "small_normal": SMALL_NORMAL,
    "normal": initializers.normal(1.0),
    "xavier": initializers.xavier_uniform(),
    "xavier_1.73": initializers.variance_scaling(1.73**2, "fan_avg", "uniform"),
}


@dataclasses.dataclass(frozen=True)
class ImageTasks(Record):
    """Tasks of image classification, see `imaml_jax.data.episodes.sample_tasks`."""

    split: Annotated[str, Fixed()] = ""
    """Which classes are for training, validation and test; of photographs the data set's own."""
    invert: bool = False
    """Ink is 1 and paper 0."""
    train_rotations: Rotations | None = None
    """Rotations in training: of each class at random, or turned images as further classes."""
    test_rotations: Rotations | None = None
    """Rotations at validation and test."""
    meta_batch: Count = 4
    """Tasks a meta-step."""
    train_shots: Count = 1
    """Support examples a class in training."""
    train_queries: Count = 15
    """Query examples a class in training."""
    test_queries: Count = 15
    """Query examples a class at validation and test."""
    test_tasks: Count = 600
    """Test tasks."""
    ensemble: Count = 1
    """Best validated checkpoints whose logits are averaged at test, beside the best alone."""

    @property
    def loss_fn(self) -> LossFn:
        """The loss of a batch."""
        return cross_entropy


@dataclasses.dataclass(frozen=True)
class OmniglotTasks(ImageTasks):
    """Tasks of Omniglot."""

    split: OmniglotSplit = "finn"
    """Character split, see `imaml_jax.data.omniglot.load`."""


@dataclasses.dataclass(frozen=True)
class Conv4Settings(Record):
    """Settings of `imaml_jax.networks.conv4`."""

    filters: Count = 64
    """Channels of each block."""
    num_blocks: Annotated[int, Range(least=1, most=100)] = 4
    """Convolutional blocks."""
    downsample: Literal["stride", "max_pool"] = "stride"
    """How a block halves the image."""
    readout: Literal["flatten", "mean"] = "flatten"
    """What the head sees: all positions, or their mean."""
    pool_padding: Literal["valid", "same"] = "valid"
    """An odd last row or column is dropped in max-pooling, or pooled alone."""
    conv_bias: bool = False
    """A bias before the norm."""
    norm_epsilon: Positive = 1e-3
    """Added to the variance in batch norm."""
    activation: Literal["gelu", "leaky_relu", "relu", "silu", "softplus"] = "relu"
    """Activation function of the network."""
    kernel_init: Literal["normal", "xavier", "xavier_1.73", "zero"] = "xavier"
    """Initialisation of the convolutions."""
    head_init: Literal["normal", "xavier", "xavier_1.73", "zero"] = "zero"
    """Initialisation of the head's kernel."""

    def build(self, ways: int) -> Network:
        """The network for so many classes."""
        values = values_of(self)
        return conv4(
            ways,
            epsilon=values.pop("norm_epsilon"),
            activation=getattr(jax.nn, values.pop("activation")),
            kernel_init=_INITIALIZERS[values.pop("kernel_init")],
            head_init=_INITIALIZERS[values.pop("head_init")],
            **values,
        )


@dataclasses.dataclass(frozen=True)
class MlpSettings(Record):
    """Settings of `imaml_jax.networks.mlp`."""

    hidden_layers: Count = 2
    """Hidden layers."""
    hidden_units: Count = 40
    """Units of each hidden layer."""
    kernel_init: Literal["small_normal", "xavier"] = "small_normal"
    """Initialisation of the layers."""

    def build(self, outputs: int) -> Network:
        """The network with so many outputs."""
        widths = [self.hidden_units] * self.hidden_layers
        return mlp([*widths, outputs], kernel_init=_INITIALIZERS[self.kernel_init])


@dataclasses.dataclass(frozen=True)
class OuterSettings(Record):
    """The outer optimiser, and for how long."""

    outer: Literal["adam", "sgd"] = "adam"
    """Outer optimiser."""
    outer_rate: Positive = 1e-3
    """Learning rate of the outer optimiser at the start."""
    outer_epsilon: Annotated[NotNegative, When(lambda own: own.outer == "adam", "outer=sgd")] = 1e-8
    """Adam's epsilon."""
    outer_clip: Positive | None = None
    """Bound on each entry of the meta-gradient but of learned inner rates; None for none."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Schedule of the outer rate; linear ends at 0."""
    final_outer_rate: Annotated[
        NotNegative, When(lambda own: own.schedule == "cosine", "a schedule but cosine")
    ] = 0.0
    """Where a cosine schedule ends."""
    relative_rates: Annotated[bool, Fixed()] = False
    """Learned inner rates move in units of the one that they start from."""
    meta_steps: Count = 60_000
    """Meta-steps in all; the schedule of the outer rate ends there."""

    def build(self) -> optax.GradientTransformation:
        """The optimiser with its schedule."""
        rate = {
            "constant": lambda: self.outer_rate,
            "linear": lambda: optax.linear_schedule(self.outer_rate, 0.0, self.meta_steps),
            "cosine": lambda: optax.cosine_decay_schedule(
                self.outer_rate, self.meta_steps, self.final_outer_rate / self.outer_rate
            ),
        }[self.schedule]()
        outer = optax.sgd(rate)
        if self.outer == "adam":
            outer = optax.adam(rate, eps=self.outer_epsilon)
        if self.outer_clip is None:
            return outer
        return optax.chain(optax.masked(optax.clip(self.outer_clip), _all_but_rates), outer)


@dataclasses.dataclass(frozen=True)
class Protocol(Record):
    """How one algorithm is trained and judged.

    Attributes:
      name: protocol name.
      source: where the numbers come from.
      tasks: what is learned.
      network: what learns it.
      outer: the outer optimiser.
      learner: the algorithm.
    """

    name: Annotated[str, Fixed()]
    source: Annotated[str, Fixed()]
    tasks: Any
    network: Any
    outer: Any
    learner: Any

    def build(self, ways: int = 1) -> MetaLearner:
        """The learner on the network with so many outputs, one for a regressor."""
        return self._settings.build(self.network.build(ways), self.tasks.loss_fn)

    def build_samples(self, ways: int = 1) -> MetaLearner:
        """The same; where it averages samples, `predict` returns the outputs of each."""
        return self._settings.build_samples(self.network.build(ways), self.tasks.loss_fn)

    def build_outer(self) -> optax.GradientTransformation:
        """The outer optimiser."""
        if not self.outer.relative_rates:
            return self.outer.build()
        scale = optax.scale(values_of(self.learner)["inner_rate"])
        return optax.chain(self.outer.build(), optax.masked(scale, learned_rates))

    def recorded(self) -> dict[str, Any]:
        """All of it as one flat mapping that JSON can hold; `from_settings` reads it."""
        named = {"name": self.name, "algorithm": self.learner.algorithm, "source": self.source}
        return named | values_of(self)

    def in_words(self) -> str:
        """All of it as a text, to be printed beside every number."""
        parts = (self.tasks, self.network, self.outer, self.learner)
        return f"protocol {self.name} ({self.source}): {'; '.join(map(words, parts))}"

    @property
    def _settings(self) -> LearnerSettings:
        return self.learner.for_run(self.outer.meta_steps)


_NAMED = {"name", "algorithm", "source", "cg_damping"}
# Names that these settings had in earlier versions.
_RENAMED = {"kernel": "kernel_init", "head": "head_init", "epsilon": "norm_epsilon"}


def from_settings(values: Mapping[str, Any]) -> Protocol:
    """The protocol of image classification whose `recorded` these are.

    Args:
      values: as this version or an earlier one wrote them; what they lack has its default, and
        settings of other algorithms, which earlier versions recorded too, are passed over.

    Raises:
      ValueError: an unknown name or algorithm, or a value that is not of its type and range.
    """
    found = dict(values)
    network = found.pop("network", {})
    if not isinstance(network, Mapping):
        raise ValueError(f"network={network!r:.60} must be a mapping")
    found |= {_RENAMED.get(name, name): value for name, value in network.items()}
    algorithm = settings_class(str(found.get("algorithm")))
    if found.get("cg_damping") is not None:
        algorithm = ImamlDevSettings
    if found.pop("adapts_norm", True) is False and values_of(algorithm())["adapts"] == "all":
        found["adapts"] = "not_norms"
    is_omniglot = found.get("split") in get_args(OmniglotSplit)
    parts: dict[str, Any] = {
        "tasks": OmniglotTasks if is_omniglot else ImageTasks,
        "network": Conv4Settings,
        "outer": OuterSettings,
        "learner": algorithm,
    }
    names = {part: _names(kind) for part, kind in parts.items()}
    known = set().union(*names.values(), *map(_names, ALGORITHMS.values()), _NAMED)
    for name in found:
        if name not in known:
            raise ValueError(f"{name} is no setting of a protocol{nearest(name, known)}")
    made = {
        part: kind(**{name: value for name, value in found.items() if name in names[part]})
        for part, kind in parts.items()
    }
    for name in ("name", "source"):
        check_value(name, found.get(name), str)
    return Protocol(found["name"], found["source"], **made)


def _names(record: type) -> set[str]:
    return {field.name for field in dataclasses.fields(record)}


def _all_but_rates(meta_params: Any) -> Any:
    return jax.tree.map(operator.not_, learned_rates(meta_params))
