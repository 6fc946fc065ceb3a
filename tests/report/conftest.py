from pathlib import Path

import pytest

from synthetic_runs import write_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory) -> Path:
    return write_demo(tmp_path_factory.mktemp("runs") / "demo")
