"""Checkpoints: exact, atomic, and their damage noticed."""

import json
import logging
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from imaml_jax.training import checkpoint, workdir


@pytest.fixture
def tree():
    params = {
        "w": jnp.arange(12.0).reshape(3, 4) / 7,
        "half": jnp.arange(3, dtype=jnp.bfloat16),
        "mask": jnp.array([True, False]),
        "empty": jnp.zeros((0, 2)),
    }
    return {"params": params, "opt": optax.adam(1e-3).init(params["w"]), "step": jnp.int32(7)}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def test_round_trip_is_exact_and_quiet(tmp_path, tree, caplog, capfd):
    metadata = {"seconds": 1.5, "config": {"ways": 5}, "best": None}
    with caplog.at_level(logging.INFO):
        path = checkpoint.save(tmp_path / "new" / "folder", 40, tree, metadata)
        restored, read = checkpoint.restore(
            tmp_path / "new" / "folder", jax.tree.map(jnp.zeros_like, tree)
        )
    assert_same(restored, tree)
    assert read == {**metadata, "step": 40, "path": path}
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert capfd.readouterr().err == ""


def test_nothing_to_restore(tmp_path, tree):
    assert checkpoint.restore(tmp_path, tree) is None
    assert checkpoint.restore(tmp_path / "missing", tree) is None


def test_keeps_the_last_and_cleans_up(tmp_path, tree):
    leftover = tmp_path / ".tmp_step_00000009"
    leftover.mkdir()
    for step in (1, 2, 10, 30):
        checkpoint.save(tmp_path, step, tree, {}, keep=2)
    assert checkpoint.steps(tmp_path) == [10, 30]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_00000010", "step_00000030"]
    checkpoint.save(tmp_path, 20, tree, {}, keep=1)
    assert checkpoint.steps(tmp_path) == [20, 30]


def test_replaces_a_checkpoint_of_the_same_step(tmp_path, tree):
    checkpoint.save(tmp_path, 1, tree, {"run": 1})
    checkpoint.save(tmp_path, 1, jax.tree.map(jnp.ones_like, tree), {"run": 2})
    restored, metadata = checkpoint.restore(tmp_path, tree)
    assert metadata["run"] == 2
    assert_same(restored, jax.tree.map(jnp.ones_like, tree))


def data_files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def truncate(path):
    largest = max(data_files(path), key=lambda file: file.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def empty_all(path):
    for file in data_files(path):
        file.write_bytes(b"")


def change_metadata(path):
    file = path / "metadata.json"
    file.write_text(file.read_text().replace('"run": 2', '"run": 3'))


@pytest.mark.parametrize(
    "damage",
    [
        truncate,
        empty_all,
        change_metadata,
        lambda path: shutil.rmtree(path / "arrays"),
        lambda path: (path / "metadata.json").unlink(),
    ],
)
def test_a_damaged_checkpoint_is_skipped_with_a_warning(tmp_path, tree, damage):
    checkpoint.save(tmp_path, 1, tree, {"run": 1})
    newest = checkpoint.save(tmp_path, 2, jax.tree.map(jnp.zeros_like, tree), {"run": 2})
    damage(newest)
    with pytest.warns(UserWarning, match="step_00000002"):
        restored, metadata = checkpoint.restore(tmp_path, tree)
    assert metadata["run"] == 1
    assert_same(restored, tree)


def test_every_flipped_byte_is_noticed_or_harmless(tmp_path, tree):
    checkpoint.save(tmp_path, 1, tree, {})
    path = checkpoint.save(tmp_path, 2, tree, {})
    rng = np.random.default_rng(0)
    for file in data_files(path):
        whole = file.read_bytes()
        position = rng.integers(len(whole))
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            restored, _ = checkpoint.restore(tmp_path, tree)
        assert_same(restored, tree)
        file.write_bytes(whole)


def test_another_model_is_refused_not_skipped(tmp_path, tree):
    checkpoint.save(tmp_path, 1, tree, {})
    wider = tree | {"params": tree["params"] | {"w": jnp.zeros((3, 5)), "extra": jnp.zeros(2)}}
    with pytest.raises(ValueError, match=r"2 arrays differ.*float32\[3, 4\].*float32\[3, 5\]"):
        checkpoint.restore(tmp_path, wider)


def test_nonsense_is_refused(tmp_path, tree):
    with pytest.raises(ValueError, match="-1"):
        checkpoint.save(tmp_path, -1, tree, {})
    with pytest.raises(ValueError, match="keep"):
        checkpoint.save(tmp_path, 1, tree, {}, keep=0)


def test_a_workdir_belongs_to_one_config(tmp_path):
    config = {"seed": 1, "inner": {"steps": 5, "rate": 0.1}, "sizes": (1, 2), "old": None}
    workdir.check(tmp_path / "run", config)
    workdir.claim(tmp_path / "run", config)
    workdir.check(tmp_path / "run", config)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["inner"]["rate"] == 0.1
    changed = {"seed": 1, "inner": {"steps": 5, "rate": 0.2}, "sizes": (1, 2), "new": "x"}
    with pytest.raises(ValueError) as error:
        workdir.check(tmp_path / "run", changed)
    for part in ("inner.rate: was 0.1, now 0.2", "old: was None, now 'absent'", "now 'x'"):
        assert part in str(error.value)
    assert "seed" not in str(error.value) and "inner.steps" not in str(error.value)
