"""The wheel holds the three packages and nothing that would shadow another distribution."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bio_kernels", "sprout", "biohama")


@pytest.mark.slow
def test_contents(tmp_path: Path) -> None:
    """Built from a copy, so that the checkout stays as it is; then imported from where pip would put it."""
    pytest.importorskip("setuptools")
    source = tmp_path / "source"
    source.mkdir()
    for path in ROOT.iterdir():
        if path.name in (*PACKAGES, "kernels", "tests", "benchmarks") or path.is_file():
            subprocess.run(["cp", "-r", str(path), str(source)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(tmp_path),
        str(source),
    ]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-3000:]
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.startswith("bio_kernels-")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    top = {name.split("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == set(PACKAGES)
    assert "kernels" not in top
    assert not any(name.startswith(("tests", "benchmarks")) for name in names)
    for package, folder in zip(PACKAGES, ("kernels/bio_kernels", "sprout", "biohama"), strict=True):
        sources = {str(path.relative_to(ROOT / folder)) for path in (ROOT / folder).rglob("*.py")}
        assert {name.removeprefix(f"{package}/") for name in names if name.startswith(f"{package}/")} >= sources | {
            "py.typed"
        }
    (metadata,) = (tmp_path / "site").glob("*.dist-info/METADATA")
    text = metadata.read_text()
    assert "Name: bio-kernels" in text
    assert "License" in text
    assert "Requires-Dist: torch" in text
    assert not any(line.startswith("Requires-Dist: triton") and "extra" not in line for line in text.splitlines())
    code = "import bio_kernels, sprout, biohama; print(bio_kernels.__file__)"
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path / "site")},
                           capture_output=True, text=True)  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.startswith(str(tmp_path / "site"))
