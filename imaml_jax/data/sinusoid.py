"""Regression tasks: sinusoids of random amplitude, phase and frequency."""

import math

import jax
import jax.numpy as jnp

from imaml_jax.data.episodes import check_counts
from imaml_jax.types import Array, Batch, Task


def sample_tasks(
    key: Array,
    *,
    num_tasks: int,
    shots: int,
    queries: int,
    amplitude: tuple[float, float] = (0.1, 5.0),
    phase: tuple[float, float] = (0.0, math.pi),
    frequency: tuple[float, float] = (1.0, 1.0),
    inputs: tuple[float, float] = (-5.0, 5.0),
    noise: float = 0.0,
    relative_noise: float = 0.0,
) -> Task:
    """Samples a meta-batch of sinusoid regression tasks.

    `y = A sin(w x - p) + (noise + relative_noise A) e` with one `A`, `p` and `w` a task, these and
    `x` uniform in the given ranges and `e` standard normal. Pure and jit-able: everything follows
    from `key`. The defaults are those of MAML; BMAML has phases in [0, 2 pi], frequencies in
    [0.5, 2] and a relative noise of 0.01.

    Args:
      key: PRNG key.
      num_tasks: size of the leading axis.
      shots: support examples.
      queries: query examples.
      amplitude: range of `A`.
      phase: range of `p`, in radians.
      frequency: range of `w`.
      inputs: range of `x`.
      noise: standard deviation of the noise on the targets.
      relative_noise: what it has beyond that, as a share of the amplitude.

    Returns:
      A `Task`: support inputs and targets float `[num_tasks, shots, 1]`, query likewise with
      `queries`; float32 unless JAX's 64-bit mode is on.

    Raises:
      ValueError: a value is out of range; raised at trace time.

    References:
      Finn, Abbeel, Levine, Model-Agnostic Meta-Learning, https://arxiv.org/abs/1703.03400, 5.1
      Yoon et al., Bayesian Model-Agnostic Meta-Learning, https://arxiv.org/abs/1806.03836, 5.1
    """
    check_counts(num_tasks=num_tasks, shots=shots, queries=queries)
    ranges = dict(amplitude=amplitude, phase=phase, frequency=frequency, inputs=inputs)
    for name, (low, high) in ranges.items():
        if not -math.inf < low <= high < math.inf:
            raise ValueError(
                f"{name}=({low}, {high}); allowed: finite (low, high) with low <= high."
            )
    for name, value in (("noise", noise), ("relative_noise", relative_noise)):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name}={value}; allowed: 0 or more and finite.")

    amplitude_key, phase_key, inputs_key, noise_key = jax.random.split(key, 4)
    one_each = (num_tasks, 1, 1)
    a = jax.random.uniform(amplitude_key, one_each, minval=amplitude[0], maxval=amplitude[1])
    p = jax.random.uniform(phase_key, one_each, minval=phase[0], maxval=phase[1])
    frequency_key = jax.random.fold_in(phase_key, 1)
    w = jax.random.uniform(frequency_key, one_each, minval=frequency[0], maxval=frequency[1])
    shape = (num_tasks, shots + queries, 1)
    x = jax.random.uniform(inputs_key, shape, minval=inputs[0], maxval=inputs[1])
    scale = noise + relative_noise * a
    y = a * jnp.sin(w * x - p) + scale * jax.random.normal(noise_key, shape)
    return Task(support=Batch(x[:, :shots], y[:, :shots]), query=Batch(x[:, shots:], y[:, shots:]))
