"""Few-shot classification tasks, sampled on the device from a labelled image set."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from imaml_jax.types import Array, Batch, Task

ROTATIONS = (None, "classes", "augment")


class Dataset(NamedTuple):
    """Images grouped by class; classes may differ in size.

    Attributes:
      images: `[N, H, W, C]`. uint8 as a rule; integer images are scaled to [0, 1] by the largest
        value of their type when a task is sampled, floating-point images are taken as they are.
      offsets: int32 `[num_classes + 1]`; class `c` owns `images[offsets[c]:offsets[c + 1]]`.
    """

    images: "Array | HostImages"
    offsets: Array


@jax.tree_util.register_static
class HostImages:
    """Images `[N, H, W, C]` that stay in the host's memory, or in a mapped file.

    Those of the tasks drawn are sent to the device, batch by batch. For sets that are too large for
    the device; `from_grouped` chooses it there. Slower than images on the device, and the same
    tasks.
    """

    def __init__(self, images: np.ndarray):
        self.images, self.shape, self.dtype = images, images.shape, images.dtype

    def take(self, indices: Array) -> Array:
        """`images[indices]`, on the device."""
        found = jax.ShapeDtypeStruct((*indices.shape, *self.shape[1:]), self.dtype)
        return jax.pure_callback(
            lambda i: self.images[np.clip(np.asarray(i), 0, len(self.images) - 1)],
            found,
            indices,
            vmap_method="broadcast_all",
        )


class Splits(NamedTuple):
    """Three sets with no class in common; `val` is None where a protocol has none."""

    train: Dataset
    val: Dataset | None
    test: Dataset


def num_classes(dataset: Dataset) -> int:
    """Returns the number of classes of `dataset`, rotations not counted."""
    return dataset.offsets.shape[0] - 1


def from_class_arrays(class_arrays: Sequence[np.ndarray] | np.ndarray) -> Dataset:
    """Makes a `Dataset` of one array per class.

    Args:
      class_arrays: arrays `[n_c, H, W, C]` that share their dtype and everything but `n_c`.

    Returns:
      A `Dataset`, its arrays on the default device.

    Raises:
      ValueError: no class, a class without images, or shapes or dtypes that differ.
    """
    if len(class_arrays) == 0:
        raise ValueError("class_arrays is empty: give one array [n, H, W, C] for each class.")
    first = class_arrays[0]
    for index, array in enumerate(class_arrays):
        if array.ndim != 4 or array.shape[0] < 1:
            raise ValueError(
                f"class_arrays[{index}] has shape {array.shape}; expected [n, H, W, C] with n >= "
                "1. Add a channel axis to grey images; leave empty classes out."
            )
        if array.shape[1:] != first.shape[1:] or array.dtype != first.dtype:
            raise ValueError(
                f"class_arrays[{index}] is {array.dtype}{array.shape}, class_arrays[0] is "
                f"{first.dtype}{first.shape}: all classes must share dtype and [H, W, C]; resize "
                "or convert before."
            )
    return from_grouped(np.concatenate(class_arrays), np.cumsum([0, *map(len, class_arrays)]))


def from_grouped(images: np.ndarray, offsets: np.ndarray) -> Dataset:
    """Makes a `Dataset` of images that are grouped by class already, without a needless copy.

    On the CPU the data set may share its memory with `images`: do not change them afterwards. A
    memory-mapped file is then read as tasks are drawn from it. Elsewhere images that would fill
    more than a quarter of the device's memory stay where they are, see `HostImages`.

    Args:
      images: `[N, H, W, C]`.
      offsets: integers `[num_classes + 1]`, as in `Dataset`.

    Returns:
      A `Dataset`.

    Raises:
      ValueError: shapes or offsets that are no grouping into classes of one image or more.
    """
    offsets = np.asarray(offsets)
    if images.ndim != 4:
        raise ValueError(
            f"images have shape {images.shape}; expected [N, H, W, C]. Add a channel axis to grey "
            "images."
        )
    if offsets.ndim != 1 or len(offsets) < 2 or np.any(np.diff(offsets) < 1):
        raise ValueError(f"offsets={offsets}; expected [num_classes + 1] integers that increase.")
    if offsets[0] != 0 or offsets[-1] != len(images):
        raise ValueError(
            f"offsets run from {offsets[0]} to {offsets[-1]}; expected 0 to {len(images)}, the "
            "number of images."
        )
    memory = _device_memory()
    is_large = memory is not None and images.nbytes > memory / 4
    placed = HostImages(images) if is_large else jax.device_put(images)
    return Dataset(placed, jnp.asarray(offsets.astype(np.int32)))


def _device_memory() -> int | None:
    """Bytes of the default device, where it tells."""
    (device,) = jnp.zeros(()).devices()
    return (device.memory_stats() or {}).get("bytes_limit")


def check_task_shape(
    dataset: Dataset, *, ways: int, shots: int, queries: int, rotations: str | None = None
) -> None:
    """Checks that tasks of this shape exist in `dataset`; call it once, before `jit`.

    `sample_tasks` calls it by itself. Where the data set is an argument of a jitted function the
    class sizes are unknown at trace time, and not checked: hence this function.

    Args:
      dataset: the `Dataset`, with concrete offsets.
      ways: classes in a task.
      shots: support examples of each class.
      queries: query examples of each class.
      rotations: as in `sample_tasks`.

    Raises:
      ValueError: a value is out of range, or the smallest class has fewer than `shots + queries`
        images.
    """
    if rotations not in ROTATIONS:
        raise ValueError(f"rotations={rotations!r}; allowed: {', '.join(map(repr, ROTATIONS))}.")
    check_counts(shots=shots, queries=queries)
    (images, height, width, _), total = dataset.images.shape, num_classes(dataset)
    if rotations is not None and height != width:
        raise ValueError(
            f"rotations={rotations!r} needs square images, these are {height}x{width}: crop or pad "
            "them to a square, or use rotations=None."
        )
    available = 4 * total if rotations == "classes" else total
    if not 1 <= ways <= available:
        raise ValueError(
            f"ways={ways}; allowed: 1 to {available}, the number of classes ({total} in the data "
            f"set, rotations={rotations!r}). Lower ways or use a split with more classes."
        )
    largest = images - (total - 1)  # where every other class has one image
    if shots + queries > largest:
        raise ValueError(
            f"shots + queries = {shots} + {queries} = {shots + queries}; allowed: up to {largest}, "
            f"the most that any of {total} classes with {images} images together can have. Lower "
            "shots or queries."
        )
    if isinstance(dataset.offsets, Tracer):
        return
    sizes = np.diff(np.asarray(dataset.offsets))
    smallest = int(sizes.argmin())
    if shots + queries > sizes[smallest]:
        raise ValueError(
            f"shots + queries = {shots} + {queries} = {shots + queries}, but class {smallest} has "
            f"only {sizes[smallest]} images (the largest class has {sizes.max()}). Lower shots or "
            "queries, or leave the small classes out of the data set."
        )


def sample_tasks(
    key: Array,
    dataset: Dataset,
    *,
    num_tasks: int,
    ways: int,
    shots: int,
    queries: int,
    rotations: str | None = None,
    invert: bool = False,
) -> Task:
    """Samples a meta-batch of N-way K-shot tasks.

    Classes are drawn without replacement, in random order, so that a label means nothing outside
    its task; then examples of each class without replacement, so that support and query are
    disjoint. Both use Floyd's algorithm, whose cost depends on the numbers drawn and not on the
    data set, and which takes class sizes as they come. Pure and jit-able: everything follows from
    `key`.

    A class that is smaller than `shots + queries` and met under `jit` with traced offsets turns the
    inputs of its task into NaN rather than borrow images of another class; `check_task_shape` finds
    it beforehand.

    Args:
      key: PRNG key.
      dataset: `Dataset`.
      num_tasks: size of the leading axis.
      ways: classes in a task.
      shots: support examples of each class.
      queries: query examples of each class.
      rotations: None; "classes", where every class turned by 0, 90, 180 and 270 degrees counts as
        four classes; or "augment", where every selected class is turned by one random multiple of
        90 degrees. Images are turned after they are gathered: no turned copy of the data set
        exists.
      invert: whether to return `1 - x`, for ink of value 1 on a ground of 0 where it is stored the
        other way round.

    Returns:
      A `Task`: support inputs float32 `[num_tasks, ways * shots, H, W, C]` and targets int32
      `[num_tasks, ways * shots]`, sorted by label; query likewise with `ways * queries`.

    Raises:
      ValueError: a value is out of range; raised at trace time.

    References:
      Vinyals et al., Matching Networks for One Shot Learning, https://arxiv.org/abs/1606.04080
      Santoro et al., Meta-Learning with Memory-Augmented Neural Networks, 2016 (rotated classes)
    """
    check_counts(num_tasks=num_tasks)
    check_task_shape(dataset, ways=ways, shots=shots, queries=queries, rotations=rotations)
    total, per_class = num_classes(dataset), shots + queries

    # One call of the generator for everything: it is most of what there is to compile.
    bits = jax.random.bits(key, (num_tasks, ways * (3 + 2 * per_class)), jnp.uint32)
    turn_bits, class_bits, example_bits = jnp.split(bits, [ways, 3 * ways], axis=1)
    class_bits = class_bits.reshape(num_tasks, 2, ways)
    example_bits = example_bits.reshape(num_tasks, 2, ways, per_class)

    if rotations == "classes":
        chosen = _draw_distinct(class_bits, jnp.full((num_tasks,), 4 * total, jnp.int32))
        classes, turns = chosen // 4, chosen % 4
    else:
        classes = _draw_distinct(class_bits, jnp.full((num_tasks,), total, jnp.int32))
        turns = (turn_bits % 4).astype(jnp.int32)
    starts = dataset.offsets[classes]
    sizes = dataset.offsets[classes + 1] - starts  # [num_tasks, ways]
    indices = starts[..., None] + _draw_distinct(example_bits, sizes)
    enough = jnp.all(sizes >= per_class, axis=1)

    def gather(indices):  # [num_tasks, ways, n] -> float32 [num_tasks, ways * n, H, W, C]
        n = indices.shape[-1]
        indices = indices.reshape(num_tasks, ways * n)
        images = take(dataset, indices)
        if rotations is not None:
            images = _rotate(images, jnp.repeat(turns, n, axis=1, total_repeat_length=ways * n))
        images = to_unit(images, invert)
        return jnp.where(_expand(enough, images.ndim), images, jnp.float32(jnp.nan))

    def batch(indices):
        n = indices.shape[-1]
        labels = jnp.repeat(jnp.arange(ways, dtype=jnp.int32), n, total_repeat_length=ways * n)
        return Batch(gather(indices), jnp.broadcast_to(labels, (num_tasks, ways * n)))

    return Task(support=batch(indices[..., :shots]), query=batch(indices[..., shots:]))


def _draw_distinct(bits: Array, total: Array) -> Array:
    """Turns random bits `[t, 2, ..., n]` into `n` distinct integers below `total [t, ...]`.

    Floyd's algorithm gives a uniform subset (Bentley and Floyd, CACM 1987), sorting by the other
    half of the bits a uniform order. `total` may be traced; only `n` is static. Reducing 32 bits
    modulo `total` leaves a bias below `total / 2**32`.

    Returns:
      int32 `[t, ..., n]`.
    """
    count = bits.shape[-1]
    bits, order_bits = bits[:, 0], bits[:, 1]
    places = jnp.arange(count, dtype=jnp.int32).reshape((1,) * total.ndim + (count,))
    last = total[..., None] - count + places
    draws = (bits % jnp.maximum(last + 1, 1).astype(jnp.uint32)).astype(jnp.int32)

    def step(chosen, i):
        draw = jax.lax.dynamic_index_in_dim(draws, i, axis=-1)
        fallback = jax.lax.dynamic_index_in_dim(last, i, axis=-1)
        taken = jnp.any(chosen == draw, axis=-1, keepdims=True)
        value = jnp.where(taken, fallback, draw)
        return jax.lax.dynamic_update_index_in_dim(chosen, value, i, axis=-1), None

    chosen = jnp.full(draws.shape, -1, jnp.int32)
    chosen, _ = jax.lax.scan(step, chosen, jnp.arange(count))
    return jnp.take_along_axis(chosen, jnp.argsort(order_bits, axis=-1), axis=-1)


def _rotate(images: Array, turns: Array) -> Array:
    """Turns `images [..., H, W, C]` counter-clockwise by `turns [...]` times 90 degrees."""
    turns = _expand(turns, images.ndim)
    axes = (images.ndim - 3, images.ndim - 2)
    options = [jnp.rot90(images, k, axes) for k in range(4)]
    return jnp.select([turns == k for k in range(3)], options[:3], options[3])


def take(dataset: Dataset, indices: Array) -> Array:
    """Images of a data set as they are stored, `[..., H, W, C]` for `indices [...]`."""
    if isinstance(dataset.images, HostImages):
        return dataset.images.take(indices)
    return jnp.take(dataset.images, indices, axis=0, mode="clip")


def to_unit(images: Array, invert: bool = False) -> Array:
    """Images as the networks take them: float32, integers scaled to [0, 1] by their largest value.

    A product, since compilers make one of a division, and not all of them and not everywhere.

    Args:
      images: of any shape.
      invert: whether to turn dark and light round.

    Returns:
      float32, of the same shape.
    """
    scaled = images.astype(jnp.float32)
    if jnp.issubdtype(images.dtype, jnp.integer):
        scaled = scaled * jnp.float32(1 / jnp.iinfo(images.dtype).max)
    return 1.0 - scaled if invert else scaled


def _expand(x: Array, ndim: int) -> Array:
    return x.reshape(x.shape + (1,) * (ndim - x.ndim))


def check_counts(**counts: int) -> None:
    """Raises ValueError for the first of the counts that is below 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value}; allowed: 1 or more.")
