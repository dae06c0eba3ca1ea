"""The notebooks run, and what is stored is what their sources say."""

import os
from pathlib import Path
from unittest import mock

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SLOW = pytest.mark.slow  # all but the quickest one


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def check_outputs(notebook):
    """Every code cell ran, in order, without an error and without a warning."""
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert outputs
    for output in outputs:
        assert output.output_type != "error", output
        assert output.get("name") != "stderr", output.text


def test_every_source_has_its_notebook():
    assert FOLDER / "quickstart.ipynb" in NOTEBOOKS
    assert NOTEBOOKS == [path.with_suffix(".ipynb") for path in sorted(FOLDER.glob("*.py"))]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_stored_notebook_is_that_of_its_source(path):
    stored = nbformat.read(path, as_version=4)
    nbformat.validate(stored)
    check_outputs(stored)
    source = jupytext.read(path.with_suffix(".py"))
    remedy = "see CONTRIBUTING.md, Notebooks"
    assert [(c.cell_type, c.source) for c in stored.cells] == [
        (c.cell_type, c.source) for c in source.cells
    ], remedy
    assert any("image/png" in o.get("data", {}) for c in code_cells(stored) for o in c.outputs)
    title, install = stored.cells[:2]
    assert "[![Open in Colab][badge]]" in title.source
    assert install.cell_type == "code"
    assert "pip install" in install.source


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, id=path.stem, marks=[] if path.stem == "hyperparameters" else SLOW)
        for path in NOTEBOOKS
    ],
)
def test_the_notebook_runs(path, tmp_path):
    notebook = nbformat.read(path, as_version=4)
    with mock.patch.dict(os.environ, MPLBACKEND="module://matplotlib_inline.backend_inline"):
        NotebookClient(
            notebook,
            timeout=300,
            kernel_name="python3",
            resources={"metadata": {"path": str(tmp_path)}},
        ).execute()
    check_outputs(notebook)
