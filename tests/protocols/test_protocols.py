"""The published protocols as data."""

import os
import pathlib
from unittest import mock

import jax
import numpy as np
import pytest

from imaml_jax import protocols
from imaml_jax.data import omniglot_splits
from imaml_jax.protocols import build

# Importing the experiments must not change the devices of the other tests.
with mock.patch.dict(os.environ, XLA_FLAGS=os.environ.get("XLA_FLAGS", "")):
    from experiments.shared import few_shot

ROOT = pathlib.Path(__file__).parents[2]


def test_the_names_are_documented():
    assert list(few_shot.Algorithm.__args__) == list(protocols.ALGORITHMS)
    assert list(few_shot.ProtocolName.__args__) == sorted(protocols.PROTOCOLS)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in (*protocols.PROTOCOLS, *protocols.ALGORITHMS):
        assert f"`{name}`" in readme
    documented = protocols.Protocol.__doc__
    for field in protocols.Protocol._fields:
        assert f"\n      {field}: " in documented


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("ways", [5, 20])
@pytest.mark.parametrize("algorithm", protocols.ALGORITHMS)
@pytest.mark.parametrize("name", protocols.PROTOCOLS)
@pytest.mark.parametrize("dataset", protocols.DATASETS)
def test_a_protocol_makes_a_learner_or_says_what_it_covers(dataset, name, algorithm, ways, shots):
    config = few_shot.Config(algorithm=algorithm, protocol=name, ways=ways, shots=shots)
    if algorithm not in protocols.PROTOCOLS[name][0]:
        with pytest.raises(ValueError, match=f"'{name}' covers .*'{algorithm}'"):
            few_shot.resolve(config, dataset)
        return
    if (name, dataset) == ("imaml_dev", "mini_imagenet"):
        with pytest.raises(ValueError, match="covers Omniglot, not dataset='mini_imagenet'"):
            few_shot.resolve(config, dataset)
        return
    protocol = few_shot.resolve(config, dataset)
    assert (protocol.name, protocol.algorithm) == (name, algorithm)
    learner = build.build_learner(protocol, ways)
    shape = (1, 28, 28, 1) if dataset == "omniglot" else (1, 84, 84, 3)
    images = jax.ShapeDtypeStruct(shape, np.float32)
    params = jax.eval_shape(learner.init, jax.random.key(0), images)
    params = getattr(params, "params", getattr(params, "mean", params))  # MAML++, PLATIPUS
    assert params["head"]["bias"].shape[-1] == ways
    build.make_outer(protocol, protocol.meta_steps).init({"w": np.zeros(1)})
    assert protocol.source in few_shot.describe(config, protocol, "Omniglot")


def test_overrides_take_the_place_of_the_protocols():
    plain = few_shot.resolve(few_shot.Config(protocol="imaml_paper"))
    changed = few_shot.resolve(
        few_shot.Config(protocol="imaml_paper", inner_rate=0.05, test_tasks=10, meta_steps=300)
    )
    assert changed == plain._replace(inner_rate=0.05, test_tasks=10, meta_steps=300)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cbfinn"}, "protocol='cbfinn' must be one of"),
        ({"name": "imaml_papr"}, "did you mean 'imaml_paper'"),
        ({"algorithm": "protonet"}, "algorithm='protonet' must be one of"),
        ({"algorithm": "leo"}, "algorithm='leo' learns from features.* experiments.leo"),
        ({"dataset": "omnigolt"}, "dataset='omnigolt' .* did you mean 'omniglot'"),
    ],
)
def test_unknown_names_are_refused(changes, message):
    arguments = {"name": "finn", "algorithm": "maml", **changes}
    with pytest.raises(ValueError, match=message):
        protocols.get(**arguments, ways=5, shots=1)


def test_the_bound_on_the_meta_gradient_holds():
    protocol = protocols.get("finn", algorithm="maml", ways=5, shots=1, dataset="mini_imagenet")
    outer = build.make_outer(protocol._replace(outer="sgd", outer_rate=1.0), 1)
    updates, _ = outer.update({"w": np.array([1.0, 0.1])}, outer.init({"w": np.zeros(2)}))
    np.testing.assert_allclose(updates["w"], [-10 / 75, -0.1], rtol=1e-6)


@pytest.mark.parametrize(
    "name, algorithm", [(n, a) for n, p in protocols.PROTOCOLS.items() for a in p[0]]
)
def test_no_class_of_a_protocol_is_in_two_splits(name, algorithm):
    protocol = protocols.get(name, algorithm=algorithm, ways=5, shots=1)
    parts = [
        set(part.tolist())
        for part in omniglot_splits.split_indices(protocol.split)
        if part is not None
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(omniglot_splits.class_names())
