"""experiments/lessons/tour.ipynb: ten cells that run from top to bottom."""

import ast
import json

import pytest

from kit.run import ROOT

TOUR = ROOT / "experiments" / "lessons" / "tour.ipynb"
CELLS = json.loads(TOUR.read_text())["cells"]
CODE = ["".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"]


def test_the_tour_has_ten_cells_that_any_notebook_opens():
    """It is of nbformat 4.4: each cell has what the format asks for, and no more."""
    tour = json.loads(TOUR.read_text())
    assert (tour["nbformat"], tour["nbformat_minor"], len(CELLS)) == (4, 4, 10)
    assert tour["metadata"]["kernelspec"] == {
        "display_name": "Python 3",
        "language": "python",
        "name": "python3",
    }
    for cell in CELLS:
        code = {"outputs", "execution_count"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "metadata", "source"} | code
        assert cell["cell_type"] in ("code", "markdown")
        assert all(line.endswith("\n") for line in cell["source"][:-1])


def test_the_tour_is_plain_python_and_its_outputs_are_small():
    """No magic of a notebook, so that a test can run it; what it printed is there, and short."""
    for source in CODE:
        ast.parse(source)
    outputs = [output for cell in CELLS for output in cell.get("outputs", [])]
    assert {output["output_type"] for output in outputs} == {"stream"}
    assert len(TOUR.read_text()) < 20_000
    assert all(cell["outputs"] for cell in CELLS[3:] if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_tour_runs_from_top_to_bottom(tmp_path, monkeypatch, capsys):
    """Its code trains, shows a group whose advantages add up to nothing, and compares."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))  # undoes what the tour does to sys.path
    space = {"__name__": "__main__"}
    for source in CODE:
        exec(source, space)
    printed = capsys.readouterr().out
    assert sum(space["advantages"]).item() == pytest.approx(0, abs=1e-3)
    assert printed.count("  advantage ") == 8
    one, two = map(space["read_log"], (space["first"], space["second"]))
    assert one[0]["accuracy"] == two[0]["accuracy"]  # the same base, problems and noise
    assert one[-1] != two[-1]
    assert one[-1]["held_out_accuracy"] > one[0]["accuracy"] + 0.2
    assert (space["first"] / "run.html").is_file()
    assert str(tmp_path) not in printed
