"""What is said of the package in more than one place agrees."""

import re
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
BUILD = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
PROJECT = BUILD["project"]
DEMO = tomllib.loads((ROOT / "packages/demo/pyproject.toml").read_text(encoding="utf-8"))


def test_the_changelog_is_of_this_version():
    heads = [
        line.split()[1]
        for line in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("## ")
    ]
    assert heads[0] == PROJECT["version"] and len(set(heads)) == len(heads)


def test_citation():
    found = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert found["cff-version"] == "1.2.0" and found["authors"] and found["title"]
    assert found["license"] == PROJECT["license"] and "version" not in found
    papers = {value["value"] for paper in found["references"] for value in paper["identifiers"]}
    assert papers == {"arXiv:2402.02082", "arXiv:2312.11462"}


def test_the_repositorys_address_is_one():
    """On a package index every link of the README leads to a file there; so do the notebooks' badges."""
    address = PROJECT["urls"]["Repository"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for change in BUILD["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(change["pattern"], change["replacement"], text)
    links = re.findall(r"\]\(([^)]*)\)", text)
    assert len(links) > 10
    for link in links:
        assert link.startswith(f"{address}/blob/main/"), link
        file = link.removeprefix(f"{address}/blob/main/").partition("#")[0]
        assert (ROOT / file).is_file(), link
    name = address.removeprefix("https://github.com/")
    for notebook in (ROOT / "notebooks").glob("*.ipynb"):
        badge = (
            f"(https://colab.research.google.com/github/{name}/blob/main/notebooks/{notebook.name})"
        )
        assert badge in notebook.read_text(encoding="utf-8"), notebook.name


def test_the_demo_is_mapped_in_whole():
    """What its commands and `auto` can load, from where it lies in the repository."""
    mapped = DEMO["tool"]["hatch"]["build"]["targets"]["wheel"]["force-include"]
    home = ROOT / "packages/demo"
    assert all((home / path).resolve().exists() for path in mapped)
    folders = {path.name for path in (ROOT / "checkpoints/demo").iterdir() if path.is_dir()}
    packed = {Path(path).name for path in mapped}
    assert folders - packed - {"__pycache__"} == {"vanilla"}  # the control of a benchmark
    assert "jax-specdec-demo>=1,<2" in PROJECT["optional-dependencies"]["demo"]
    assert DEMO["project"]["version"].startswith("1.")
