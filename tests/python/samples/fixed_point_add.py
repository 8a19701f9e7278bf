"""A network with an addition of codes that no convolution can hold, and the files with which the C++ tests compare theirs.

``python tests/python/samples/fixed_point_add.py`` writes them anew.
"""

from pathlib import Path

import torch
from torch import nn

import quantrain.nn as qnn

FOLDER = Path(__file__).parents[2] / "cpp" / "data"


class Adding(nn.Module):
    def __init__(self):
        super().__init__()
        for name, channels, kernel in (("a", 3, 3), ("b", 6, 3), ("c", 6, 1), ("d", 6, 3), ("e", 6, 1)):
            self.add_module(name, nn.Conv2d(channels, 6, kernel, padding=kernel // 2, bias=False))
            self.add_module(f"bn_{name}", nn.BatchNorm2d(6))
        self.pool, self.linear = nn.AdaptiveAvgPool2d(1), nn.Linear(6, 4, bias=False)

    def forward(self, x):
        a = torch.relu(self.bn_a(self.a(x)))
        b = torch.relu(self.bn_b(self.b(a)))
        c = torch.relu(self.bn_c(self.c(b)))
        d = torch.relu(self.bn_d(self.d(torch.relu(a + b))))
        e = torch.relu(self.bn_e(self.e(c)) + d)
        return self.linear(self.pool(e).flatten(1))


def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def prepared():
    torch.manual_seed(0)
    model = Adding()
    for _ in range(3):
        model(images())
    model = qnn.calibrate(qnn.prepare(model, "f8net"), [images()])
    model(images())
    return model.eval()


def write():
    from safetensors.torch import save_file

    model = prepared()
    FOLDER.mkdir(exist_ok=True)
    qnn.save_checkpoint(FOLDER / "fixed_point_add.safetensors", model)
    _, tensors = qnn.fixed_point_program(model)
    with torch.no_grad():
        results = {"images": images(), "logits": model(images())}
    save_file({**tensors, **results}, FOLDER / "fixed_point_add_network.safetensors")


if __name__ == "__main__":
    write()
