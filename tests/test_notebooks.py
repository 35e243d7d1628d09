"""The form of the notebooks; `make notebooks` executes them."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = (
    "quick_start",
    "train_a_glide_drafter",
    "anatomy_of_a_cascade",
    "exactness",
    "many_devices",
)
COLAB = re.compile(
    r"\]\(https://colab\.research\.google\.com/github/([\w./-]+)/notebooks/(\w+)\.ipynb\)"
)


def read(name):
    return json.loads((ROOT / f"notebooks/{name}.ipynb").read_text(encoding="utf-8"))


def code_of(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def source(cell):
    return "".join(cell["source"])


def test_these_are_all():
    assert {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")} == set(NAMES)


def test_they_begin_alike():
    """A title, a badge that opens this very notebook, and one cell that installs the same everywhere."""
    places, installs = set(), set()
    for name in NAMES:
        notebook = read(name)
        head = source(notebook["cells"][0])
        assert head.startswith("# ")
        place, opened = COLAB.search(head).groups()
        assert opened == name
        places.add(place)
        installs.add(source(code_of(notebook)[0]))
    assert len(places) == 1, "the badges name one repository"
    assert len(installs) == 1 and 'find_spec("jax_specdec") is None' in installs.pop()


@pytest.mark.parametrize("name", NAMES)
def test_what_is_committed(name):
    """Executed from top to bottom without an error; small; nothing of the machine it ran on; few cells without words."""
    path, notebook = ROOT / f"notebooks/{name}.ipynb", read(name)
    assert path.stat().st_size < 300_000
    cells = code_of(notebook)
    counts = [cell["execution_count"] for cell in cells]
    assert counts == sorted(counts) and None not in counts
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not [output for output in outputs if "widget" in " ".join(output.get("data", ()))]
    shown = json.dumps(
        [{**output, "data": {**output.get("data", {}), "image/png": ""}} for output in outputs]
    )
    for private in (str(ROOT), "site-packages", "/root", "/home/", "Traceback"):
        assert private not in shown, private
    for cell in cells:
        for checkout in ("checkpoints/", "benchmarks/", "tests/", "../"):
            assert checkout not in source(cell), "a path of a checkout"
    words = sum(cell["cell_type"] == "markdown" for cell in notebook["cells"])
    assert words >= len(cells) / 2


@pytest.mark.parametrize("name", NAMES)
def test_links_between_them(name):
    text = "".join(source(cell) for cell in read(name)["cells"] if cell["cell_type"] == "markdown")
    for linked in re.findall(r"`(\w+\.ipynb)`", text):
        assert (ROOT / "notebooks" / linked).is_file()
    for page in re.findall(r"`(docs/\w+\.md)`", text):
        assert (ROOT / page).is_file()
