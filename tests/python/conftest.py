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
