"""Provide the folders and runs that the tests of faults share."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.helpers.faults import READ_BY_A_RUN, make_writable, undisturbed, unreadable
from tests.helpers.runs import a_tiny_model


@pytest.fixture(scope="package")
def public():
    """Make a folder that any user may write in, unlike pytest's own, with a model in it.

    Skip the test if another user cannot read that model, the project or its packages: as root, the tests run as such
    a user.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        folder.chmod(0o777)
        a_tiny_model(folder / "model")
        for path in (folder / "model", *(folder / "model").iterdir()):
            path.chmod(0o755)
        if closed := unreadable([*READ_BY_A_RUN, folder / "model/config.json"]):
            pytest.skip(f"users other than root cannot read {closed[0]}")
        yield folder


@pytest.fixture(scope="package")
def whole_run(public):
    """Run all six steps without a fault."""
    return undisturbed(public, "whole")


@pytest.fixture(scope="package")
def half_run(public):
    """Run two of the six steps, as an interrupted run would."""
    return undisturbed(public, "half", num_iterations=2)


@pytest.fixture
def run_folder(public):
    """Yield a folder for a run; make it writable and remove it afterwards, even if the test failed."""
    folder = public / "run"
    yield folder
    make_writable(folder)
    shutil.rmtree(folder, ignore_errors=True)
