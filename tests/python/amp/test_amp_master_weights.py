"""MasterWeights: updates that 16 bits would lose, and the write-back, rounded to nearest and stochastically."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from quantrain.amp import MasterWeights

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_master_weights_keep_small_updates(device, dtype):
    weight = nn.Parameter(torch.ones(1000, dtype=dtype, device=device))
    for stochastic in (False, True):
        weight.data.fill_(1.0)
        masters = MasterWeights([weight], stochastic_rounding=stochastic)
        optimizer = torch.optim.SGD(masters.parameters(), lr=1.0)
        for _ in range(64):
            weight.grad = torch.full_like(weight, 2.0**-12)  # less than half a step of either type at 1
            masters.copy_gradients_()
            assert weight.grad is None and masters.parameters()[0].grad.dtype == torch.float32
            optimizer.step()
            masters.write_back_()
        assert torch.equal(
            masters.parameters()[0].detach(), torch.full_like(weight, 1.0 - 2.0**-6, dtype=torch.float32)
        )
        assert torch.equal(weight.detach(), torch.full_like(weight, 1.0 - 2.0**-6))


def test_stochastic_write_back_is_the_master_on_average():
    weight = nn.Parameter(torch.full((100000,), 1.0, dtype=torch.bfloat16))
    masters = MasterWeights([weight], stochastic_rounding=True, generator=torch.Generator().manual_seed(3))
    masters.parameters()[0].data.fill_(1.0 + 2.0**-9)  # a quarter of the step 2^-7
    masters.write_back_()
    # Standard error 2^-7 sqrt(3/16 / 100000) = 1.07e-5; five of them: a false alarm once in 1.7 million runs.
    assert abs(float(weight.double().mean()) - (1.0 + 2.0**-9)) < 5 * 1.07e-5


def test_float32_parameters_are_their_own_masters():
    weight, bias = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    masters = MasterWeights([weight, bias])
    assert masters.parameters()[0] is weight
    bias.grad = None
    weight.grad = torch.ones(3)
    masters.copy_gradients_()
    assert torch.equal(weight.grad, torch.ones(3)) and masters.parameters()[1].grad is None
    with pytest.raises(ValueError, match="expected parameters of float16, bfloat16 or float32, got Double"):
        MasterWeights([torch.ones(3, dtype=torch.float64)])
