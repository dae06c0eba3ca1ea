import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imaml_jax.data import episodes
from imaml_jax.training import mapping

SIDE = 4


def labelled_dataset(sizes):
    """Images whose pixels tell class, example and turn: the first row is (class, example)."""
    arrays = []
    for label, size in enumerate(sizes):
        images = np.zeros((size, SIDE, SIDE, 1), np.uint8)
        images[:, 0, 0, 0] = label + 1
        images[:, 0, 1, 0] = np.arange(size) + 1
        arrays.append(images)
    return episodes.from_class_arrays(arrays)


def read(images):
    """Undoes `labelled_dataset`: class, example and quarter turns of every image."""
    images = np.rint(np.asarray(images)[..., 0] * 255).astype(int)
    found = np.zeros((*images.shape[:-2], 3), int)
    for index in np.ndindex(images.shape[:-2]):
        corners = [np.rot90(images[index], -k)[0, :2] for k in range(4)]
        (turns,) = [k for k, corner in enumerate(corners) if corner.all()]
        found[index] = *(corners[turns] - 1), turns
    return found


def sample(key, dataset, jit=True, **options):
    options = {"num_tasks": 8, "ways": 3, "shots": 2, "queries": 3, **options}
    function = functools.partial(episodes.sample_tasks, **options)
    return (jax.jit(function) if jit else function)(key, dataset)


@pytest.mark.parametrize("sizes", [(6,) * 10, (5, 9, 6, 20, 5, 7)])
@pytest.mark.parametrize("rotations", [None, "classes", "augment"])
def test_tasks_are_well_formed(key, sizes, rotations):
    dataset = labelled_dataset(sizes)
    task = sample(key, dataset, rotations=rotations)
    assert task.support.inputs.shape == (8, 6, SIDE, SIDE, 1)
    assert task.query.inputs.shape == (8, 9, SIDE, SIDE, 1)
    assert task.support.inputs.dtype == jnp.float32
    assert task.support.targets.dtype == task.query.targets.dtype == jnp.int32
    np.testing.assert_array_equal(task.support.targets[0], [0, 0, 1, 1, 2, 2])
    np.testing.assert_array_equal(task.query.targets[5], [0, 0, 0, 1, 1, 1, 2, 2, 2])
    support, query = read(task.support.inputs), read(task.query.inputs)
    for i in range(8):
        classes = []
        for label in range(3):
            rows = np.concatenate([support[i, label * 2 :][:2], query[i, label * 3 :][:3]])
            assert len({(c, turns) for c, _, turns in rows.tolist()}) == 1  # one class, one turn
            assert len(set(rows[:, 1].tolist())) == 5  # support and query disjoint, no repeats
            assert rows[:, 1].max() < sizes[rows[0, 0]]
            classes.append((rows[0, 0], rows[0, 2] if rotations == "classes" else 0))
        assert len(set(classes)) == 3
    turns = set(support[..., 2].ravel().tolist())
    assert turns == ({0} if rotations is None else {0, 1, 2, 3})


def test_the_key_decides_everything(key):
    dataset = labelled_dataset((6,) * 10)
    first = sample(key, dataset, rotations="augment")
    jax.tree.map(
        np.testing.assert_array_equal, first, sample(key, dataset, False, rotations="augment")
    )
    other = sample(jax.random.key(1), dataset, rotations="augment")
    assert not np.array_equal(first.support.inputs, other.support.inputs)


def test_uniform_over_classes_examples_roles_and_turns(key):
    """Frequencies of class, label, example and turn stay within 5 standard deviations."""
    sizes = (3, 7, 4, 3)
    task = sample(
        key,
        labelled_dataset(sizes),
        num_tasks=4000,
        ways=2,
        shots=1,
        queries=1,
        rotations="classes",
    )
    support, query = read(task.support.inputs), read(task.query.inputs)

    def check(counts, probability, total):
        tolerance = 5 * np.sqrt(probability * (1 - probability) / total)
        np.testing.assert_allclose(np.asarray(counts) / total, probability, atol=tolerance)

    for label in range(2):
        check(np.bincount(support[:, label, 0], minlength=4), 1 / 4, 4000)
        check(np.bincount(support[:, label, 2], minlength=4), 1 / 4, 4000)
    for name, size in enumerate(sizes):
        for batch in (support, query):
            examples = batch[..., 1][batch[..., 0] == name]
            check(np.bincount(examples, minlength=size), 1 / size, len(examples))
    pairs = support[:, 0, :1] * 4 + support[:, 0, 2:], support[:, 1, :1] * 4 + support[:, 1, 2:]
    assert (pairs[0] != pairs[1]).all()
    order = np.mean(pairs[0] < pairs[1])  # labels carry no order
    assert abs(order - 0.5) < 5 * 0.5 / np.sqrt(4000)


def test_all_images_of_a_class_and_all_classes(key):
    task = sample(key, labelled_dataset((5,) * 3), ways=3, shots=2, queries=3)
    rows = np.concatenate([read(task.support.inputs), read(task.query.inputs)], axis=1)
    for task_rows in rows:
        assert len({tuple(row) for row in task_rows.tolist()}) == 15


def test_turns_are_those_of_numpy():
    images = np.random.RandomState(0).randint(0, 256, (2, 4, 5, 5, 3)).astype(np.uint8)
    turned = episodes._rotate(jnp.asarray(images), jnp.tile(jnp.arange(4), (2, 1)))
    for i, k in np.ndindex(2, 4):
        np.testing.assert_array_equal(turned[i, k], np.rot90(images[i, k], k))


def test_values_are_scaled_and_inverted(key):
    dataset = episodes.from_class_arrays([np.full((5, 2, 2, 1), 51, np.uint8)] * 3)
    np.testing.assert_allclose(sample(key, dataset).query.inputs, 0.2, rtol=1e-6)
    np.testing.assert_allclose(sample(key, dataset, invert=True).query.inputs, 0.8, rtol=1e-6)
    dataset = episodes.from_class_arrays([np.full((5, 2, 2, 1), 0.7, np.float32)] * 3)
    np.testing.assert_allclose(sample(key, dataset).query.inputs, 0.7, rtol=1e-6)


def test_runs_in_64_bit_mode(key, x64):
    task = sample(key, labelled_dataset((6,) * 5), rotations="classes")
    assert task.support.inputs.dtype == jnp.float32 and task.query.targets.dtype == jnp.int32


def test_a_class_too_small_under_jit_gives_nan_and_never_a_foreign_image(key):
    dataset = labelled_dataset((6, 6, 2, 6))
    task = sample(key, dataset, num_tasks=40)
    poisoned = np.isnan(task.support.inputs).any(axis=(1, 2, 3, 4))
    assert 0 < poisoned.sum() < 40
    good = read(task.support.inputs[~poisoned])
    assert 2 not in good[..., 0]
    with pytest.raises(ValueError, match=r"class 2 has only 2 images"):
        sample(key, dataset, jit=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ways": 11}, r"ways=11; allowed: 1 to 10"),
        ({"ways": 41, "rotations": "classes"}, r"ways=41; allowed: 1 to 40"),
        ({"ways": 0}, r"ways=0"),
        ({"shots": 0}, r"shots=0; allowed: 1 or more"),
        ({"queries": 0}, r"queries=0; allowed: 1 or more"),
        ({"num_tasks": 0}, r"num_tasks=0; allowed: 1 or more"),
        ({"shots": 50, "queries": 50}, r"shots \+ queries = 50 \+ 50 = 100; allowed: up to 51"),
        ({"rotations": "all"}, r"rotations='all'; allowed: None, 'classes', 'augment'"),
    ],
)
def test_rejects_at_trace_time(key, change, message):
    with pytest.raises(ValueError, match=message):
        sample(key, labelled_dataset((6,) * 10), **change)


def test_rejects_turning_oblong_images(key):
    dataset = episodes.from_class_arrays([np.zeros((6, 2, 3, 1), np.uint8)] * 4)
    sample(key, dataset)
    with pytest.raises(ValueError, match=r"square images, these are 2x3"):
        sample(key, dataset, rotations="augment")


def test_check_task_shape():
    dataset = labelled_dataset((6, 5, 9))
    episodes.check_task_shape(dataset, ways=3, shots=2, queries=3, rotations="classes")
    with pytest.raises(ValueError, match=r"= 6, but class 1 has only 5 images"):
        episodes.check_task_shape(dataset, ways=3, shots=3, queries=3)
    with pytest.raises(ValueError, match="ways=4"):
        episodes.check_task_shape(dataset, ways=4, shots=1, queries=1)


def test_from_class_arrays():
    dataset = labelled_dataset((2, 3))
    assert episodes.num_classes(dataset) == 2
    np.testing.assert_array_equal(dataset.offsets, [0, 2, 5])
    assert dataset.images.dtype == jnp.uint8 and dataset.offsets.dtype == jnp.int32
    good = np.zeros((2, 3, 3, 1), np.uint8)
    for bad in ([], [good[0]], [good, good[:0]], [good, good[:, :2]], [good, good.astype(float)]):
        with pytest.raises(ValueError, match="class_arrays"):
            episodes.from_class_arrays(bad)


# --- images that are grouped already


def test_grouped_images_are_taken_as_they_are():
    images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1)
    dataset = episodes.from_grouped(images, np.array([0, 2, 5]))
    np.testing.assert_array_equal(dataset.images, images)
    np.testing.assert_array_equal(dataset.offsets, [0, 2, 5])
    assert dataset.images.dtype == np.uint8 and dataset.offsets.dtype == np.int32


@pytest.mark.parametrize(
    ("shape", "offsets", "message"),
    [
        ((5, 1, 1), [0, 5], r"expected \[N, H, W, C\]"),
        ((5, 1, 1, 1), [0], "integers that increase"),
        ((5, 1, 1, 1), [0, 2, 2, 5], "integers that increase"),
        ((5, 1, 1, 1), [1, 5], "offsets run from 1 to 5; expected 0 to 5"),
        ((5, 1, 1, 1), [0, 4], "offsets run from 0 to 4; expected 0 to 5"),
    ],
)
def test_grouped_images_are_checked(shape, offsets, message):
    with pytest.raises(ValueError, match=message):
        episodes.from_grouped(np.zeros(shape, np.uint8), np.array(offsets))


# --- images that are too many for the device


@pytest.fixture
def on_host():
    """The same data set on the device, and on the host since the device is small."""
    dataset = labelled_dataset((6, 9, 7))
    with mock.patch.object(episodes, "_device_memory", return_value=100):
        other = episodes.from_grouped(np.asarray(dataset.images), dataset.offsets)
    assert isinstance(other.images, episodes.HostImages)
    return dataset, other


@pytest.mark.parametrize("rotations", episodes.ROTATIONS)
def test_host_images_give_the_same_tasks(on_host, rotations):
    key = jax.random.key(3)
    expected, found = (sample(key, dataset, rotations=rotations) for dataset in on_host)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    found = sample(key, on_host[1], jit=False, rotations=rotations)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_host_images_are_drawn_inside_a_loop_and_side_by_side(on_host):
    def draw(dataset, key):
        return sample(key, dataset, jit=False, num_tasks=2)

    keys = jax.random.split(jax.random.key(0), 4)
    for run in (
        lambda draw: jax.lax.map(draw, keys),
        lambda draw: jax.vmap(draw)(keys),
        lambda draw: mapping.jit_lifted(lambda k: jax.lax.map(draw, k), devices=jax.devices())(
            keys
        ),
    ):
        expected, found = (run(functools.partial(draw, dataset)) for dataset in on_host)
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_class_that_is_too_small_is_refused_on_the_host_too(on_host):
    with pytest.raises(ValueError, match="class 0 has only 6 images"):
        episodes.check_task_shape(on_host[1], ways=2, shots=4, queries=3)
