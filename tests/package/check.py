"""What is in the distributions of a folder, and how large they are: `python tests/package/check.py DIST`."""

import sys
import tarfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LARGEST = {"sdist": 1 << 20, "wheel": 1 << 20, "demo": 40_000_000}  # bytes


def main(folder: str) -> None:
    (sdist,) = Path(folder).glob("jax_specdec-*.tar.gz")
    (wheel,) = Path(folder).glob("jax_specdec-*.whl")
    (demo,) = Path(folder).glob("jax_specdec_demo-*.whl")
    for kind, file in (("sdist", sdist), ("wheel", wheel), ("demo", demo)):
        size = file.stat().st_size
        print(f"{file.name}: {size:,} bytes")
        assert size < LARGEST[kind], f"{file.name} is larger than {LARGEST[kind]:,} bytes"

    packages = ("jax_specdec", "pallas_kernels")
    wanted = {
        str(path.relative_to(ROOT))
        for package in packages
        for pattern in ("*.py", "py.typed", "tuned/*.json")
        for path in (ROOT / package).rglob(pattern)
    }
    names = set(zipfile.ZipFile(wheel).namelist())
    absent = sorted(wanted - names)
    assert not absent, f"{wheel.name} lacks {absent}"
    strange = sorted({name.split("/")[0] for name in names} - set(packages))
    assert len(strange) == 1 and strange[0].endswith(".dist-info"), strange
    assert any(name.endswith("licenses/LICENSE") for name in names), "no licence"

    with tarfile.open(sdist) as archive:
        archived = {name.partition("/")[2] for name in archive.getnames()}
    absent = sorted((wanted | {"LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"}) - archived)
    assert not absent, f"{sdist.name} lacks {absent}"

    names = set(zipfile.ZipFile(demo).namelist())
    needed = ("LICENSE", "demo/LICENSE", "demo/README.md", "demo/target/config.json")
    for name in (*needed, "demo/lm/config.json", "demo/glide/config.json"):
        assert f"jax_specdec_demo/{name}" in names, f"{demo.name} lacks {name}"
    assert not [name for name in names if "__pycache__" in name]


if __name__ == "__main__":
    main(*sys.argv[1:])
