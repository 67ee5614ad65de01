import pytest
import torch

import kvtide

torch.set_num_threads(1)


@pytest.fixture
def pool():
    """An embedded pool; a test leaves it empty."""
    with kvtide.connect("embedded", device="cpu", device_memory="64MiB", host_memory="32MiB", threads=1) as made:
        yield made
        assert made.stats().sequences == 0
