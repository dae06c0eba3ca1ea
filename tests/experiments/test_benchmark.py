"""The benchmark: what it counts, compares and refuses; it times only where slow tests are asked."""

import json
from unittest import mock

import jax
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict

from experiments.benchmark import __main__ as benchmark
from experiments.benchmark import ours, peers, workload

IMAML, MAML, PEER = "iMAML, Hessian, solve_cg_steihaug", "MAML", "torchopt MAML"
BY_NAME = {contender.name: contender for contender in workload.CONTENDERS}


def test_every_contender_has_its_program():
    made = {*ours.learners(), *peers.QUERY_LOSSES}
    assert made == set(BY_NAME)
    for contender in workload.CONTENDERS:
        reference = workload.reference_of(contender)
        assert reference.same and reference.library is None
        assert reference.quick or not contender.quick
        assert (contender.library is not None) == (contender.name in peers.QUERY_LOSSES)


def test_the_layers_of_a_max_pooling_network():
    layers = workload.layers(workload.Size(10, 3, 4, pools=True))
    assert layers[0] == (2 * 100 * 9 * 3 * 4, 100 * (3 + 4), 9 * 3 * 4)
    sides = [10, 5, 2, 1]  # nothing is left of the last one
    assert [layer.flops for layer in layers[1:4]] == [2 * s * s * 9 * 4 * 4 for s in sides[1:]]
    assert layers[4] == (0, 5, 0)


def test_flops_of_the_reference_workload():
    # conv4-64 on 28x28: 14^2*9*64 in the first layer, (7^2 + 4^2 + 2^2)*576*64 + 256*5 after it
    first, others = 2 * 196 * 576, 2 * (69 * 576 * 64 + 256 * 5)
    assert workload.forward_flops() == (first, others)
    gradient, product = 2 * first + 3 * others, 2 * first + 6 * others
    assert workload.flops("fomaml") == 16 * (16 * 5 + 75) * gradient
    assert workload.flops("reptile") == 16 * 16 * 5 * gradient
    assert workload.flops("maml") == workload.flops("fomaml") + 16 * 16 * 5 * product
    assert workload.flops("imaml") == 16 * ((17 * 5 + 75) * gradient + 5 * 5 * product)


def test_parameters_and_tasks_fit_the_network():
    params = unflatten_dict(workload.params(), sep="/")
    support, query = workload.tasks(seed=1, num_tasks=3)
    network = ours.conv4(workload.WAYS, filters=workload.REFERENCE.filters)
    shapes = jax.eval_shape(network.init, jax.random.key(0), support[0][0])
    assert jax.tree.map(lambda x: x.shape, params) == jax.tree.map(lambda x: x.shape, shapes)
    assert support[0].shape == (3, 5, 28, 28, 1) and query[0].shape == (3, 75, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(query[1][0]), 15)
    assert not np.array_equal(support[0], workload.tasks(seed=2, num_tasks=3)[0][0])


def test_pytorch_computes_the_same_network():
    torch = pytest.importorskip("torch")
    named = workload.params()
    (images, _), _ = workload.tasks(seed=0, num_tasks=1)
    network = ours.conv4(
        workload.WAYS, filters=workload.REFERENCE.filters, epsilon=workload.EPSILON
    )
    expected = network.apply(unflatten_dict(named, sep="/"), images[0])
    net = peers._network(named, workload.REFERENCE, exact=True)
    found = net(torch.tensor(np.moveaxis(images[0], -1, 1).copy())).detach().numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    back = peers._to_jax([parameter.detach() for parameter in net.parameters()])
    assert back.keys() == named.keys()
    for path, array in named.items():
        np.testing.assert_array_equal(back[path], array)


def one_run(**seconds):
    names = {"product": workload.MATMUL, "imaml": IMAML, "maml": MAML, "peer": PEER}
    info = {"imaml": {"solve_steps": 5.0, "inner_residual": 0.25}}
    return {names[k]: {"seconds": s, "info": info.get(k, {})} for k, s in seconds.items()}


def test_contenders_are_compared_round_by_round(tmp_path):
    runs = [
        one_run(product=1.0, imaml=1.0, maml=2.0, peer=4.0),
        one_run(product=2.0, imaml=2.0, maml=2.0, peer=8.0),
        one_run(product=3.0, imaml=3.0, maml=2.0, peer=6.0),
    ]
    contenders = [BY_NAME[name] for name in (IMAML, MAML, PEER)]
    memory = {c.name: {"temp_bytes": None, "peak_resident_bytes": 2**30} for c in contenders}
    results = benchmark.summary(contenders, runs, memory, {PEER: 1e-14}, devices=2)
    rows = results["contenders"]
    assert results["ceiling_flops"] == 2 * 2 * workload.MATRIX**3 * workload.PRODUCTS / 2.0
    assert rows[PEER]["ratio"] == [3.0, 2.0, 4.0] and rows[PEER]["ratio_to"] == MAML
    assert rows[IMAML]["ratio"] == [1.0, 1.0, 1.0]
    share = workload.flops("maml") / 2.0 / results["ceiling_flops"]
    assert rows[MAML]["share_of_ceiling"] == share
    results |= {"machine": "m", "device": "cpu", "cores": 2, "date": "2026-01-01"}
    lines = benchmark.table(results).splitlines()
    assert [line.split("  ")[0] for line in lines[2:5]] == [IMAML, MAML, PEER]
    assert "0.250" in lines[2] and "3.00 (2.00-4.00)" in lines[4] and "1e-14" in lines[4]
    benchmark.draw(results, tmp_path / "bars.png")
    assert (tmp_path / "bars.png").stat().st_size > 5000


def test_a_solve_cut_short_is_no_measurement():
    run, whole = (one_run(product=1.0, imaml=1.0) for _ in range(2))
    run[IMAML]["info"] = {"solve_steps": 4.9}
    with pytest.raises(RuntimeError, match=r"took \[4\.9, 5\.0\] CG steps"):
        benchmark.summary([BY_NAME[IMAML]], [run, whole], {IMAML: {}}, {}, devices=1)


def test_contenders_that_disagree_are_not_timed():
    gradients = {MAML: {"a": np.array([3.0, 4.0])}, PEER: {"a": np.array([3.0, 4.0 + 5e-9])}}
    assert benchmark.difference(gradients[PEER], gradients[MAML]) == pytest.approx(1e-9)
    contenders = [BY_NAME[MAML], BY_NAME[PEER]]
    with mock.patch.object(benchmark, "_gradients", lambda name: gradients[name]):
        with pytest.raises(RuntimeError, match=r"torchopt MAML and MAML differ by 1\.0e-09"):
            benchmark.disagreements(contenders, str)
        gradients[PEER]["a"][1] = 4.0
        assert benchmark.disagreements(contenders, str) == {PEER: 0.0}


def test_a_contender_that_stops_is_named():
    with benchmark.process("no such learner", 1) as ask:
        with pytest.raises(RuntimeError, match=r"(?s)no such learner exited with 1:.*KeyError"):
            ask(0)


@pytest.mark.slow
def test_quick_benchmark(tmp_path, capsys):
    output = tmp_path / "out" / "table"
    results = benchmark.main(benchmark.Config(quick=True, rounds=1, output=output))
    stored = json.loads(output.with_name("table.json").read_text())
    assert stored["contenders"] == results["contenders"]
    assert output.with_name("table.png").stat().st_size > 5000
    shown = [c for c in workload.CONTENDERS if c.quick and benchmark.available(c)]
    assert list(results["contenders"]) == [c.name for c in shown]
    printed = capsys.readouterr().out
    for contender in shown:
        row = results["contenders"][contender.name]
        assert contender.name in printed and row["seconds"] > 0
        checked = contender != workload.reference_of(contender)
        assert row["disagreement"] < 1e-10 if checked else row["disagreement"] is None
