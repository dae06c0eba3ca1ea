"""The documentation names what exists, and builds without a warning."""

import contextlib
import importlib
import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

import imaml_jax
from experiments.shared import cli

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path for path in DOCS.rglob("*.md") if "_build" not in path.parts)
PAPERS = (DOCS / "paper_to_code.md").read_text(encoding="utf-8")
NAMES = sorted(set(re.findall(r"\{py:obj\}`([^`]*)`", PAPERS)))
TEXTS = [PAPERS, (ROOT / "README.md").read_text(encoding="utf-8")]
COMMANDS = sorted(
    {
        " ".join(command.split())
        for text in TEXTS
        for command in [
            *re.findall(r"`(python -m experiments\b[^`]*)`", text),
            *re.findall(r"^    (python -m experiments\b[^#|]*?)(?: *#.*)?$", text, re.MULTILINE),
        ]
        if not command.endswith("\\") and "..." not in command
    }
)


def documented_modules():
    pages = "".join(path.read_text(encoding="utf-8") for path in (DOCS / "reference").glob("*.rst"))
    return re.findall(r"^\.\. automodule:: (\S+)$", pages, re.MULTILINE)


def test_the_settings_load(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    settings = runpy.run_path(str(DOCS / "conf.py"))
    assert settings["release"] == imaml_jax.__version__
    assert settings["nb_execution_mode"] == "off"
    assert not [name for name in settings["extensions"] if "intersphinx" in name]


def test_every_page_has_its_place():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    trees = re.findall(r"```\{toctree\}\n(.*?)```", index, re.DOTALL)
    entries = [line for tree in trees for line in tree.splitlines() if line and line[0] != ":"]
    found = [path for entry in entries for path in DOCS.glob(entry + ".*")]
    pages = {*PAGES, *DOCS.rglob("*.rst"), *(DOCS / "notebooks").glob("*.ipynb")}
    missing = pages - {DOCS / "index.md"} - set(found)
    assert not missing, f"name them in docs/index.md: {sorted(map(str, missing))}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_an_included_section_is_there_once(path):
    page = path.read_text(encoding="utf-8")
    for source in re.findall(r"\{include\} (\S+)", page):
        lines = (path.parent / source).read_text(encoding="utf-8").splitlines()
        for marker in re.findall(r':(?:start-after|end-before): "(.*)"', page):
            assert lines.count(marker) == 1, f"{marker!r} in {source}"


def test_every_module_is_in_the_reference_once():
    package = ROOT / "imaml_jax"
    paths = [path for path in package.rglob("*.py") if path.stem != "__init__"]
    modules = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in paths]
    assert sorted(documented_modules()) == sorted(modules), "see docs/reference"


@pytest.mark.parametrize("name", NAMES)
def test_a_name_of_the_papers_page_exists(name):
    parts = name.split(".")
    for length in range(len(parts), 0, -1):  # a module, of which a package may hide the name
        with contextlib.suppress(ModuleNotFoundError):
            found = importlib.import_module(".".join(parts[:length]))
            break
    for part in parts[length:]:
        found = getattr(found, part)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_texts_is_understood(command, tmp_path, monkeypatch):
    """Every option is known and every value is in range; nothing is run."""
    (tmp_path / "run.yaml").write_text("inner_rate: 0.05")
    monkeypatch.chdir(tmp_path)
    _, _, module, *arguments = shlex.split(command)
    package = importlib.util.find_spec(module)
    assert package, module
    if package.submodule_search_locations:
        module += ".__main__"
    if module == "experiments.__main__" or "--tyro-print-completion" in arguments:
        return
    main = importlib.import_module(module)
    with contextlib.suppress(Shown):
        monkeypatch.setattr(sys, "exit", mock.Mock(side_effect=Shown))
        cli.run_cli(lambda config: config, main.Config, main.__doc__, arguments)
    status = sys.exit.call_args
    assert status is None or (status.args == (0,) and "--help" in arguments), command


class Shown(Exception):
    """What `--help` ends with here."""


def test_the_papers_page_is_read():
    assert len(NAMES) > 30 and len(COMMANDS) > 10


@pytest.mark.slow
def test_the_documentation_builds_without_a_warning(tmp_path):
    for package in ("sphinx", "myst_nb", "furo"):
        pytest.importorskip(package, reason="pip install -e .[docs]")
    html = tmp_path / "html"
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(DOCS), str(html)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert not re.search(r"<script[^>]*src=.https?:", (html / "index.html").read_text("utf-8"))
    page = (html / "notebooks" / "hyperparameters.html").read_text("utf-8")
    assert "<math" in page
