"""The table of docs/which_solver.md: a derivative is right, or the failure is told."""

from pathlib import Path

import pytest

from tests.bilevel import fault_table

pytestmark = pytest.mark.usefixtures("x64")

PAGE = Path(__file__).resolve().parents[2] / "docs" / "how_to" / "which_solver.md"
QUICK = ("solve_auto",)
solvers = pytest.mark.parametrize(
    "solver",
    [s if s in QUICK else pytest.param(s, marks=pytest.mark.slow) for s in fault_table.SOLVERS],
)


def printed():
    """`{fault: {solver: cell}}` of the page."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("| matrix |"))
    head, _, *rows = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in lines[start : start + 2 + len(fault_table.systems())]
    ]
    names = ["solve_" + name.strip("`") for name in head[1:]]
    return {fault: dict(zip(names, cells, strict=True)) for fault, *cells in rows}


@solvers
def test_the_table_is_what_happens(solver):
    for fault, cells in printed().items():
        assert fault_table.cell(solver, fault) == cells[solver], fault
        assert cells[solver] in (fault_table.RIGHT, fault_table.TOLD)


def test_the_table_is_whole():
    table = printed()
    assert list(table) == list(fault_table.systems())
    assert all(list(cells) == list(fault_table.SOLVERS) for cells in table.values())
