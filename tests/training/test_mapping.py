"""Task batches and how functions are mapped over them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax.training import mapping
from imaml_jax.types import Task


def scale(shared, task, key):
    return {"y": shared * task, "u": jax.random.uniform(key)}


@pytest.mark.parametrize("map_tasks", [None, "vmap", "map", 1, 3, 8])
@pytest.mark.parametrize("with_devices", [False, True])
def test_every_way_gives_the_same(key, map_tasks, with_devices):
    devices = jax.devices()[:1] if with_devices else None
    tasks, keys = jnp.arange(10.0).reshape(5, 2), jax.random.split(key, 5)
    mapped = jax.jit(mapping.map_over_tasks(scale, map_tasks, devices))
    out = mapped(jnp.float32(3), tasks, keys)
    np.testing.assert_array_equal(out["y"], 3 * tasks)
    np.testing.assert_array_equal(out["u"], jnp.stack([jax.random.uniform(k) for k in keys]))


@pytest.mark.parametrize("map_tasks", ["pmap", 0, -1, 2.0, True])
def test_unknown_ways_are_refused(map_tasks):
    with pytest.raises(ValueError, match="map_tasks") as error:
        mapping.map_over_tasks(scale, map_tasks)
    assert repr(map_tasks) in str(error.value)


def test_bad_devices_are_refused():
    for devices in ([], jax.devices()[:1] * 2):
        with pytest.raises(ValueError, match="devices"):
            mapping.map_over_tasks(scale, devices=devices)


def test_batches_follow_from_key_and_index(key):
    def sample(key):
        return Task(jax.random.normal(key, (4, 2)), jax.random.normal(key, (4, 3)))

    tasks, keys = mapping.draw_tasks(sample, key, 3)
    again, keys_again = jax.jit(lambda i: mapping.draw_tasks(sample, key, i))(3)
    other, other_keys = mapping.draw_tasks(sample, key, 4)
    np.testing.assert_array_equal(tasks.support, again.support)
    assert keys.shape == (4,) and jnp.all(keys == keys_again)
    assert not jnp.any(tasks.support == other.support) and not jnp.any(keys == other_keys)


@pytest.mark.parametrize("shapes", [((4, 1), (3, 1)), ((), (4,)), ((0,), (0,))])
def test_a_sample_without_task_axis_is_refused(key, shapes):
    with pytest.raises(ValueError, match="leading task axis"):
        mapping.draw_tasks(lambda key: Task(*map(jnp.zeros, shapes)), key, 0)


def test_closed_over_arrays_become_arguments():
    data = np.arange(100_000, dtype=np.float32)
    on_device = jnp.asarray(data)

    def fn(tree, i):
        def body(carry, _):
            return carry + data[0] + on_device[i], None

        return jax.lax.scan(body, tree["x"], length=3)[0], tree

    lifted, constants = mapping._lift_constants(fn, {"x": jnp.float32(0)}, jnp.int32(5))
    assert max(x.size for x in constants) == data.size
    text = jax.jit(lifted).lower(constants, {"x": jnp.float32(0)}, jnp.int32(5)).as_text()
    assert len(text) < 20_000
    called = mapping.jit_lifted(fn)
    for i in (5, 7):
        total, _ = called({"x": jnp.float32(1)}, jnp.int32(i))
        assert total == 1 + 3 * i
    total, _ = called({"x": jnp.ones(2)}, jnp.int32(1))
    np.testing.assert_array_equal(total, [4, 4])
