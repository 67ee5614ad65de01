import pytest
import torch

import kvtide

torch.set_num_threads(1)


@pytest.fixture
def pool():
    """An embedded pool, on whose device the model computes too; a test leaves it empty."""
    with kvtide.connect("embedded", device="cpu", device_memory="64MiB", host_memory="32MiB", threads=1, direct_device="cpu") as made:
        yield made
        assert made.stats().sequences == 0


class Mode:
    """How a cache is used: "materialise"; "attend", by calls; "steps", attend mode on the pool's own device."""

    def __init__(self, name):
        self.attends = name != "materialise"
        self.steps = name == "steps"
        self.options = {"mode": "attend" if self.attends else "materialise", "on_device": None if self.steps else False}

    def attention(self, otherwise):
        return "kvtide" if self.attends else otherwise

    def check(self, cache, why=()):
        """Steps were used, or not for one of these reasons."""
        forward = cache._store.forward
        assert (forward is not None) == self.steps
        if self.steps and forward.why_not:
            assert any(reason in forward.why_not for reason in why), forward.why_not
        elif self.steps:
            assert forward.steps is not None


@pytest.fixture(params=["materialise", "attend", "steps"])
def mode(request):
    return Mode(request.param)
