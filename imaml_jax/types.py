"""The records that every other module speaks in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Array = jax.Array
PyTree = Any
Params = Any


class Batch(NamedTuple):
    """Examples of a supervised problem.

    Attributes:
      inputs: `[n, ...]`.
      targets: `[n]` integer labels, or `[n, ...]` regression targets.
    """

    inputs: Array
    targets: Array


class Task(NamedTuple):
    """A few-shot task: adapt on `support`, be judged on `query`.

    `sample_tasks` returns a `Task` whose arrays have a leading task axis; learners take one task.
    """

    support: Any
    query: Any


class LowRank(NamedTuple):
    """The pieces of `J^T S J` that a Woodbury solve needs.

    Attributes:
      jacobian: `[m, P]`, the derivative of the `m` raveled outputs in the `P` raveled parameters.
      output_hessian: `[m, m]`, the Hessian of the loss in the raveled outputs.
    """

    jacobian: Array
    output_hessian: Array


class LinearOperator(NamedTuple):
    """A linear map on parameter-shaped pytrees, `A = B + diag(sum of dampings)`.

    Most solvers of `linear_solve` need a symmetric one. Wherever one is asked for, a function
    `v -> A v` or, for vectors, a matrix will do.

    Attributes:
      matvec: `v -> A v`; input and output share their tree structure, shapes and dtypes, unless
        `domain` is given.
      factor: where `B` is low-rank, a function of no arguments that returns its `LowRank` pieces. A
        function, so that nothing of size `m x P` exists until it is asked for.
      dampings: what `damped` added to the diagonal, each a scalar or a tree prefix of the
        parameters.
      domain: a tree with the shapes and dtypes of `v`, such as of `jax.ShapeDtypeStruct`, where
        they are not those of `A v`: for matrices that are not square.
      transposed: whether this is the transpose of the matrix that a solver's settings, such as a
        preconditioner, are made for.
    """

    matvec: Callable[[PyTree], PyTree]
    factor: Callable[[], LowRank] | None = None
    dampings: tuple[PyTree, ...] = ()
    domain: PyTree = None
    transposed: bool = False


# What a solver takes for `A`: an operator, a function `v -> A v`, or a matrix `[m, n]`.
Operator = LinearOperator | Callable[[PyTree], PyTree] | Array | np.ndarray


class Environment(NamedTuple):
    """A task of reinforcement learning as a record of pure functions of one trajectory.

    Randomness of the transitions follows from a key that `reset` keeps in the state.

    Attributes:
      reset: `(key, task) -> (state, observation)`.
      step: `(state, action, task) -> (state, observation, reward, done)`; a trajectory ends
        with the step that is done.
      horizon: most steps of a trajectory.
    """

    reset: Callable[[Array, PyTree], tuple[PyTree, Array]]
    step: Callable[[PyTree, Array, PyTree], tuple[PyTree, Array, Array, Array]]
    horizon: int


class MetaLearner(NamedTuple):
    """A meta-learning algorithm as a record of pure functions, made by a factory such as `imaml`.

    Attributes:
      init: `(key, example_inputs) -> meta_params`.
      adapt: `(meta_params, support, key) -> (adapted, info)` with the evaluation settings.
        `adapted` is any pytree; only `predict` looks into it.
      predict: `(adapted, inputs) -> outputs`.
      meta_grad: `(meta_params, task, key, step) -> (grads, info)` with the training settings, for
        one task. `grads` has the structure of `meta_params`; feed its mean over tasks to Optax.

    `info` is a NamedTuple of scalars (None where a quantity does not exist).
    """

    init: Callable[[Array, Any], PyTree]
    adapt: Callable[[PyTree, Any, Array], tuple[PyTree, Any]]
    predict: Callable[[PyTree, Any], Any]
    meta_grad: Callable[[PyTree, Task, Array, Array], tuple[PyTree, Any]]
