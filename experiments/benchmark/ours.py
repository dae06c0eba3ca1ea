"""Our contenders: `python -m experiments.benchmark.ours NAME DEVICES SIZE`, of the benchmark."""

import functools
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.traverse_util import flatten_dict, unflatten_dict

import imaml_jax
from experiments.benchmark import workload
from experiments.shared import common, reports
from imaml_jax.learners.base import is_head
from imaml_jax.networks import conv4
from imaml_jax.training.mapping import map_over_tasks, replicated
from imaml_jax.types import Batch, MetaLearner, Task


def learners(size: workload.Size = workload.REFERENCE) -> dict[str, MetaLearner]:
    """The learners timed, by name."""
    network = conv4(
        workload.WAYS,
        filters=size.filters,
        downsample="max_pool" if size.pools else "stride",
        epsilon=workload.EPSILON,
    )
    loss = imaml_jax.cross_entropy
    cg: dict[str, Any] = {"tol": 0.0, "max_steps": workload.CG_STEPS}
    steihaug = partial(imaml_jax.solve_cg_steihaug, **cg)
    newton = imaml_jax.newton_cg(max_cg_steps=workload.CG_STEPS)
    sgd = optax.sgd(workload.INNER_RATE)
    descent: dict[str, Any] = {"inner": sgd, "num_steps": size.inner_steps}
    imaml = partial(
        imaml_jax.imaml,
        network,
        loss,
        inner=sgd,
        num_steps=size.implicit_steps,
        reg_strength=size.reg_strength,
        solve=steihaug,
    )
    gauss_newton = partial(imaml, curvature="gauss_newton")
    return {
        "iMAML, Hessian, solve_cg_steihaug": imaml(),
        "iMAML, Hessian, solve_cg": imaml(solve=partial(imaml_jax.solve_cg, **cg)),
        "iMAML, Gauss-Newton, solve_cg_steihaug": gauss_newton(),
        "iMAML, Gauss-Newton, solve_woodbury": gauss_newton(solve=imaml_jax.solve_woodbury),
        "iMAML, Hessian-free, 3 Newton steps": gauss_newton(inner=newton, num_steps=3),
        "MAML": imaml_jax.maml(network, loss, **descent),
        "MAML, no recomputation": imaml_jax.maml(network, loss, **descent, remat=False),
        "first-order MAML": imaml_jax.fomaml(network, loss, **descent),
        "implicit ANIL": imaml(fast=is_head),
        "Reptile": imaml_jax.reptile(network, loss, **descent, statistics="batch"),
    }


def meta_gradient(
    name: str, num_devices: int, size: workload.Size = workload.REFERENCE
) -> workload.Program:
    """The meta-gradient averaged over tasks, sharded over the devices, and the mean report."""
    learner = learners(size)[name]
    devices, place = _places(num_devices)
    params = jax.device_put(unflatten_dict(workload.params(size), sep="/"), place)

    def prepare(tasks):
        return jax.block_until_ready(jax.device_put(_task(tasks), place))

    @functools.cache
    def program():
        example = prepare(workload.tasks(0, size))
        return jax.jit(partial(_means, learner, devices)).lower(params, example).compile()

    def run(inputs):
        _, info = jax.block_until_ready(program()(params, inputs))
        return {name: float(value) for name, value in info._asdict().items() if value is not None}

    def gradients(tasks):
        with jax.enable_x64(True):
            inputs = common.in_float64((params, _task(tasks)))
            grads, _ = reports.jit_small(partial(_means, learner, None))(*inputs)
        return {path: np.asarray(leaf) for path, leaf in flatten_dict(grads, sep="/").items()}

    def temp_bytes():
        analysis = program().memory_analysis()
        return num_devices * analysis.temp_size_in_bytes if analysis else None

    return workload.Program(prepare, run, gradients, temp_bytes, lambda: program().as_text())


def matmul(num_devices: int) -> workload.Program:
    """Matrix products one after another on every device, all devices at once: the ceiling."""
    devices, place = _places(num_devices)
    product = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
    mapped = map_over_tasks(lambda a, _: product(a, a), None, devices)
    program = jax.jit(lambda a: mapped(a, jnp.zeros(num_devices)))

    def prepare(tasks):
        matrix = jnp.resize(jnp.asarray(tasks[1][0]), (workload.MATRIX, workload.MATRIX))
        return jax.block_until_ready(jax.device_put(matrix, place))

    def run(a):
        for _ in range(workload.PRODUCTS):
            jax.block_until_ready(program(a))
        return {}

    return workload.Program(prepare, run)


def _places(num_devices: int) -> tuple[Any, Any]:
    """The devices and where arrays are on them; None twice for one alone."""
    devices = jax.local_devices()[:num_devices] if num_devices > 1 else None
    return devices, replicated(devices) if devices else None


def _means(learner: MetaLearner, devices: Any, params: Any, tasks: Task) -> Any:
    def of_task(params, task):
        return learner.meta_grad(params, task, jax.random.key(0), jnp.zeros((), jnp.int32))

    return common.mean_over_tasks(of_task, None, devices)(params, tasks)


def _task(tasks: workload.Tasks) -> Task:
    return Task(*(Batch(jnp.asarray(images), jnp.asarray(labels)) for images, labels in tasks))


if __name__ == "__main__":
    common.cache_compilations()
    wanted, count, size = sys.argv[1], int(sys.argv[2]), workload.SIZES[sys.argv[3]]
    one = matmul(count) if wanted == workload.MATMUL else meta_gradient(wanted, count, size)
    workload.serve(one, size)
