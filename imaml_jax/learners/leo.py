"""LEO: adaptation in a learned latent space of classifier weights."""

import dataclasses
from functools import partial
from typing import Annotated, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from imaml_jax.bilevel.inner import minimize
from imaml_jax.learners.base import accuracy_of, cross_entropy, inner_report
from imaml_jax.learners.leo_inputs import by_class, features, features_of
from imaml_jax.learners.settings import (
    Count,
    Fixed,
    NotNegative,
    Positive,
    Range,
    Record,
    check_arguments,
    check_value,
    values_of,
)
from imaml_jax.types import Array, MetaLearner

_MIN_DEVIATION = 1e-10
_GLOROT = jax.nn.initializers.glorot_uniform()


class Noise(NamedTuple):
    """What training draws for a task of `n` support examples; None where it takes means or all.

    Attributes:
      codes: `[N, K, latents]`, standard normal.
      weights: `[num_steps + 1, N, K, D]`, standard normal, for each decoding.
      dropped_support: booleans `[uses, n, D]`: by the encoder, then by each step.
      dropped_query: booleans `[queries, D]`.
    """

    codes: Array | None = None
    weights: Array | None = None
    dropped_support: Array | None = None
    dropped_query: Array | None = None


@dataclasses.dataclass(frozen=True)
class LeoSettings(Record):
    """Settings of `leo`, which learns from features of images, without a network.

    The defaults are those of the official code; its published results have others for each data
    set, see `protocols.leo`.
    """

    algorithm: ClassVar[str] = "leo"

    num_latents: Count = 64
    """Size of a code; the relation network is twice as wide."""
    num_steps: Count = 5
    """Inner steps on the codes."""
    num_finetuning_steps: Count = 5
    """Steps on the weights that the last codes give."""
    inner_rate: Positive = 1.0
    """Learning rate of the inner loop on the codes, at the start."""
    finetuning_rate: Positive = 1e-3
    """Learning rate of the steps on the weights, at the start."""
    stochastic: Annotated[bool, Fixed()] = True
    """Samples codes and weights in training; else it takes their means."""
    dropout: Annotated[float, Range(least=0, below=1)] = 0.5
    """Share of the features that training drops."""
    kl_weight: NotNegative = 1e-3
    """Beta, the weight of the divergence of the codes from their prior."""
    encoder_penalty: NotNegative = 1e-9
    """Gamma, the weight of the distance of adapted codes from the encoder's."""
    l2_penalty: NotNegative = 1e-8
    """Lambda_1, the weight of the squared parameters."""
    orthogonality_penalty: NotNegative = 1e-3
    """Lambda_2, the weight of the decoder's correlations."""

    def build(self, ways: int) -> MetaLearner:
        """The learner of tasks of so many classes."""
        values = values_of(self)
        return leo(ways=ways, latent_rate=values.pop("inner_rate"), **values)


def leo(
    *,
    ways: int,
    num_latents: int = 64,
    num_steps: int = 5,
    num_finetuning_steps: int = 5,
    latent_rate: float = 1.0,
    finetuning_rate: float = 1e-3,
    stochastic: bool = True,
    dropout: float = 0.5,
    kl_weight: float = 1e-3,
    encoder_penalty: float = 1e-9,
    l2_penalty: float = 1e-8,
    orthogonality_penalty: float = 1e-3,
) -> MetaLearner:
    """Latent embedding optimization: gradient steps on the code from which weights are decoded.

    For the `K` support features `x` of each of `N` classes, no layer with a bias::

        (m, u)_c = mean over the class's x and over all x' of relation(encoder x, encoder x')
        z        ~ N(m, s(u, 0)),     K codes a class,   s(u, o) = max(exp(u) - 1 + o, 1e-10)
        w        ~ N(m', s(u', sqrt(2 / (D + N)))),      (m', u') = decoder z,   drawn at each use
        z        <- z - a * dL/dz,    w <- w - b * dL/dw,     L the sum of the support losses

    The logits of `x` are its products with `w`, averaged over the K copies. Both rates, one for
    each entry, are learned with the rest, by the exact derivative through all steps, of::

        query loss + kl_weight KL(z) + encoder_penalty mean (stop(z') - z)^2
                   + l2_penalty/2 |weights|^2 + orthogonality_penalty mean (C - I)^2,

    where `z'` is the adapted code, `C` the cosines of the decoder's rows, and `KL` the mean over
    entries of `log q(z) - log p(z)` at the one sample, `p` a standard normal. `adapt` takes means
    for samples and has no dropout.

    Inputs are features `[n, ...]`, best of norm 1 as published; a support set holds the same number
    of each class, in any order. Parameters are `encoder`, `relation_0`, `relation_1`, `relation_2`,
    `decoder`, `latent_rate` and `finetuning_rate`. The defaults are those of the official code; its
    published results have others for each data set, see `experiments.leo`.

    Args:
      ways: classes of a task, N.
      num_latents: size of a code; the relation network is twice as wide.
      num_steps: steps on the codes.
      num_finetuning_steps: steps on the weights that the last codes give.
      latent_rate: initial rate `a`.
      finetuning_rate: initial rate `b`.
      stochastic: False takes means in training too, and so has no KL ("deterministic" in the
        paper); dropout stays.
      dropout: share of the features that training drops, afresh at each use.
      kl_weight: beta.
      encoder_penalty: gamma.
      l2_penalty: lambda_1, of all parameters but the rates.
      orthogonality_penalty: lambda_2.

    Returns:
      The `MetaLearner`. Its `info` reports the fine-tuning: `support_loss` is a sum over examples,
      and `query_loss` is without the penalties, which `meta_loss` has.

    Raises:
      ValueError: a setting out of its range; when called, inputs that are no features or of another
        width than in `init`, targets that are no integers, or a number of support examples that
        `ways` does not divide.

    References:
      Rusu et al., "Meta-Learning with Latent Embedding Optimization", ICLR 2019; where it is
      silent, as https://github.com/google-deepmind/leo (model.py).
    """
    check_value("ways", ways, Count, "leo: ")
    check_value("latent_rate", latent_rate, Positive, "leo: ")
    check_arguments("leo", LeoSettings, locals())

    def init(key, example_inputs):
        example = features(example_inputs)
        width, hidden, dtype = example.shape[1], 2 * num_latents, example.dtype
        shapes = {
            "encoder": (width, num_latents),
            **{f"relation_{i}": (hidden, hidden) for i in range(3)},
            "decoder": (num_latents, 2 * width),
        }
        keys = jax.random.split(key, len(shapes))
        weights = {n: _GLOROT(k, s, dtype) for k, (n, s) in zip(keys, shapes.items(), strict=True)}
        return weights | {
            "latent_rate": jnp.full((1, 1, num_latents), latent_rate, dtype),
            "finetuning_rate": jnp.full((1, 1, width), finetuning_rate, dtype),
        }

    def draw(key, support, query):
        """What training draws for a task, at once: it is most of what there is to compile."""
        keys, (examples, width) = jax.random.split(key, 4), support.shape
        normal = partial(jax.random.normal, dtype=support.dtype)
        codes = weights = dropped_support = dropped_query = None
        if stochastic:
            shots = examples // ways
            codes = normal(keys[0], (ways, shots, num_latents))
            weights = normal(keys[1], (num_steps + 1, ways, shots, width))
        if dropout:
            uses = 1 + num_steps + num_finetuning_steps
            dropped_support = jax.random.bernoulli(keys[2], dropout, (uses, examples, width))
            dropped_query = jax.random.bernoulli(keys[3], dropout, query.shape)
        return Noise(codes, weights, dropped_support, dropped_query)

    def drop(inputs, dropped):
        return inputs if dropped is None else jnp.where(dropped, 0, inputs / (1 - dropout))

    def encode(params, support, noise):
        """The codes `[N, K, latents]` and their KL."""
        inputs = drop(support.inputs, _part(noise.dropped_support, 0))
        inputs = by_class(inputs, support.targets, ways)
        codes = relate(params, _matmul(inputs, params["encoder"]))
        return _sample(jnp.repeat(codes[:, None], inputs.shape[1], 1), 0.0, noise.codes)

    def decode(params, codes, noise):
        """Classifier weights `[N, K, D]`."""
        weights = _matmul(codes, params["decoder"])
        offset = (2 / (weights.shape[-1] // 2 + ways)) ** 0.5
        return _sample(weights, offset, noise)[0]

    def logits_of(weights, inputs, dropped):
        return _matmul(drop(inputs, dropped), weights.mean(1).T)

    def support_loss(weights, support, dropped=None):
        logits = logits_of(weights, support.inputs, dropped)
        return support.targets.shape[0] * cross_entropy(logits, support.targets)

    def latent_loss(codes, params, support, drawn):
        noise, dropped = drawn
        return support_loss(decode(params, codes, noise), support, dropped)

    def adapt_weights(params, support, codes, noise):
        """The adapted weights `[N, K, D]` and codes, and the report of the fine-tuning."""
        of_steps = _part(noise.dropped_support, slice(1, num_steps + 1))
        codes, _ = minimize(
            latent_loss,
            codes,
            params,
            support,
            tx=descent(params["latent_rate"]),
            num_steps=num_steps,
            batches=(_part(noise.weights, slice(num_steps)), of_steps),
            remat=False,
        )
        weights, info = minimize(
            support_loss,
            decode(params, codes, _part(noise.weights, num_steps)),
            support,
            tx=descent(params["finetuning_rate"]),
            num_steps=num_finetuning_steps,
            batches=_part(noise.dropped_support, slice(num_steps + 1, None)),
            remat=False,
        )
        return weights, codes, info

    def training_loss(params, task, key):
        support, query = (features_of(batch, params) for batch in task)
        noise = draw(key, support.inputs, query.inputs)
        codes, kl = encode(params, support, noise)
        weights, adapted, info = adapt_weights(params, support, codes, noise)
        logits = logits_of(weights, query.inputs, noise.dropped_query)
        loss = cross_entropy(logits, query.targets)
        accuracy = accuracy_of(logits, query.targets)
        penalty = (
            kl_weight * kl
            + encoder_penalty * jnp.mean(jnp.square(lax.stop_gradient(adapted) - codes))
            + l2_penalty / 2 * optax.tree.norm(_without_rates(params), squared=True)
            + orthogonality_penalty * correlation(params["decoder"])
        )
        return loss + penalty, inner_report(
            info,
            query_loss=loss,
            query_accuracy=accuracy,
            kl_divergence=kl if stochastic else None,
            meta_loss=loss + penalty,
        )

    def meta_grad(meta_params, task, key, step):
        del step
        return jax.grad(training_loss, has_aux=True)(meta_params, task, key)

    def adapt(meta_params, support, key):
        del key
        support = features_of(support, meta_params)
        codes, _ = encode(meta_params, support, Noise())
        weights, _, info = adapt_weights(meta_params, support, codes, Noise())
        return weights, inner_report(info)

    def predict(adapted, inputs):
        return logits_of(adapted, features(inputs, adapted.shape[-1]), None)

    return MetaLearner(init, adapt, predict, meta_grad)


def descent(rate: Array) -> optax.GradientTransformation:
    """Gradient descent with a rate for each entry, through which derivatives pass."""
    return optax.stateless(lambda grads, _: jax.tree.map(lambda g: -rate * g, grads))


def relate(params: dict[str, Array], codes: Array) -> Array:
    """The relation network, averaged over a class's examples and over all their partners.

    Args:
      params: `relation_0`, `relation_1` and `relation_2`, each `[2 L, 2 L]`.
      codes: `[N, K, L]`.

    Returns:
      `[N, 2 L]`.
    """
    ways, shots, size = codes.shape
    codes = codes.reshape(ways * shots, size)
    left, right = (_matmul(codes, part) for part in jnp.split(params["relation_0"], 2))
    hidden = jax.nn.relu(left[:, None] + right[None])  # of every ordered pair
    hidden = jax.nn.relu(_matmul(hidden, params["relation_1"]))
    # The last layer is linear, so that the mean may go first.
    hidden = hidden.reshape(ways, shots * ways * shots, -1).mean(1)
    return _matmul(hidden, params["relation_2"])


def correlation(decoder: Array) -> Array:
    """Mean squared difference between the cosines of a matrix's rows and the identity."""
    rows = decoder / jnp.linalg.norm(decoder, axis=1, keepdims=True)
    cosines = _matmul(rows, rows.T)
    return jnp.mean(jnp.square(cosines - jnp.eye(len(rows), dtype=rows.dtype)))


def _sample(codes: Array, offset: float, noise: Array | None) -> tuple[Array, Any]:
    """A draw from the Gaussian of the means and spreads `codes [..., 2 n]`: `([..., n], KL)`."""
    mean, spread = jnp.split(codes, 2, axis=-1)
    if noise is None:
        return mean, 0.0
    deviation = jnp.maximum(jnp.expm1(spread) + offset, _MIN_DEVIATION)
    sample = mean + deviation * noise
    # log q by the noise: from the sample, at the least deviation, no digit of it would be left.
    kl = jnp.mean((jnp.square(sample) - jnp.square(noise)) / 2 - jnp.log(deviation))
    return sample, kl


def _part(drawn: Array | None, index: Any) -> Array | None:
    return None if drawn is None else drawn[index]


def _without_rates(params: dict[str, Array]) -> dict[str, Array]:
    return {name: x for name, x in params.items() if not name.endswith("_rate")}


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
