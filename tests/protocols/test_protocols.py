"""The published protocols as data."""

import dataclasses
import pathlib
from typing import ClassVar

import jax
import numpy as np
import pytest

from experiments.shared import few_shot
from imaml_jax import protocols
from imaml_jax.data import omniglot_splits
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.protocols import sinusoid


class Photographs(few_shot.Config):
    DATASET: ClassVar = "mini_imagenet"


CONFIGS = {"omniglot": few_shot.Config, "mini_imagenet": Photographs}
ROOT = pathlib.Path(__file__).parents[2]


def test_the_names_are_documented():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in (*protocols.PROTOCOLS, *ALGORITHMS):
        assert f"`{name}`" in readme


@pytest.mark.parametrize("shots", [1, 5])
@pytest.mark.parametrize("ways", [5, 20])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("name", protocols.PROTOCOLS)
@pytest.mark.parametrize("dataset", protocols.DATASETS)
def test_a_protocol_makes_a_learner_or_says_what_it_covers(dataset, name, algorithm, ways, shots):
    def make():
        return CONFIGS[dataset].of(algorithm=algorithm, protocol=name, ways=ways, shots=shots)

    if algorithm not in protocols.PROTOCOLS[name].covers:
        with pytest.raises(ValueError, match=f"'{name}' covers .*'{algorithm}'"):
            make()
        return
    if (name, dataset) == ("imaml_dev", "mini_imagenet"):
        with pytest.raises(ValueError, match="covers Omniglot, not dataset='mini_imagenet'"):
            make()
        return
    config = make()
    protocol = config.settings
    assert (protocol.name, protocol.learner.algorithm) == (name, algorithm)
    recorded = protocol.recorded()
    assert protocols.from_settings(recorded).recorded() == recorded
    learner = protocol.build(ways)
    shape = (1, 28, 28, 1) if dataset == "omniglot" else (1, 84, 84, 3)
    images = jax.ShapeDtypeStruct(shape, np.float32)
    params = jax.eval_shape(learner.init, jax.random.key(0), images)
    params = getattr(params, "params", getattr(params, "mean", params))  # MAML++, PLATIPUS
    assert params["head"]["bias"].shape[-1] == ways
    protocol.build_outer().init({"w": np.zeros(1)})
    assert protocol.source in few_shot.describe(config, "Omniglot")


@pytest.mark.parametrize("setting", ["bmaml", "maml"])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_has_its_settings_for_sinusoids(algorithm, setting):
    protocol = sinusoid.get(setting, algorithm)
    learner = protocol.build()
    params = jax.eval_shape(learner.init, jax.random.key(0), np.zeros((1, 1), np.float32))
    protocol.build_outer().init(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params))


def test_overrides_take_the_place_of_the_protocols():
    plain = few_shot.Config.of(protocol="imaml_paper").settings
    changes = {"inner_rate": 0.05, "test_tasks": 10, "meta_steps": 300}
    changed = few_shot.Config.of(protocol="imaml_paper", **changes).settings
    assert changed == dataclasses.replace(
        plain,
        tasks=dataclasses.replace(plain.tasks, test_tasks=10),
        outer=dataclasses.replace(plain.outer, meta_steps=300),
        learner=dataclasses.replace(plain.learner, inner_rate=0.05),
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "cbfinn"}, "protocol='cbfinn' must be one of"),
        ({"name": "imaml_papr"}, "did you mean imaml_paper"),
        ({"algorithm": "protonet"}, "algorithm='protonet' must be one of"),
        ({"algorithm": "leo"}, "algorithm='leo' learns from features.* experiments.leo"),
        ({"dataset": "omnigolt"}, "dataset='omnigolt' .* did you mean omniglot"),
    ],
)
def test_unknown_names_are_refused(changes, message):
    arguments = {"name": "finn", "algorithm": "maml", **changes}
    with pytest.raises(ValueError, match=message):
        protocols.get(**arguments, ways=5, shots=1)


def test_the_bound_on_the_meta_gradient_holds():
    protocol = protocols.get("finn", algorithm="maml", ways=5, shots=1, dataset="mini_imagenet")
    outer = protocol.with_settings({"outer": "sgd", "outer_rate": 1.0}).build_outer()
    updates, _ = outer.update({"w": np.array([1.0, 0.1])}, outer.init({"w": np.zeros(2)}))
    np.testing.assert_allclose(updates["w"], [-10 / 75, -0.1], rtol=1e-6)


@pytest.mark.parametrize(
    "name, algorithm", [(n, a) for n, p in protocols.PROTOCOLS.items() for a in p.covers]
)
def test_no_class_of_a_protocol_is_in_two_splits(name, algorithm):
    protocol = protocols.get(name, algorithm=algorithm, ways=5, shots=1)
    parts = [
        set(part.tolist())
        for part in omniglot_splits.split_indices(protocol.tasks.split)
        if part is not None
    ]
    assert sum(map(len, parts)) == len(set.union(*parts)) == len(omniglot_splits.class_names())
