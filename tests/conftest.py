"""Where the real slides are, Hypothesis profiles, and one phantom slide a session."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

# The GPU kernels run interpreted where there is no GPU; Triton looks at this when it is first imported.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# No test writes into a home: what is to be remembered is tested with a directory of its own.
os.environ["SLIDESCAN_STATE"] = ""

settings.register_profile("default", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True, max_examples=60)
settings.load_profile("ci" if os.environ.get("CI") else "default")


@pytest.fixture(scope="session", autouse=True)
def _processes_that_die_come_back() -> Iterator[None]:
    """Dask gives up one that has not started again in 15 s, which a busy machine takes."""
    try:
        from dask import config
    except ImportError:  # tests of the op do without
        yield
        return
    with config.set({"distributed.deploy.lost-worker-timeout": "10 minutes"}):
        yield


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real slides and broken files: $SLIDESCAN_TEST_DATA, or `shared` beside the checkout."""
    beside = Path(__file__).resolve().parents[2] / "shared"
    root = Path(os.environ.get("SLIDESCAN_TEST_DATA", beside))
    if not (root / "slides").is_dir():
        pytest.skip(f"real slides not found at {root}; set SLIDESCAN_TEST_DATA")
    return root


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a small random network."""
    from tests.tiny import write_tiny  # torch takes seconds, which tests of slides do without

    return write_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def copied(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the small model that a test may break."""
    return Path(shutil.copytree(tiny, tmp_path / "broken"))
