"""The command lines, end to end on tiny budgets, and what they refuse."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
import yaml
from PIL import Image

from imaml_jax.data import cache, glyphs
from imaml_jax.learners.registry import ALGORITHMS
from imaml_jax.learners.settings import field_docs, settings_of

ROOT = Path(__file__).resolve().parents[2]
TINY = "--meta-steps 2 --log-every 2 --validate-every 2 --meta-batch 2 --num-steps 1".split()
TINY += "--eval-num-steps 2 --validation-tasks 2 --test-tasks 2".split()
TINY_SINUSOID = "--meta-steps 4 --log-every 2 --num-steps 2 --validation-tasks 2".split()
TINY_SINUSOID += "--test-tasks 3".split()
TRAINING = ("glyphs", "mini_imagenet", "omniglot", "sinusoid")
REPORTS = ("benchmark", "compare", "compute_and_memory", "conditioning", "gradient_combinations")
REPORTS += (
    "meta_gradient_accuracy",
    "mini_imagenet_table",
    "omniglot_table",
    "platform_defaults",
    "solvers",
)
REPORTS += ("throughput", "toolbox_comparison", "tune")
REPORTS += ("classify", "export", "folder")
REPORTS += (
    "distillation",
    "equilibrium",
    "error_estimate",
    "family",
    "feature_weights",
    "features",
    "hyper_cleaning",
    "introduction",
    "leo",
    "market",
    "navigation",
)
COMMANDS = (*TRAINING, *REPORTS)
RECORDED = {"algorithm", "command", "cores", "date", "device", "machine", "seed", "versions"}
RECORDED |= {
    "best_step",
    "commit",
    "dataset",
    "peak_memory_mib",
    "seconds",
    "settings",
    "test_ci95",
    "trained_meta_steps",
}


@pytest.fixture(scope="session")
def environment(tmp_path_factory):
    """Of the subprocesses: one cache of programs and glyphs.

    Noise stands in for the glyphs, whose rendering takes ten seconds. Validation and test classes
    are as many, so that one program scores both.
    """
    folder = tmp_path_factory.mktemp("cache")

    def render():
        by_split = [[c for c in range(1000) if glyphs._split_of(c) == part] for part in range(3)]
        codes = np.array([group[:20] for group in by_split], np.int32).ravel()
        shape = (len(codes), glyphs.EXAMPLES, glyphs.SIDE, glyphs.SIDE, 1)
        return {
            "images": np.random.default_rng(0).integers(0, 256, shape, np.uint8),
            "codes": codes,
        }

    with mock.patch.object(glyphs, "_render_all", render):
        glyphs.load(cache_dir=folder)
    return {
        **{k: v for k, v in os.environ.items() if k != "IMAML_DATA_DIR"},
        cache.ENV_CACHE_DIR: str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONWARNINGS": "error",
        "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2",
    }


@pytest.fixture(scope="session")
def modules():
    """The experiments by name."""
    names = ("demo", *COMMANDS)
    found = {name: importlib.import_module(f"experiments.{name}") for name in names}
    found["common"] = importlib.import_module("experiments.shared.common")
    packages = ("benchmark", "introduction")
    return found | {p: importlib.import_module(f"experiments.{p}.__main__") for p in packages}


@pytest.fixture
def run(environment):
    """`run("glyphs", "--ways", 3) -> CompletedProcess` of `python -m experiments.glyphs`."""

    def call(name, *args):
        return subprocess.run(
            [sys.executable, "-m", f"experiments.{name}", *map(str, args)],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return call


def check_results(workdir, done, algorithm):
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    results = json.loads((workdir / "results.json").read_text(encoding="utf-8"))
    assert results.keys() >= RECORDED
    assert results["algorithm"] == algorithm
    assert results["settings"]["inner"] in done.stdout  # the protocol stands beside the number
    assert (
        f"95% CI over {results['settings'].get('test_tasks') or results['test_tasks']} tasks"
        in (done.stdout)
    )
    assert results["command"].startswith("python -m experiments.")
    assert (workdir / "learning_curve.png").stat().st_size > 0
    rows = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[-1])["step"] == results["trained_meta_steps"]
    stored = yaml.safe_load((workdir / "config.yaml").read_text(encoding="utf-8"))
    stored = {name: None if value == "None" else value for name, value in stored.items()}
    assert {
        name: results[name] for name in stored.keys() & results.keys()
    }.items() <= stored.items()
    assert (stored["algorithm"], "workdir" in stored) == (algorithm, False)
    return results


OTHERS = [algorithm for algorithm in ALGORITHMS if algorithm != "fomaml"]


@pytest.mark.parametrize(
    "algorithm",
    ["fomaml", *(pytest.param(a, marks=pytest.mark.slow) for a in OTHERS)],
)
def test_glyphs(run, tmp_path, algorithm):
    tiny = TINY[:-6] + TINY[-4:] if algorithm == "mamlpp" else TINY  # it has one number of steps
    done = run("glyphs", "--algorithm", algorithm, *tiny, "--workdir", tmp_path)
    results = check_results(tmp_path, done, algorithm)
    assert results["dataset"] == "glyphs" and results["trained_meta_steps"] == 2
    assert 0 <= results["test_accuracy"] <= 1 and results["validation_accuracy"] is not None
    assert results["settings"]["test_rotations"] is None
    assert "split glyphs" in done.stdout and "; statistics " in done.stdout
    assert results["test_nll"] > 0 and 0 <= results["test_ece"] <= results["test_mce"] <= 1
    assert (tmp_path / "reliability.png").stat().st_size > 0


@pytest.mark.slow
def test_an_ensemble_of_checkpoints(run, tmp_path):
    tiny = "--meta-steps 3 --log-every 1 --validate-every 1 --num-steps 1 --meta-batch 2".split()
    tiny += "--validation-tasks 2 --test-tasks 2 --ensemble 2 --workdir".split()
    done = run("glyphs", "--algorithm", "mamlpp", *tiny, tmp_path)
    results = check_results(tmp_path, done, "mamlpp")
    assert len(results["ensemble_steps"]) == 2 and 0 <= results["ensemble_accuracy"] <= 1
    assert "ensemble of the best 2 checkpoints" in done.stdout


def test_family(run, tmp_path):
    arguments = "--tasks sinusoid --algorithms maml --budget 1e-9 --workdir".split()
    done = run("family", *arguments, tmp_path / "runs", "--output", tmp_path / "table")
    assert done.returncode == 0, done.stderr
    (row,) = json.loads((tmp_path / "table.json").read_text(encoding="utf-8"))
    assert row["trained_meta_steps"] == 100 and row["full_meta_steps"] == 70_000
    assert row["score"] > 0 and row["nll"] > 0 and row["memory_mib"] > 0
    assert "| maml | own |" in (tmp_path / "table.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["bmaml", "imaml", "implicit_platipus", "mamlpp", "reptile"])
def test_sinusoid(run, tmp_path, algorithm):
    done = run("sinusoid", "--algorithm", algorithm, *TINY_SINUSOID, "--workdir", tmp_path)
    results = check_results(tmp_path, done, algorithm)
    assert results["test_mse"] > 0 and results["test_mse_before"] > 0
    assert results["test_ci95_before"] > 0 and results["validation_mse"] > 0
    assert 0 <= results["coverage"] <= 1 and results["test_mse_of_samples"] > 0
    assert (tmp_path / "bands.png").stat().st_size > 0


def test_sinusoid_learns_the_rates_of_mamlpp_at_their_own_scale(modules):
    protocol = modules["sinusoid"].Config.of(algorithm="mamlpp").settings
    meta_params = protocol.build().init(jax.random.key(0), np.zeros((1, 1), np.float32))
    outer, rate = protocol.build_outer(), protocol.outer.outer_rate
    updates, _ = outer.update(jax.tree.map(np.ones_like, meta_params), outer.init(meta_params))
    for tree, step in (
        (updates.params, rate),
        (updates.rates, rate * protocol.learner.inner_rate),
    ):
        for update in jax.tree.leaves(tree):
            np.testing.assert_allclose(update, -step, rtol=1e-5)


@pytest.mark.parametrize(
    "algorithm, outer",
    [
        ("fomaml", "trpo"),
        pytest.param("maml", "trpo", marks=pytest.mark.slow),
        pytest.param("reptile", "adam", marks=pytest.mark.slow),
    ],
)
def test_navigation(run, tmp_path, algorithm, outer):
    line = "--meta-steps 2 --log-every 1 --meta-batch 2 --horizon 4 --validation-tasks 2"
    line += f" --test-tasks 3 --eval-num-steps 2 --algorithm {algorithm} --outer {outer}"
    done = run("navigation", *line.split(), "--workdir", tmp_path)
    results = check_results(tmp_path, done, algorithm)
    assert len(results["test_return"]) == len(results["test_ci95"]) == 3
    assert all(value < 0 for value in results["test_return"])
    assert "-11.7" in done.stdout  # the published return stands beside ours
    assert (tmp_path / "trajectories.png").stat().st_size > 0


@pytest.mark.slow
def test_features_and_leo(run, tmp_path):
    """From images, mostly of a pattern a class, to features, and from these to LEO."""
    rng, arrays = np.random.default_rng(0), {}
    for split, classes in (("train", range(6)), ("val", range(6, 11)), ("test", range(11, 16))):
        patterns = rng.integers(0, 200, (len(classes), 1, 16, 16, 3))
        images = patterns + rng.integers(0, 56, (len(classes), 20, 16, 16, 3))
        arrays[f"{split}_images"] = images.reshape(-1, 16, 16, 3).astype(np.uint8)
        arrays[f"{split}_labels"] = np.repeat(np.array(classes), 20)
    np.savez(tmp_path / "images.npz", **arrays)
    made = tmp_path / "made"
    dataset = ("--dataset", f"arrays:{tmp_path / 'images.npz'}", "--output", made)
    sizes = "--width 3 --epochs 2 --batch-size 40 --test-tasks 20".split()
    done = run("features", *dataset, *sizes)
    assert done.returncode == 0, done.stderr
    assert "95% CI over 20 test tasks" in done.stdout
    results = json.loads((made / "results.json").read_text(encoding="utf-8"))
    assert (results["train_classes"], results["trained_meta_steps"]) == (6, 6)
    for scores in results["nearest_centroid"].values():
        assert scores.keys() == {"5-way 1-shot", "5-way 5-shot"}
        assert all(0 <= mean <= 1 and ci95 > 0 for mean, ci95 in scores.values())

    tiny = "--meta-steps 2 --log-every 1 --meta-batch 2 --num-latents 2 --num-steps 2".split()
    tiny += "--inner-rate 0.1 --validation-tasks 4 --test-tasks 4 --test-queries 3".split()
    done = run("leo", "--features", made, "--workdir", tmp_path / "runs", *tiny)
    assert done.returncode == 0, done.stderr
    assert "95% CI over 4 tasks of unseen classes, the same for all" in done.stdout
    results = json.loads((tmp_path / "runs" / "results.json").read_text(encoding="utf-8"))
    assert results["settings"]["kl_weight"] == 0.756143
    assert list(results["rows"]) == ["nearest_centroid", "leo", "deterministic"]
    for name, row in results["rows"].items():
        assert 0 <= row["test_accuracy"] <= 1 and row["validation_accuracy"] is not None
        assert row["test_nll"] > 0
        if name != "nearest_centroid":
            assert row["trained_meta_steps"] == 2
            assert (tmp_path / "runs" / name / "learning_curve.png").exists()


@pytest.mark.slow
def test_own_images_from_folders_to_predictions(run, tmp_path):
    """Train, save, classify, and save again from the run."""
    rng = np.random.default_rng(0)
    for name in "abcdef":
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(3):
            pixels = rng.integers(0, 256, (20 + i, 17, 3), np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / name / f"{i}.{('png', 'jpg')[i % 2]}")
    model, workdir, output = tmp_path / "model", tmp_path / "run", tmp_path / "out"
    own = ("--data-dir", tmp_path / "data", "--ways", 2, "--image-size", 16, "--channels", 1)
    own += ("--algorithm", "fomaml", *TINY, "--workdir", workdir)
    done = run("folder", *own, "--model", model)
    results = check_results(workdir, done, "fomaml")
    assert "6 classes, 3 to 3 a class; 4/0/2 classes" in done.stdout
    assert "2 queries a class" in done.stdout and "in float16" in done.stdout
    assert results["dataset"] == "data" and results["settings"]["test_queries"] == 2
    description = json.loads((model / "model.json").read_text(encoding="utf-8"))
    assert description["test_accuracy_unrounded"] == results["test_accuracy"]
    assert (description["image_size"], description["channels"]) == (16, 1)
    split = json.loads((model / "split.json").read_text(encoding="utf-8"))
    assert sorted(split.values()) == ["test"] * 2 + ["train"] * 4

    for name in "abc":
        (tmp_path / "support" / name).mkdir(parents=True)
        shutil.copy(tmp_path / "data" / name / "0.png", tmp_path / "support" / name)
    folders = ("--support", tmp_path / "support", "--query", tmp_path / "data" / "a")
    assert_refused(run("classify", "--model", model, *folders), "3 classes (a, b, c)", "--ways 3")
    shutil.rmtree(tmp_path / "support" / "c")
    done = run("classify", "--model", model, *folders, "--output", output)
    assert done.returncode == 0, done.stderr
    assert "2 classes of 1 images (a, b)" in done.stdout and "accuracy on" not in done.stdout
    rows = (tmp_path / "out.csv").read_text(encoding="utf-8").splitlines()
    assert rows[0] == "file,predicted,p(a),p(b)" and len(rows) == 4
    assert (tmp_path / "out.png").stat().st_size > 0

    place = ("--data-dir", tmp_path / "data", "--output", tmp_path / "again")
    done = run("export", "--workdir", workdir, *place)
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "again" / "model.json").read_text(encoding="utf-8"))
    assert again == description


def test_a_run_goes_on_finishes_at_once_and_refuses_another_config(run, tmp_path):
    arguments = ("--algorithm", "maml", *TINY_SINUSOID, "--workdir", tmp_path)
    first = check_results(tmp_path, run("sinusoid", *arguments), "maml")
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000004")  # as if killed before it was written
    second = run("sinusoid", *arguments)
    results = check_results(tmp_path, second, "maml")
    assert (results["trained_meta_steps"], results["test_mse"]) == (4, first["test_mse"])
    assert "meta-step 4/4" in second.stderr and "meta-step 2/4" not in second.stderr
    third = run("sinusoid", *arguments)
    again = check_results(tmp_path, third, "maml")
    assert "meta-step" not in third.stderr
    assert again["test_mse"] == results["test_mse"]
    other = run("sinusoid", *arguments, "--inner-rate", 0.02)
    assert_refused(other, "settings.inner_rate: was 0.01, now 0.02", "choose another workdir")
    assert json.loads((tmp_path / "results.json").read_text(encoding="utf-8")) == again


def assert_refused(done, *fragments):
    assert done.returncode == 2, done.stderr
    message = done.stderr.strip()
    message = message[message.find("error: ") :]  # XLA may have said something before
    assert message.startswith("error: ") and "\n\n" not in message
    assert "Traceback" not in done.stderr
    assert "Traceback" not in message
    for fragment in fragments:
        assert fragment in message


def test_help_reaches_the_shell(run):
    done = run("sinusoid", "--help")
    assert done.returncode == 0, done.stderr
    assert "--meta-steps" in done.stdout and "default: imaml" in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_shows_every_setting_and_its_default(modules, capsys, name):
    module = modules[name]
    with pytest.raises(SystemExit) as ended:
        modules["common"].run_cli(module.main, module.Config, module.__doc__, ["--help"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    config = module.Config
    settings = settings_of(config.of(), True) if hasattr(config, "of") else field_docs(config)
    for setting in settings:
        assert f"--{setting.replace('_', '-')}" in shown
    assert "default: " in shown
    if name in TRAINING:
        assert "default: imaml" in shown and "default: None" in shown
        assert "Lambda, the strength" in shown


@pytest.mark.parametrize(
    "name", ["glyphs", *(pytest.param(n, marks=pytest.mark.slow) for n in TRAINING[1:])]
)
def test_refusals_reach_the_shell_without_a_traceback(run, name):
    assert_refused(run(name, "--inner-rate", "-0.1"), "inner_rate=-0.1", "above 0")


# What is typed, and what the message must name: the value, then the remedy or what is allowed.
REFUSED_SETTINGS = {
    "--ways 1": ("ways=1", "at least 2"),
    "--shots 0": ("shots=0", "at least 1"),
    "--inner-rate -0.1": ("inner_rate=-0.1", "above 0"),
    "--outer-rate -1": ("outer_rate=-1", "above 0"),
    "--outer-rate nan": ("outer_rate=nan", "above 0"),
    "--meta-steps 150": ("meta_steps=150", "multiple of log_every=100"),
    "--meta-steps 0": ("meta_steps=0", "at least 1"),
    "--validate-every 150": ("validate_every=150", "multiple of log_every=100"),
    "--num-steps 0": ("num_steps=0", "at least 1"),
    "--num-steps 2000000": ("num_steps=2000000", "at most 1000000"),
    "--eval-num-steps 0": ("eval_num_steps=0", "at least 1"),
    "--meta-batch 0": ("meta_batch=0", "at least 1"),
    "--validation-tasks 0": ("validation_tasks=0", "at least 1"),
    "--test-tasks 0": ("test_tasks=0", "at least 1"),
    "--map-tasks 0": ("map_tasks=0", "at least 1"),
    "--reg-strength 0": ("reg_strength=0", "above 0"),
    "--cg-steps 0": ("cg_steps=0", "at least 1"),
    "--max-seconds -1": ("max_seconds=-1", "above 0"),
    "--solve woodbury --curvature hessian": ("woodbury", "gauss_newton"),
    "--algorithm maml --reg-strength 1": ("--reg-strength", "algorithm=maml", "imaml, imaml_hf"),
    "--algorithm imaml_hf --inner sgd": ("--inner", "algorithm=imaml_hf"),
    "--algorithm imaml_hf --inner-rate 1": ("--inner-rate", "algorithm=imaml_hf"),
    "--algorithm implicit_anil --inner-rate 0.1": ("inner_rate=0.1", "effect on inner=newton_cg"),
    "--protocol imaml_dev --curvature hessian": ("--curvature", "protocol=imaml_dev"),
    "--no-learn-rates": ("--no-learn-rates", "algorithm=imaml", "of mamlpp"),
    "--solve woodbury --cg-steps 3": ("cg_steps=3", "no effect on solve=woodbury"),
    "--seed -1": ("seed=-1", "at least 0"),
    "--seed 99999999999999999999": ("seed=99999999999999999999", "at most 4294967295"),
    "--protocol finn": ("protocol='finn'", "anil and fomaml and maml", "algorithm='imaml'"),
    "--protocol finnn": ("protocol='finnn'", "did you mean finn?"),
    "--algorithm imamal": ("algorithm='imamal'", "did you mean imaml?"),
    "--protocol reptile --algorithm maml": ("protocol='reptile'", "algorithm='maml'"),
    "--protocol imaml_paper --algorithm fomaml": ("protocol='imaml_paper'", "algorithm='fomaml'"),
    "--learn-rates": ("--learn-rates", "algorithm=imaml", "of mamlpp"),
    "--num-samples 3": ("--num-samples", "algorithm=imaml", "platipus"),
    "--algorithm anil --reg-strength 1": ("--reg-strength", "implicit_anil"),
    "--algorithm mamlpp --eval-num-steps 7": ("--eval-num-steps", "algorithm=mamlpp"),
    "--algorithm mamlpp --ensemble 3 --protocol mamlpp_code --ensemble 0": ("ensemble=0",),
    "--protocol imaml_dev --solve cg": ("--solve",),
    "--inner-rat 1": ("--inner-rat is no setting; did you mean --inner-rate?",),
}
# What the parser itself refuses, in a box of several lines.
REFUSED_BY_THE_PARSER = {
    "--algorithm maml --inner newton_cg": ("--inner", "newton_cg", "sgd"),
    "--schedule step": ("--schedule", "step", "cosine"),
    "--num-steps few": ("--num-steps", "few"),
}
REFUSED_WITH_DATA = {
    "--ways 1000": ("ways=1000", "Lower ways"),
    "--shots 18": ("18 + 5", "Lower shots"),
    "--devices 0": ("devices=0", "allowed: 1 to"),
    "--devices 1000": ("devices=1000", "allowed: 1 to"),
}
REFUSED_SINUSOID = {
    "--kernel official": ("--kernel", "algorithm=imaml", "bmaml, implicit_bmaml"),
    "--bandwidth 1": ("--bandwidth", "bmaml, implicit_bmaml"),
    "--bandwidth 0 --algorithm bmaml": ("bandwidth=0", "above 0"),
    "--bandwidth inf --algorithm bmaml": ("bandwidth=inf", "finite"),
    "--leader-steps 1": ("--leader-steps", "bmaml"),
    "--leader-steps 2 --algorithm bmaml": ("leader_steps=2", "meta_loss", "chaser"),
    "--leader-steps 0 --algorithm bmaml --meta-loss chaser": ("leader_steps=0", "at least 1"),
    "--bandwidth 1e-50 --algorithm bmaml": ("bandwidth=1e-50", "at least"),
    "--num-samples 1 --algorithm bmaml": ("bmaml", "give more particles"),
    "--shots 0": ("shots=0", "at least 1"),
    "--meta-steps 1500": ("meta_steps=1500", "multiple of log_every=1000"),
    "--reg-strength 0": ("reg_strength=0", "above 0"),
    "--reg-strength 1 --algorithm maml": ("--reg-strength", "algorithm=maml", "imaml"),
    "--inner-rate -1": ("inner_rate=-1", "above 0"),
    "--max-seconds -1": ("max_seconds=-1", "above 0"),
    "--test-tasks 0": ("test_tasks=0", "at least 1"),
    "--num-samples 2 --algorithm maml": ("--num-samples", "algorithm=maml", "platipus"),
    "--inner adaptive_gd --algorithm mamlpp": ("--inner", "algorithm=mamlpp"),
}


REFUSED_REPORTS = {
    "benchmark --rounds 0": ("rounds=0", "at least 1"),
    "benchmark --devices 1000": ("devices=1000", "allowed: 1 to"),
    "benchmark --output .": ("output=.", "must name a file"),
    "classify --model x --support x --query x --output .": ("output=.", "must name a file"),
    "classify --model nowhere --support x --query x": ("nowhere", "model.json", "Name one that"),
    "export --workdir nowhere --output x": ("workdir=nowhere", "holds no run"),
    "folder --data-dir nowhere": ("nowhere", "Name the folder that holds the class folders"),
    "folder --data-dir x --image-size 8": ("image_size=8", "at least 16"),
    "folder --data-dir x --image-size 2000": ("image_size=2000", "at most 1024"),
    "folder --data-dir x --queries 0": ("queries=0", "at least 1"),
    "folder --data-dir x --split-seed -1": ("split_seed=-1", "at least 0"),
    "folder --data-dir x --shares 1 0 0 --split-file y": ("no effect on split_file", "either out"),
    "compute_and_memory --axis filters --values 8": ("values=(8,)", "two different"),
    "compute_and_memory --values 1 2": ("num_steps=1", "at least 2"),
    "compute_and_memory --rounds -1": ("rounds=-1", "at least 0"),
    "compute_and_memory --output .": ("output=.", "must name a file"),
    "conditioning --conditions 1": ("conditions=(1.0,)", "above 1"),
    "conditioning --size 1": ("size=1", "at least 2"),
    "conditioning --tol 0": ("tol=0", "above 0"),
    "conditioning --max-steps 0": ("max_steps=0", "at least 1"),
    "conditioning --threshold nan": ("threshold=nan", "above 0"),
    "conditioning --output .": ("output=.", "must name a file"),
    "distillation --per-class 0": ("per_class=0", "at least 1"),
    "distillation --outer-rate nan": ("outer_rate=nan", "above 0"),
    "distillation --seed -1": ("seed=-1", "at least 0"),
    "distillation --output .": ("output=.", "must name a file"),
    "equilibrium --contraction 1": ("contraction=1.0", "above 0 and below 1"),
    "equilibrium --unrolled 0": ("unrolled=(0,)", "at least 1"),
    "equilibrium --train-examples 10": ("train_examples=10", "at least 100"),
    "equilibrium --learning-rate 0": ("learning_rate=0.0", "above 0"),
    "equilibrium --output .": ("output=.", "must name a file"),
    "error_estimate --problems 1": ("problems=1", "at least 2"),
    "error_estimate --cg-steps 0": ("cg_steps=0", "at least 1"),
    "error_estimate --seed -1": ("seed=-1", "at least 0 and at most"),
    "feature_weights --datasets": ("datasets=()", "name at least one"),
    "feature_weights --probes -1": ("probes=(-1,)", "at least 0"),
    "feature_weights --splits 0": ("splits=0", "at least 1"),
    "feature_weights --outer-rate inf": ("outer_rate=inf", "above 0"),
    "feature_weights --output .": ("output=.", "must name a file"),
    "introduction --output .": ("output=.", "ends in .html"),
    "introduction --output page.txt": ("output=page.txt", "ends in .html"),
    "introduction --output /proc/introduction.html": ("output=/proc/introduction.html", "choose"),
    "introduction --seed -1": ("seed=-1", "at least 0 and at most"),
    "family --budget 0": ("budget=0.0", "above 0"),
    "family --algorithms mamal": ("algorithms='mamal'", "reptile"),
    "family --tasks": ("nothing to run",),
    "family --output .": ("output=.", "must name a file"),
    "features --output x --epochs 0": ("epochs=0", "at least 1"),
    "features --output x --rate nan": ("rate=nan", "above 0"),
    "features --output x --weight-decay -1": ("weight_decay=-1.0", "at least 0"),
    "features --output x --dataset nothing": ("dataset=nothing", "folder:PATH"),
    "gradient_combinations --meta-steps 100": ("meta_steps=100", "multiple of eval_every=250"),
    "gradient_combinations --dataset glyphs --data-dir x": ("data_dir=x", "leave it out"),
    "gradient_combinations --output .": ("output=.", "must name a file"),
    "hyper_cleaning --corrupted 1": ("corrupted=1.0", "above 0 and below 1"),
    "hyper_cleaning --corrupted nan": ("corrupted=nan", "above 0 and below 1"),
    "hyper_cleaning --train-examples 0": ("train_examples=0", "at least 1"),
    "hyper_cleaning --reg-strength 0": ("reg_strength=0.0", "above 0"),
    "hyper_cleaning --output .": ("output=.", "must name a file"),
    "leo --ways 1": ("ways=1", "at least 2"),
    "leo --shots 0": ("shots=0", "at least 1"),
    "leo --dropout 1": ("dropout=1.0", "below 1"),
    "leo --variants deterministic --kl-weight 2": ("kl_weight=2.0", "variants=leo"),
    "leo --kl-weight -1": ("kl_weight=-1.0", "at least 0"),
    "leo --meta-steps 1500": ("meta_steps=1500", "multiple of log_every=1000"),
    "leo --eval-num-steps 3": ("--eval-num-steps is no setting",),
    "leo --outer-rate 0": ("outer_rate=0.0", "above 0"),
    "leo --features nowhere": ("nowhere", "python -m experiments.features", "embeddings.zip"),
    "market --elasticity 1": ("elasticity=1.0", "above 1"),
    "market --goods 1": ("goods=1", "at least 2"),
    "market --firms 0": ("firms=0", "at least 1"),
    "market --output .": ("output=.", "must name a file"),
    "meta_gradient_accuracy --condition 1": ("condition=1.0", "above 1"),
    "meta_gradient_accuracy --num-steps 0": ("num_steps=(0,)", "at least 1"),
    "meta_gradient_accuracy --output .": ("output=.", "must name a file"),
    "navigation --meta-steps 7": ("meta_steps=7", "multiple of log_every=5"),
    "navigation --algorithm reptile --outer trpo": ("algorithm='reptile'", "Optax"),
    "navigation --algorithm fomaml --estimator lvc": ("--estimator is no setting",),
    "navigation --estimator emaml": ("estimator='emaml'", "Optax"),
    "navigation --reg-strength 1": ("--reg-strength", "algorithm=maml", "imaml"),
    "navigation --outer-rate 1": ("outer_rate=1.0", "outer=trpo"),
    "navigation --non-finite skip": ("non_finite=skip", "outer=trpo"),
    "navigation --inner-rate nan": ("inner_rate=nan", "above 0"),
    "navigation --meta-batch 0": ("meta_batch=0", "at least 1"),
    "navigation --max-seconds -1": ("max_seconds=-1", "above 0"),
    "navigation --algorithm mamll": ("algorithm='mamll'", "did you mean maml?"),
    "compare --output .": ("runs", "at least one"),
    "omniglot_table --budget 0": ("budget=0", "above 0"),
    "omniglot_table --log-every 0": ("log_every=0", "at least 1"),
    "omniglot_table --ways": ("nothing to run", "ways"),
    "omniglot_table --seeds -1": ("seeds=(-1,)", "at least 0"),
    "omniglot_table --output .": ("output=.", "must name a file"),
    "tune --meta-steps 0": ("meta_steps=0", "at least 1"),
    "platform_defaults --rounds 0": ("rounds=0", "at least 1"),
    "platform_defaults --max-seconds nan": ("max_seconds=nan", "above 0"),
    "platform_defaults --map-tasks pmap": ("map_tasks", "got 'pmap'"),
    "platform_defaults --map-tasks 0": ("map_tasks", "got 0"),
    "platform_defaults --output .": ("output=.", "must name a file"),
    "solvers --sizes 5": ("sizes=('5',)", "5x1"),
    "solvers --sizes 1x5": ("sizes=('1x5',)", "at least 2 ways"),
    "solvers --reg-strengths 0": ("reg_strengths=(0.0,)", "above 0"),
    "solvers --rounds 0": ("rounds=0", "at least 1"),
    "solvers --output .": ("output=.", "must name a file"),
    "throughput --chunks 0": ("chunks=0", "at least 1"),
    "throughput --output .": ("output=.", "must name a file"),
    "toolbox_comparison --problems": ("problems=()", "name at least one"),
    "toolbox_comparison --compilations 0": ("compilations=0", "at least 1"),
    "toolbox_comparison --rounds 0": ("rounds=0", "at least 1"),
    "toolbox_comparison --tol 1": ("tol=1", "below 1"),
    "toolbox_comparison --output .": ("output=.", "must name a file"),
}


def refusal(modules, name, line, capsys):
    """What `python -m experiments.<name> <line>` would print, with anything slow forbidden."""
    module = modules[name]
    with (
        mock.patch.object(jax, "jit", side_effect=AssertionError("compiled before the check")),
        mock.patch.object(modules["common"], "cache_compilations"),
        pytest.raises(SystemExit) as stopped,
    ):
        modules["common"].run_cli(module.main, module.Config, module.__doc__, line.split())
    assert stopped.value.code == 2
    return capsys.readouterr().err


def assert_message(message, *fragments):
    assert message.startswith("error: ") and message.count("\n") == 1
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("line", REFUSED_SETTINGS)
def test_settings_are_refused_before_any_data_are_read(modules, capsys, line):
    with mock.patch.object(glyphs, "load", side_effect=AssertionError("read the data")):
        assert_message(refusal(modules, "glyphs", line, capsys), *REFUSED_SETTINGS[line])


@pytest.mark.parametrize("line", REFUSED_BY_THE_PARSER)
@pytest.mark.parametrize("name", ["glyphs", "sinusoid"])
def test_the_parser_refuses(modules, capsys, name, line):
    message = refusal(modules, name, line, capsys)
    assert all(fragment in message for fragment in REFUSED_BY_THE_PARSER[line])


@pytest.mark.parametrize("line", REFUSED_WITH_DATA)
def test_what_the_data_do_not_allow_is_refused(modules, environment, capsys, monkeypatch, line):
    monkeypatch.setenv(cache.ENV_CACHE_DIR, environment[cache.ENV_CACHE_DIR])
    assert_message(refusal(modules, "glyphs", line, capsys), *REFUSED_WITH_DATA[line])


@pytest.mark.parametrize("line", REFUSED_SINUSOID)
def test_sinusoid_refuses(modules, capsys, line):
    assert_message(refusal(modules, "sinusoid", line, capsys), *REFUSED_SINUSOID[line])


@pytest.mark.parametrize("line", REFUSED_REPORTS)
def test_reports_refuse(modules, capsys, line):
    name, arguments = line.split(maxsplit=1)
    assert_message(refusal(modules, name, arguments, capsys), *REFUSED_REPORTS[line])


def test_omniglot_says_where_it_looked(modules, tmp_path, capsys):
    absent = tmp_path / "absent"
    message = refusal(modules, "omniglot", f"--data-dir {absent}", capsys)
    assert_message(message, str(absent), "images_background.zip", "download")


def test_a_workdir_that_cannot_be_made_is_refused(modules, tmp_path, capsys):
    occupied = tmp_path / "file"
    occupied.write_text("")
    line = f"--workdir {occupied} {' '.join(TINY_SINUSOID)}"
    module = modules["sinusoid"]
    with (
        mock.patch.object(modules["common"], "cache_compilations"),
        pytest.raises(SystemExit) as stopped,
    ):
        modules["common"].run_cli(module.main, module.Config, None, line.split())
    assert stopped.value.code == 2
    assert_message(capsys.readouterr().err, str(occupied))


def test_a_bug_keeps_its_traceback(modules):
    def main(config):
        np.zeros(2).reshape(3)  # a ValueError of NumPy

    with pytest.raises(ValueError, match="reshape"):
        modules["common"].run_cli(main, modules["sinusoid"].Config, None, [])


def test_what_stops_the_training_is_told(modules, capsys):
    from imaml_jax.training import NonFiniteError

    def main(config):
        raise NonFiniteError(7, 2, jax.random.key(0), None)

    with pytest.raises(SystemExit) as stopped:
        modules["common"].run_cli(main, modules["sinusoid"].Config, None, [])
    assert stopped.value.code == 1
    assert_message(capsys.readouterr().err, "meta-step 7")


def test_devices_divide_the_batch(modules):
    devices = [mock.Mock(process_index=0) for _ in range(4)]
    task_devices = modules["common"].task_devices
    with (
        mock.patch.object(jax, "local_devices", return_value=devices),
        mock.patch.object(jax, "devices", return_value=devices),
    ):
        assert task_devices(None, 8) == devices
        assert task_devices(None, 6) == devices[:3]
        assert task_devices(3, 8) == devices[:2]
        assert task_devices(None, 5) is None and task_devices(1, 8) is None
        for wrong in (0, 5, -1):
            with pytest.raises(ValueError, match=f"devices={wrong}; allowed: 1 to 4"):
                task_devices(wrong, 8)


def test_devices_of_several_processes(modules):
    """As many of each process, and no process without one."""
    devices = [mock.Mock(process_index=n // 4) for n in range(8)]
    task_devices = modules["common"].task_devices
    with (
        mock.patch.object(jax, "process_count", return_value=2),
        mock.patch.object(jax, "local_devices", return_value=devices[:4]),
        mock.patch.object(jax, "devices", return_value=devices),
    ):
        assert task_devices(None, 8) == devices
        assert task_devices(None, 12) == [*devices[:3], *devices[4:7]]
        assert task_devices(1, 8) == [devices[0], devices[4]]
        assert task_devices(None, 2) == [devices[0], devices[4]]
        with pytest.raises(ValueError, match="num_processes=2 must divide the tasks"):
            task_devices(None, 7)


def test_demo(environment, tmp_path):
    names = ("--log-every", "--validate-every", "--validation-tasks", "--test-tasks")
    names += ("--meta-batch", "--num-steps", "--eval-num-steps")
    values = {n[2:].replace("-", "_"): int(TINY[TINY.index(n) + 1]) for n in names}
    code = f"""
from pathlib import Path
from experiments import demo
print(demo.main(Path({str(tmp_path)!r}), {{"fomaml": 2, "imaml": 2}}, **{values}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert [row["name"] for row in rows] == ["untrained initialisation", "fomaml", "imaml"]
    assert all(0 <= row["test_accuracy"] <= 1 and row["test_ci95"] >= 0 for row in rows)
    lowest, highest = (
        rows[2]["test_accuracy"] - rows[2]["test_ci95"],
        rows[0]["test_accuracy"] + rows[0]["test_ci95"],
    )
    *shown, passed = done.stdout.splitlines()
    assert passed == str(lowest > highest)
    curve = tmp_path / "imaml" / "learning_curve.png"
    assert curve.exists()
    assert shown[-2:] == [f"learning curve: {curve}", f"results: {tmp_path / 'results.json'}"]
