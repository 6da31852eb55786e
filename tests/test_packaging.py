"""The distribution: one wheel, installed without a network, and one place for the version."""

import email
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import trainkit
from trainkit.tools.lift import lift

ROOT = Path(trainkit.__file__).parents[1]
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]


def run(*command, cwd, path=""):
    environment = {**os.environ, "PYTHONPATH": str(path), "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        [*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What `make wheel` makes, with the setuptools that is here."""
    pytest.importorskip("setuptools", minversion="70.1")
    source, dist = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("README.md", "LICENSE", "pyproject.toml", "setup.cfg"):
        shutil.copy(ROOT / name, source)
    for folder in ("trainkit", "tests", "benchmarks"):
        left_out = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=left_out)
    run(*PIP, "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", dist, source, cwd=dist)
    (found,) = dist.iterdir()
    return found


def test_the_wheel_is_pure_and_holds_the_package_alone(wheel):
    version = trainkit.__version__
    assert wheel.name == f"torch_trainkit-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        (metadata,) = (name for name in names if name.endswith(".dist-info/METADATA"))
        told = email.message_from_bytes(packed.read(metadata))
    assert (told["Name"], told["Version"]) == ("torch-trainkit", version)
    needed = [line for line in told.get_all("Requires-Dist") if "extra ==" not in line]
    assert needed == ["torch>=2.6"]
    package = ROOT / "trainkit"
    files = {path for path in package.rglob("*") if path.suffix in (".py", ".typed")}
    expected = {path.relative_to(ROOT).as_posix() for path in files}
    assert {name for name in names if ".dist-info/" not in name} == expected


USE = """
import importlib.metadata, torch, trainkit
from trainkit import accumulate, train_step

weight = torch.nn.Parameter(torch.ones(1))
step = train_step(torch.optim.SGD([weight], lr=0.1), accumulate(2))(lambda x: (weight * x).sum())
for x in step.over([1.0, 3.0]):
    step(x)
print(trainkit.__file__, trainkit.__version__, importlib.metadata.version("torch-trainkit"))
print(weight.item())
"""


def test_the_wheel_is_installed_without_a_network_and_runs(wheel, tmp_path):
    site = tmp_path / "site"
    run(*PIP, "install", "--no-index", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    file, version, same, weight = run(sys.executable, "-c", USE, cwd=tmp_path, path=site).split()
    assert file == str(site / "trainkit" / "__init__.py")
    assert version == same == trainkit.__version__
    assert float(weight) == pytest.approx(1 - 0.1 * (1 + 3) / 2)
    cell = run(sys.executable, "-m", "trainkit", "lift", "frozen", cwd=tmp_path, path=site)
    assert cell == f"%%writefile trainkit.py\n{lift(['frozen'])}"


def test_a_checkout_and_a_lifted_file_know_the_version(tmp_path):
    asked = "import trainkit; print(trainkit.__version__, trainkit.__file__)"
    (tmp_path / "trainkit.py").write_text(lift(["frozen"]))
    for path in (ROOT, tmp_path):
        version, file = run(sys.executable, "-c", asked, cwd=tmp_path.parent, path=path).split()
        assert version == trainkit.__version__ and file.startswith(str(path))


def test_nobody_is_told_to_install_a_name_from_an_index():
    """There `trainkit` is somebody else's, and `torch-trainkit` was never uploaded."""
    index = re.compile(r"(pip|uv|conda|poetry)\b.*\b(install|add) .*\btrainkit\b(?!/)")
    for page in (*ROOT.glob("*.md"), *ROOT.glob("examples/*.*")):
        assert not index.search(page.read_text(encoding="utf-8")), page.name
