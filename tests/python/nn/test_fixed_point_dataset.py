"""Integer networks against their simulation over the Fashion-MNIST test set, every node's codes; on a CPU every fourth image."""

import pytest
import torch
from torch.nn import functional

from quantrain import nn as qnn
from quantrain.finetune import data as image_data
from quantrain.finetune.models import resnet20

BATCH = 500


def trained(images, labels, device):
    """ResNet-20 prepared for f8net and trained for a few steps, so that clips, statistics and lengths have moved."""
    torch.manual_seed(0)
    model = qnn.prepare(resnet20(10, 1).to(device), "f8net")
    qnn.calibrate(model, [images[:256]])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    model.train()
    for inputs, targets in zip(images.split(64), labels.split(64), strict=True):
        loss = functional.cross_entropy(model(inputs), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def test_codes_equal_the_simulation_over_fashion_mnist(device):
    if image_data.fashion_mnist_folder() is None:
        pytest.skip("Fashion-MNIST is not here: install dataset-fashion-mnist or set QUANTRAIN_DATA")
    data = image_data.load_fashion_mnist(download=False)

    def normalized(images):
        return (images.to(device).float() / 255 - 0.286) / 0.353

    model = trained(normalized(data.train_images[:1280]), data.train_labels[:1280].to(device), device)
    converted = qnn.convert(model)
    assert len(data.test_images) == 10_000
    test_images = data.test_images if device == "cuda" else data.test_images[::4]  # a minute less on a CPU
    compared = distinct = 0
    for inputs in test_images.split(BATCH):
        inputs = normalized(inputs)
        simulated = qnn.simulated_codes(model, inputs)
        codes = converted.network.quantize_input(inputs)
        integer = {"input": codes, **converted.network.forward_all(codes)}
        assert set(simulated) == set(integer)
        for name, expected in simulated.items():
            found = integer[name]
            assert not found.is_floating_point() and torch.equal(expected, found.to(torch.int64)), name
            compared += found.numel()
        distinct = max(distinct, len(torch.unique(integer[name])))
    assert compared > len(test_images) * 28 * 28 * len(simulated) and distinct > 100  # of the last node, the logits
