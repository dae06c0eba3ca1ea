"""The house rules: imports only go down, importing is light, and the metadata agree."""

import ast
import configparser
import doctest
import importlib
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

import imaml_jax

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "imaml_jax"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# Lowest first. A wing imports from lower floors only, and its own modules each other. The root
# exports light modules of the wings below the protocols.
FLOORS = (
    ("types",),
    ("bilevel", "data", "networks"),
    ("learners",),
    ("training",),
    ("policies",),
    ("protocols",),
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}
HEAVY = {"flax", "imaml_jax.training", "matplotlib", "orbax", "tensorflow", "tensorflow_datasets"}
ONLY_IN = {"flax": "networks", "orbax": "training.checkpoint"}
NEVER_AT_TOP = ("matplotlib.pyplot", "tensorflow", "tensorflow_datasets")
DOCTEST_OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Import(NamedTuple):
    name: str  # dotted and absolute; `from a import b` gives "a.b"
    line: int
    at_top: bool  # runs when the module is imported


def dotted_name(path):
    """`imaml_jax/learners/maml.py` -> `imaml_jax.learners.maml`."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def read_imports(source, module, is_package=False):
    """Every import of a source text, wherever it stands."""
    found = []

    def visit(node, at_top):
        if isinstance(node, ast.Import):
            found.extend(Import(alias.name, node.lineno, at_top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: None if is_package else -1]
            base = base[: len(base) - node.level + 1] if node.level else []
            prefix = ".".join([*base, *filter(None, [node.module])])
            found.extend(Import(f"{prefix}.{a.name}", node.lineno, at_top) for a in node.names)
        lazy = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, at_top and not lazy and not is_type_checking(node))

    visit(ast.parse(source), True)
    return found


def starts_with(name, prefix):
    return name == prefix or name.startswith(prefix + ".")


def house_faults(source, module, is_package=False):
    """What is wrong with the imports of one module, as lines of text."""
    own = (module.split(".") + [""])[1]  # "" for imaml_jax/__init__.py
    if own and own not in FLOOR:
        return [f"{module} is in no wing: add {own!r} to FLOORS"]
    floor = FLOOR[own or "protocols"]
    faults = []
    for name, line, at_top in read_imports(source, module, is_package):
        where = f"{module}, line {line}: imports {name}"
        top, *rest = name.split(".")
        if top == "imaml_jax":
            other = rest[0] if rest else ""
            if other not in FLOOR:
                faults.append(f"{where}: import from the module that defines it")
            elif other != own and FLOOR[other] >= floor:
                faults.append(f"{where}, which does not stand below it")
        elif top in ("experiments", "notebooks", "tests"):
            faults.append(f"{where}, which is not installed")
        elif top in ONLY_IN and not starts_with(module, f"imaml_jax.{ONLY_IN[top]}"):
            faults.append(f"{where}: only {ONLY_IN[top]} imports {top}")
        elif at_top and any(starts_with(name, heavy) for heavy in NEVER_AT_TOP):
            faults.append(f"{where} at the top of the module: import it where it is used")
    return faults


SHARED = {"algorithm", "base", "ensemble", "posterior", "reg_strength", "settings"}
SHARED |= {"leo_inputs", "supervised", "svgd"}
ALGORITHMS = (
    {path.stem for path in (PACKAGE / "learners").glob("[a-z]*.py")} - SHARED - {"registry"}
)


def imported_algorithms(path):
    """Of which algorithms' files a module imports a name."""
    found = set()
    for name, *_ in read_imports(path.read_text(encoding="utf-8"), dotted_name(path)):
        algorithm = re.fullmatch(r"imaml_jax\.(?:learners\.)?(\w+)(?:\.\w+)?", name)
        if algorithm and algorithm[1] in ALGORITHMS:
            found.add(algorithm[1])
    return found


def test_an_algorithm_knows_no_other():
    """So that any file can be deleted with its row, but those that PLATIPUS adapts by."""
    found = {
        (name, other)
        for name in ALGORITHMS
        for other in imported_algorithms(PACKAGE / "learners" / f"{name}.py") - {name}
    }
    by_imaml = {("implicit_platipus", "imaml"), ("implicit_platipus", "platipus")}
    assert found == {("platipus", "maml"), ("imaml_variants", "imaml"), *by_imaml}


def test_what_serves_all_algorithms_imports_none():
    """But the registry, and protocols, which are settings of algorithms.

    Features are scored by their baseline.
    """
    learners = PACKAGE / "learners"
    apart = (learners, PACKAGE / "protocols")
    sources = [path for path in SOURCES if path.parent not in apart and path.stem != "__init__"]
    sources += [learners / f"{name}.py" for name in SHARED]
    sources += sorted((ROOT / "experiments").rglob("*.py"))
    found = {(path.stem, name) for path in sources for name in imported_algorithms(path)}
    assert found == {("features", "nearest_centroid")}


@pytest.mark.parametrize("path", SOURCES, ids=dotted_name)
def test_imports_only_go_down(path):
    faults = house_faults(
        path.read_text(encoding="utf-8"), dotted_name(path), path.name == "__init__.py"
    )
    assert not faults, "\n".join(faults)


@pytest.mark.parametrize(
    ("module", "source", "is_wrong"),
    [
        ("bilevel.curvature", "from imaml_jax.types import Batch", False),
        ("bilevel.curvature", "from .. import types", False),
        ("bilevel.curvature", "from imaml_jax.bilevel import linear_solve", False),
        ("bilevel.curvature", "def f():\n  from ..learners.base import supervised", True),
        ("learners.maml", "from .base import validate", False),
        ("learners.maml", "from ..training import train", True),
        ("learners.maml", "from imaml_jax import Task", True),
        ("training.metrics", "import imaml_jax.protocols", True),
        ("bilevel.inner", "from experiments import demo", True),
        ("data.sinusoid", "from imaml_jax.bilevel import inner", True),
        ("attic", "import jax", True),
        ("networks.mlp", "import flax.linen as nn", False),
        ("learners.maml", "def f():\n  import flax", True),
        ("training.loop", "import orbax.checkpoint", True),
        ("training.checkpoint", "def f():\n  import orbax.checkpoint", False),
        ("training.plots", "def f():\n  import matplotlib.pyplot as plt", False),
        ("training.plots", "from matplotlib import pyplot", True),
        ("data.omniglot", "try:\n  import tensorflow_datasets\nexcept ImportError: pass", True),
    ],
)
def test_the_import_reader_sees(module, source, is_wrong):
    assert bool(house_faults(source, f"imaml_jax.{module}")) == is_wrong


def test_the_package_is_its_wings():
    """Beside them there are only `types.py` and `__init__.py`; each wing says how to read it."""
    assert {path.stem for path in PACKAGE.glob("*.py")} == {"__init__", "types"}
    for wing in FLOOR.keys() - {"types"}:
        text = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text("utf-8")))
        assert "Imports" in text and re.search(r"Read\s+`\w+\.py`\s+first", text), wing


@pytest.mark.parametrize("module", ["imaml_jax", "imaml_jax.bilevel", "imaml_jax.learners"])
def test_importing_is_light(module):
    code = f"import json, sys, {module}; print(json.dumps(sorted({HEAVY} & sys.modules.keys())))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == []


def test_importing_reaches_for_nothing():
    """Every module of the library and of the experiments, with sockets that refuse."""
    code = """
import importlib, pathlib, socket
def refuse(*_):
    raise AssertionError("an import opened a connection")
socket.socket.connect = socket.getaddrinfo = refuse
for folder in ("imaml_jax", "experiments"):
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        if path.stem != "__main__" and "peers" not in path.stem:
            importlib.import_module(".".join(path.with_suffix("").parts).removesuffix(".__init__"))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_public_names_are_sorted_and_there():
    names = list(imaml_jax.__all__)
    assert names == sorted(set(names))
    assert [name for name in names if not hasattr(imaml_jax, name)] == []


@pytest.mark.parametrize("path", SOURCES, ids=dotted_name)
def test_docstring_examples_run(path):
    module = importlib.import_module(dotted_name(path))
    assert doctest.testmod(module, optionflags=DOCTEST_OPTIONS).failed == 0


@pytest.mark.parametrize("page", ["README.md", "docs/how_to/which_solver.md"])
def test_examples_of_the_texts_run(page):
    result = doctest.testfile(str(ROOT / page), module_relative=False, optionflags=DOCTEST_OPTIONS)
    assert result.attempted > 0, f"{page} has no example"
    assert result.failed == 0


@pytest.fixture(scope="module")
def setup_cfg():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    return config


def test_version_agrees(setup_cfg):
    version = setup_cfg["metadata"]["version"]
    assert imaml_jax.__version__ == version
    assert f"\n## [{version}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_requirements_agree(setup_cfg):
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    requirements = [line for line in lines if line and not line.startswith("#")]
    assert requirements == setup_cfg["options"]["install_requires"].split()
    assert requirements == sorted(requirements)


@pytest.fixture(scope="module")
def tracked_files():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    names = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    return [path for name in names.split("\0") if name and (path := ROOT / name).is_file()]


def test_tracked_files_are_small(tracked_files):
    assert [path for path in tracked_files if path.stat().st_size > 2**20] == []


def test_tracked_files_name_no_path_of_one_machine(tracked_files):
    pattern = re.compile(rb"(?<![\w.])/(?:work|tmp)/")
    assert [path for path in tracked_files if pattern.search(path.read_bytes())] == []
