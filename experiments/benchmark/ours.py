"""This library's contenders: `python -m experiments.benchmark.ours NAME`, run by the benchmark."""

import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.tree_util import tree_leaves_with_path

import imaml_jax
from experiments import common
from experiments.benchmark import workload
from imaml_jax.learners.base import path_string
from imaml_jax.mapping import map_over_tasks, replicated
from imaml_jax.networks import conv4
from imaml_jax.types import Batch, MetaLearner, Task

MATMUL, MATRIX = "matmul", 1536


def learners() -> dict[str, MetaLearner]:
    """The learners timed, by name."""
    network = conv4(workload.WAYS, filters=workload.FILTERS, epsilon=workload.EPSILON)
    loss = imaml_jax.cross_entropy
    descent: dict[str, Any] = {
        "inner": optax.sgd(workload.INNER_RATE),
        "num_steps": workload.INNER_STEPS,
    }
    newton: dict[str, Any] = {
        "inner": imaml_jax.newton_cg(max_cg_steps=workload.CG_STEPS),
        "num_steps": 3,
    }
    cg: dict[str, Any] = {"tol": 0.0, "max_steps": workload.CG_STEPS}
    steihaug: dict[str, Any] = {"solve": partial(imaml_jax.solve_cg_steihaug, **cg)}
    plain: dict[str, Any] = {"solve": partial(imaml_jax.solve_cg, **cg)}
    woodbury: dict[str, Any] = {"solve": imaml_jax.solve_woodbury}
    gauss_newton: dict[str, Any] = {"curvature": "gauss_newton"}
    imaml = partial(imaml_jax.imaml, network, loss, reg_strength=workload.REG_STRENGTH)
    return {
        "iMAML, Hessian, solve_cg_steihaug": imaml(**descent, **steihaug),
        "iMAML, Hessian, solve_cg": imaml(**descent, **plain),
        "iMAML, Gauss-Newton, solve_cg_steihaug": imaml(**descent, **steihaug, **gauss_newton),
        "iMAML, Gauss-Newton, solve_woodbury": imaml(**descent, **woodbury, **gauss_newton),
        "iMAML, Hessian-free": imaml(**newton, **steihaug, **gauss_newton),
        "MAML": imaml_jax.maml(network, loss, **descent),
        "MAML, no recomputation": imaml_jax.maml(network, loss, **descent, remat=False),
        "first-order MAML": imaml_jax.fomaml(network, loss, **descent),
        "Reptile": imaml_jax.reptile(network, loss, **descent, statistics="batch"),
    }


def meta_step(name: str, num_devices: int | None) -> workload.Contender:
    """The meta-gradient averaged over tasks, sharded over the devices."""
    learner = learners()[name]
    devices = jax.local_devices()[:num_devices]
    devices = devices if len(devices) > 1 else None
    place = replicated(devices) if devices else None
    params = jax.device_put(nested(workload.params()), place)
    program = None

    def prepare(tasks):
        nonlocal program
        inputs = jax.block_until_ready(jax.device_put(_task(tasks), place))
        if program is None:
            program = (
                jax.jit(partial(_mean_gradient, learner, devices)).lower(params, inputs).compile()
            )
        return inputs

    def run(inputs):
        assert program is not None
        return jax.block_until_ready(program(params, inputs))

    def gradients(tasks):
        # LLVM's optimisations would take longer than they save.
        options = {"xla_backend_optimization_level": 0}
        with jax.enable_x64(True):
            inputs = jax.tree.map(lambda x: jnp.asarray(x, _double(x)), (params, _task(tasks)))
            check = jax.jit(partial(_mean_gradient, learner, None), compiler_options=options)
            leaves = tree_leaves_with_path(check(*inputs))
        return {path_string(path): np.asarray(leaf) for path, leaf in leaves}

    def temp_bytes():
        analysis = program and program.memory_analysis()
        return analysis.temp_size_in_bytes if analysis else None

    return workload.Contender(prepare, run, gradients, temp_bytes)


def matmul(num_devices: int | None) -> workload.Contender:
    """One matrix product a device, all at once: the ceiling."""
    devices = jax.local_devices()[:num_devices]
    devices = devices if len(devices) > 1 else None
    lanes = jnp.zeros(len(devices) if devices else 1)
    program = jax.jit(lambda a: map_over_tasks(lambda a, _: a @ a, None, devices)(a, lanes))

    def prepare(tasks):
        matrix = jnp.resize(jnp.asarray(tasks[1][0]), (MATRIX, MATRIX))
        return jax.block_until_ready(
            jax.device_put(matrix, replicated(devices) if devices else None)
        )

    return workload.Contender(prepare, lambda a: jax.block_until_ready(program(a)))


def nested(named: dict[str, np.ndarray]) -> dict[str, dict[str, jax.Array]]:
    """Parameters by path as the tree that conv4 takes."""
    tree: dict[str, dict[str, jax.Array]] = {}
    for path, array in named.items():
        module, name = path.split("/")
        tree.setdefault(module, {})[name] = jnp.asarray(array)
    return tree


def _mean_gradient(learner: MetaLearner, devices, params: Any, tasks: Task) -> Any:
    one = partial(common.meta_gradient, learner)
    return jax.tree.map(lambda g: g.mean(0), map_over_tasks(one, None, devices)(params, tasks))


def _task(tasks: workload.Tasks) -> Task:
    return Task(*(Batch(jnp.asarray(images), jnp.asarray(labels)) for images, labels in tasks))


def _double(x: jax.Array) -> Any:
    return jnp.float64 if jnp.issubdtype(x.dtype, jnp.floating) else x.dtype


if __name__ == "__main__":
    common.cache_compilations()
    wanted, count = sys.argv[1], int(sys.argv[2]) or None
    workload.serve(matmul(count) if wanted == MATMUL else meta_step(wanted, count))
