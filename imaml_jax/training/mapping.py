"""Task batches: how they are drawn from a key, and how a function is mapped over them."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from imaml_jax.types import Array, PyTree, Task

Sample = Callable[[Array], Task]
MapTasks = str | int | None
Devices = Sequence[Any] | None  # of jax.Device

_AXIS = "tasks"


def draw_tasks(sample: Sample, root_key: Array, index: Array | int) -> tuple[Task, Array]:
    """Draws task batch number `index` of the stream that `root_key` names.

    Training calls it with the meta-step and evaluation with the number of the chunk, so that call
    reproduces any batch that either has ever seen.

    Args:
      sample: `key -> Task` whose arrays have a leading task axis of fixed length.
      root_key: the key of the whole stream.
      index: the number of the batch, at least 0; may be traced.

    Returns:
      `(tasks, keys)`, where `keys` holds one key a task.
    """
    sample_key, task_key = jax.random.split(jax.random.fold_in(root_key, index))
    tasks = sample(sample_key)
    return tasks, jax.random.split(task_key, num_tasks_of(tasks))


def num_tasks_of(tasks: PyTree) -> int:
    """The length of the leading task axis of `tasks` (arrays or their shapes).

    Raises:
      ValueError: if the leaves have no common leading axis.
    """
    shapes = [leaf.shape for leaf in jax.tree.leaves(tasks)]
    lengths = {shape[0] if shape else 0 for shape in shapes}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            f"sample must return a Task whose arrays share a leading task axis of at least 1; "
            f"got the shapes {shapes}"
        )
    return lengths.pop()


def replicated(devices: Sequence[Any]) -> NamedSharding:
    """The sharding that keeps a full copy of an array on each of `devices`."""
    return NamedSharding(Mesh(np.asarray(devices), (_AXIS,)), PartitionSpec())


def replicate(tree: PyTree, devices: Sequence[Any]) -> PyTree:
    """A full copy of the arrays on each of `devices`, of which other processes may own some.

    There, every process must bring the same arrays.
    """
    sharding = replicated(devices)
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)

    def spread(x: Any) -> Array:
        if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return jax.random.wrap_key_data(
                spread(jax.random.key_data(x)), impl=jax.random.key_impl(x)
            )
        whole = np.asarray(jax.device_get(x))
        return jax.make_array_from_callback(whole.shape, sharding, lambda index: whole[index])

    return jax.tree.map(spread, tree)


def map_over_tasks(
    fn: Callable[..., Any],
    map_tasks: MapTasks = None,
    devices: Devices = None,
) -> Callable[..., Any]:
    """Maps `fn(shared, *per_task)` over the leading axis of its arguments after the first.

    Args:
      fn: a function of a pytree that all tasks share and of the arguments of one task.
      map_tasks: "vmap" maps all tasks at once, "map" one after another (`lax.map`), an integer `n`
        in chunks of `n`. None (default) takes "map" on the CPU, where batched weights are slow,
        and "vmap" elsewhere.
      devices: devices over which the task axis is sharded. None (default) leaves the
        placement to JAX. On a CPU, `XLA_FLAGS=--xla_force_host_platform_device_count=2` makes two
        devices of one machine, so that two tasks run side by side.

    Returns:
      A function of the same arguments, where those after the first have a leading task axis, whose
      outputs all have a leading task axis.

    Raises:
      ValueError: if `map_tasks` is none of the above or `devices` is empty or repeats a device;
        when called, if the number of devices does not divide the number of tasks.
    """
    if devices is not None and (len(devices) == 0 or len(set(devices)) != len(devices)):
        raise ValueError(f"devices must be None or distinct devices, at least 1; got {devices}")
    platform = devices[0].platform if devices else jax.default_backend()
    mapped = _local_map(fn, map_tasks, platform)
    if devices is None:
        return mapped
    mesh = replicated(devices).mesh

    def sharded(shared: PyTree, *per_task: PyTree) -> Any:
        num_tasks = num_tasks_of(per_task)
        if num_tasks % len(devices):
            raise ValueError(
                f"devices must divide the tasks of a batch; got {len(devices)} devices and "
                f"{num_tasks} tasks: change either number"
            )
        split = PartitionSpec(_AXIS)
        in_specs = (PartitionSpec(), *[split] * len(per_task))
        # check_vma would sum gradients in `shared` over the devices; we want those of each task. It
        # would also refuse Optax transforms whose state begins the same on all devices.
        run = jax.shard_map(mapped, mesh=mesh, in_specs=in_specs, out_specs=split, check_vma=False)
        return run(shared, *per_task)

    return sharded


def _local_map(fn: Callable[..., Any], map_tasks: MapTasks, platform: str) -> Callable[..., Any]:
    if map_tasks is None:
        map_tasks = "map" if platform == "cpu" else "vmap"
    if map_tasks == "vmap":
        return lambda shared, *per_task: jax.vmap(lambda args: fn(shared, *args))(per_task)
    size = None if map_tasks == "map" else map_tasks
    if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
        raise ValueError(
            f'map_tasks must be None, "vmap", "map" or a chunk of at least 1 task; got {size!r}'
        )
    return lambda shared, *per_task: jax.lax.map(
        lambda args: fn(shared, *args), per_task, batch_size=size
    )


def jit_lifted(
    fn: Callable[..., Any],
    *,
    donate_argnum: int | None = None,
    devices: Devices = None,
) -> Callable[..., Any]:
    """`jax.jit` that takes the arrays that `fn` closes over as arguments of the program.

    `jit` copies them into the program, so that a data set behind `sample` would be compiled with
    it: seconds and a second copy in memory for every hundred megabytes. (Arrays that a function
    which is itself jitted closes over stay in the program: leave `sample` unjitted.)

    Args:
      fn: a traceable function of pytrees of arrays.
      donate_argnum: the argument whose buffers the outputs may take over; None (default) for none.
      devices: where those arrays are copied to, once, and the outputs; None (default) leaves them
        where they are.

    Returns:
      A function like `fn`, traced and compiled once for each set of shapes and dtypes.
    """
    programs = {}
    donated = () if donate_argnum is None else (donate_argnum + 1,)

    def call(*args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        signature = (structure, *(jax.typeof(leaf) for leaf in leaves))
        if signature not in programs:
            lifted, constants = _lift_constants(fn, *args)
            constants = replicate(constants, devices) if devices else jax.device_put(constants)
            jit = partial(jax.jit, donate_argnums=donated)
            jit = partial(jit, out_shardings=replicated(devices)) if devices else jit
            programs[signature] = jit(lifted), constants
        program, constants = programs[signature]
        return program(constants, *args)

    return call


def _lift_constants(fn: Callable[..., Any], *args: Any) -> tuple[Callable[..., Any], list[Array]]:
    closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
    structure = jax.tree.structure(out)

    def lifted(constants: list[Array], *args: Any) -> Any:
        flat = jax.core.eval_jaxpr(closed.jaxpr, constants, *jax.tree.leaves(args))
        return jax.tree.unflatten(structure, flat)

    return lifted, closed.consts
