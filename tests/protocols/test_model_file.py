"""Saved models: what comes back, and files of strangers."""

import dataclasses
import hashlib
import io
import json
import pathlib
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax import protocols
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.protocols import model_file

SMALL = {"filters": 2, "num_blocks": 2}
PROTOCOL = protocols.get("common", algorithm="imaml", ways=3, shots=1).with_settings(SMALL)
DESCRIPTION = model_file.Description(
    dataset="made up",
    ways=3,
    shots=1,
    image_size=8,
    channels=1,
    brightness=0.25,
    protocol=PROTOCOL,
    test_tasks=10,
    test_accuracy=0.5,
    test_ci95=None,
    test_accuracy_unrounded=0.5,
    test_accuracy_alone=0.4,
    test_ci95_alone=0.1,
    run={"seed": 0},
)


def parameters(protocol, seed=0):
    """Random ones of the right shapes, without compiling the initialisation."""
    example = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
    like = jax.eval_shape(protocol.build(3).init, jax.random.key(0), example)
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), like)


@pytest.fixture
def folder(tmp_path):
    model_file.save_model(tmp_path / "model", parameters(PROTOCOL), DESCRIPTION)
    return tmp_path / "model"


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_comes_back_rounded(tmp_path, algorithm):
    protocol = protocols.get("common", algorithm=algorithm, ways=3, shots=1).with_settings(SMALL)
    params = parameters(protocol)
    description = dataclasses.replace(DESCRIPTION, protocol=protocol)
    model_file.save_model(tmp_path, params, description)
    learner, found, described = model_file.load_model(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, model_file.rounded(params))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), found, params)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, params)
    assert described == description and learner.adapt is not None


def test_predictions_do_not_depend_on_other_queries():
    for statistics, alone in (("batch", "support"), ("joint", "support"), ("support",) * 2):
        changed = model_file.independent(PROTOCOL.with_settings({"statistics": statistics}))
        assert changed == PROTOCOL.with_settings({"statistics": alone})
    reptile = PROTOCOL.with_settings({"statistics": "support_and_one"})
    assert model_file.independent(reptile) == reptile


def test_what_could_not_be_loaded_is_not_described():
    with pytest.raises(ValueError, match=r"num_steps=2000000 must be .* at most 1000000"):
        PROTOCOL.with_settings({"num_steps": 2_000_000})
    with pytest.raises(ValueError, match="test_tasks=0 must be an integer, at least 1"):
        dataclasses.replace(DESCRIPTION, test_tasks=0)


def test_a_model_replaces_a_model_and_nothing_else(folder, tmp_path):
    model_file.save_model(folder, parameters(PROTOCOL, 1), DESCRIPTION)
    found = model_file.load_model(folder).meta_params
    jax.tree.map(np.testing.assert_array_equal, found, model_file.rounded(parameters(PROTOCOL, 1)))
    assert sorted(path.name for path in folder.iterdir()) == ["model.json", "weights.npz"]
    (tmp_path / "thesis.txt").write_text("")
    for taken in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(ValueError, match="holds no model: name a new or empty folder"):
            model_file.save_model(taken, parameters(PROTOCOL), DESCRIPTION)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6])
def test_what_float16_has_not_is_refused(tmp_path, value):
    params = parameters(PROTOCOL)
    params["head"]["bias"] = params["head"]["bias"].at[0].set(value)
    with (
        np.errstate(over="ignore"),
        pytest.raises(ValueError, match="head/bias holds values that float16 has not"),
    ):
        model_file.save_model(tmp_path / "new", params, DESCRIPTION)
    assert not (tmp_path / "new" / "model.json").exists()


def test_no_model(tmp_path):
    with pytest.raises(ValueError, match=r"expected a model's folder with model\.json"):
        model_file.load_model(tmp_path)


# --- files of strangers

HOSTILE = "not to be run"


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path(HOSTILE),)


def change(folder, **fields):
    """Rewrites some fields of the description; "protocol.x" those of its protocol."""
    path = folder / "model.json"
    text = json.loads(path.read_text())
    for name, value in fields.items():
        where = text["protocol"] if name.startswith("protocol_") else text
        where[name.removeprefix("protocol_")] = value
    path.write_text(json.dumps(text))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"format": 3}, "format 3, this version of imaml_jax reads 2 and older: install a newer"),
        ({"format": "1"}, "expected a model's description, format 2"),
        ({"ways": "3"}, "ways='3' must be an integer"),
        ({"ways": True}, "ways=True must be an integer"),
        (
            {"ways": 0},
            r"model\.json: ways=0 must be .* at least 1 and at most 10000\. Get a fresh copy",
        ),
        ({"ways": 4}, r"head/bias is float16\[3\], the settings make it float16\[4\]"),
        ({"shots": None}, "shots=None must be an integer"),
        ({"image_size": 10**6}, r"model\.json: image_size=1000000; allowed: 1 to 1024\. "),
        ({"channels": 2}, r"channels=2; allowed: 1 \(grey\) and 3 \(RGB\)"),
        ({"channels": 3}, r"block_0/kernel is float16\[3, 3, 1, 2\]"),
        ({"brightness": 10**400}, "brightness=10* must be"),
        ({"test_accuracy": None}, "test_accuracy=None must be a finite number"),
        ({"run": []}, "run=\\[\\] must be"),
        ({"hook": "os.system"}, "unknown field hook"),
        ({"protocol": None}, "expected the settings of a protocol"),
        ({"protocol_activation": "initializers"}, "activation='initializers' must be one of"),
        ({"protocol_num_steps": "all"}, "num_steps='all' must be an integer"),
        ({"format": True}, "expected a model's description, format 2"),
        ({"format": 1.0}, "expected a model's description, format 2"),
        (
            {"test_accuracy": 5.0},
            r"test_accuracy=5\.0 must be a finite number, at least 0 and at most 1",
        ),
        (
            {"test_accuracy_alone": -0.1},
            r"test_accuracy_alone=-0\.1 must be a finite number, at least 0",
        ),
        ({"test_ci95": -1}, "test_ci95=-1 must be a finite number, at least 0 and at most 1"),
        ({"test_tasks": 0}, "test_tasks=0 must be an integer, at least 1 and at most 1000000000"),
        ({"protocol_num_steps": 0}, "num_steps=0 must be an integer, at least 1"),
        (
            {"protocol_eval_num_steps": 10**9},
            "eval_num_steps=1000000000 must be .* at most 1000000",
        ),
        ({"protocol_cg_steps": -1}, "cg_steps=-1 must be an integer, at least 1"),
        ({"protocol_cg_steps": 10**400}, "cg_steps=10* must be"),
        (
            {"protocol_network": {"num_blocks": 10**5}},
            "num_blocks=100000 must be an integer, at least 1 and at most 100",
        ),
        ({"protocol_network": {"ways": 3}}, "ways is no setting of a protocol"),
        ({"protocol_algorithm": "zzz"}, "algorithm='zzz' must be one of"),
        ({"protocol_algorithm": ["imaml"]}, "algorithm=.* must be one of"),
        ({"protocol_solve": "exact"}, "solve='exact' must be one of"),
        ({"protocol_outer": "lamb"}, "outer='lamb' must be one of"),
        ({"protocol_schedule": "step"}, "schedule='step' must be one of"),
        ({"protocol_inner": "__import__"}, "inner='__import__' must be one of"),
        ({"protocol_eval": 1}, "eval is no setting of a protocol"),
        ({"protocol_network": {"convolution": "os.system"}}, "convolution is no setting"),
        ({"protocol_network": {"filters": 10**9, "num_blocks": 2}}, "the settings make it"),
        ({"protocol_network": {"filters": -1}}, "filters=-1 must be an integer, at least 1"),
        ({"weights_sha256": "0"}, "checksum is not the one in model.json"),
    ],
)
def test_descriptions_of_another_form(folder, fields, message):
    change(folder, **fields)
    with pytest.raises(ValueError, match=message):
        model_file.load_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is no JSON file"),
        (b"\xff\xfe", "is no JSON file"),
        (b"[1, 2]", "expected a model's description"),
        (b"[" * 10**5, "is no JSON file"),
        (b"{}" + b" " * 2**20, "too large"),
    ],
    ids=["empty", "bytes", "list", "deep", "large"],
)
def test_descriptions_that_are_none(folder, content, message):
    (folder / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        model_file.load_model(folder)


def test_a_description_that_lacks_a_field(folder):
    text = json.loads((folder / "model.json").read_text())
    del text["brightness"]
    (folder / "model.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match="the field brightness is missing"):
        model_file.load_model(folder)


@pytest.mark.parametrize("name", ["inner_rate", "split", "name", "filters"])
def test_a_description_whose_protocol_lacks_a_setting(folder, name):
    text = json.loads((folder / "model.json").read_text())
    del text["protocol"][name]
    (folder / "model.json").write_text(json.dumps(text))
    with pytest.raises(
        ValueError, match=rf"{name}(=None must be text| of its protocol is missing)"
    ):
        model_file.load_model(folder)


def put(folder, content):
    """Weights with the checksum that belongs to them."""
    (folder / "weights.npz").write_bytes(content)
    change(folder, weights_sha256=hashlib.sha256(content).hexdigest())


def packed(arrays, **options):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays, **options)
    return buffer.getvalue()


def stored(folder):
    with np.load(folder / "weights.npz") as arrays:
        return dict(arrays)


@pytest.mark.parametrize(
    ("mend", "message"),
    [
        (lambda a: a | {"head/bias": np.full(3, np.nan, np.float16)}, "head/bias holds values"),
        (lambda a: a | {"head/bias": np.zeros(4, np.float16)}, r"head/bias is float16\[4\]"),
        (lambda a: a | {"head/bias": np.zeros(3, np.float32)}, r"head/bias is float32\[3\]"),
        (lambda a: a | {"head/bias": np.zeros(3, object)}, r"head/bias is object\[3\]"),
        (lambda a: a | {"more": np.zeros(1, np.float16)}, "other arrays than its settings: more"),
        (lambda a: {k: v for k, v in a.items() if k != "head/bias"}, "settings: head/bias"),
    ],
    ids=["nan", "shape", "type", "objects", "extra", "missing"],
)
def test_arrays_of_another_form(folder, mend, message):
    put(folder, packed(mend(stored(folder))))
    with pytest.raises(ValueError, match=message):
        model_file.load_model(folder)


def test_nothing_in_the_weights_is_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bomb = np.empty(3, object)
    bomb[:] = [Bomb()] * 3
    put(folder, packed(stored(folder) | {"head/bias": bomb}))
    with pytest.raises(ValueError, match=r"head/bias is object\[3\]"):
        model_file.load_model(folder)
    put(folder, pickle.dumps(Bomb()))
    with pytest.raises(ValueError, match=r"weights\.npz cannot be used"):
        model_file.load_model(folder)
    assert not (tmp_path / HOSTILE).exists()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.99])
def test_weights_that_were_cut(folder, share):
    content = (folder / "weights.npz").read_bytes()
    (folder / "weights.npz").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match="checksum is not the one"):
        model_file.load_model(folder)
    put(folder, content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"weights\.npz cannot be used"):
        model_file.load_model(folder)
    (folder / "weights.npz").unlink()
    with pytest.raises(ValueError, match=r"weights\.npz cannot be used"):
        model_file.load_model(folder)


def test_a_large_file_is_not_read_and_a_small_one_not_blown_up(folder):
    arrays = stored(folder)
    (folder / "weights.npz").write_bytes(b"x" * 2**20)
    with pytest.raises(ValueError, match="has more than the"):
        model_file.load_model(folder)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            member = io.BytesIO()
            np.save(member, array)
            tail = bytes(10**6) if name == "head/bias" else b""
            archive.writestr(f"{name}.npy", member.getvalue() + tail)
    put(folder, buffer.getvalue())
    assert model_file.load_model(folder).description == DESCRIPTION  # the tail was left unread
