"""The packages keep to their places: imports go one way, and the short names are ours alone."""

import importlib.metadata
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PACKAGES = ("ingest", "compressor_service", "qa_service", "store", "deploy")


def test_import_contracts_hold():
    result = subprocess.run(
        [Path(sys.executable).with_name("lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("package", PACKAGES)
def test_no_other_distribution_ships_our_package_names(package):
    owners = importlib.metadata.packages_distributions().get(package, [])
    assert set(owners) <= {"tokenline"}


def test_the_packages_are_those_that_are_installed_typed_and_contracted():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found = project["tool"]["setuptools"]["packages"]["find"]["include"]
    assert set(found) == {f"{package}*" for package in PACKAGES}
    assert set(project["tool"]["mypy"]["packages"]) == set(PACKAGES)
    assert set(project["tool"]["importlinter"]["root_packages"]) == set(PACKAGES)
    assert all((ROOT / package / "__init__.py").is_file() for package in PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_says_what_it_is_for_and_exports_nothing(package):
    tree = [line for line in (ROOT / package / "__init__.py").read_text().splitlines() if line.strip()]
    assert tree[0].startswith('"""')
    assert not any(line.startswith(("import ", "from ")) for line in tree)


def test_the_command_line_starts_without_the_heavy_libraries():
    code = "import sys, deploy.cli; print(sorted({'torch', 'ray', 'faiss', 'av', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_the_application_is_put_together_without_the_libraries_that_run_a_model():
    code = "import sys, deploy.app; print(sorted({'torch', 'transformers'} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_dependency_is_pinned_exactly_once_and_within_its_range():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}
    assert len(versions) == len(pins)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for asked in map(Requirement, chain(project["dependencies"], *extras)):
        assert asked.specifier.contains(versions[canonicalize_name(asked.name)]), asked
    assert versions["torch"] == "2.13.0"  # no local version: the CUDA build and the CPU build both fit
