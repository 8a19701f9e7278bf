import os
from pathlib import Path

import pytest
import torch

DATA = os.environ.get("QUANTRAIN_DATA")


def pytest_collection_modifyitems(config, items):
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no GPU")
    for item in items:
        if "cuda" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def data_folder():
    """The folder of test data; without it the test is skipped."""
    if not DATA or not Path(DATA).is_dir():
        pytest.skip("no test data: set QUANTRAIN_DATA to its folder")
    return Path(DATA)


@pytest.fixture(scope="module")
def one_thread():
    """Sums are equal in both languages, and in another process, where the number of threads is; small models are
    faster so, and a busy machine does not slow one thread down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
