"""bench_qat in its tiny form on a CPU: its rows, what is left out and what fails is said, and that a peer which does not round is found."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "benchmarks"))
pytest.importorskip("transformers")

import bench_qat  # noqa: E402
from common import qat_peers  # noqa: E402

LLAMA = {"llama-tiny": bench_qat.QUICK["llama-tiny"]}
MISSING = qat_peers.Peer("nobody 8/8", "a_package_that_is_not_there", lambda model, x: model)


def run(tmp_path: Path, only: str) -> tuple[int, dict]:
    threads, path = torch.get_num_threads(), tmp_path / "qat.json"
    try:
        failed = bench_qat.main(["--device", "cpu", "--quick", "--only", only, "--json", str(path)])
    finally:
        torch.set_num_threads(threads)
    return failed, json.loads(path.read_text())


def test_every_recipe_of_llama_takes_a_step(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_qat, "QUICK", LLAMA)
    monkeypatch.setattr(bench_qat, "PEERS", {"llama-tiny": {"qat-w4a8": (MISSING,)}})
    failed, content = run(tmp_path, "step,captured,launches")
    assert failed == 0 and [row["case"] for row in content["rows"]] == [
        f"llama-tiny {name}" for name in LLAMA["llama-tiny"][2]
    ]
    assert content["notes"] == [
        "step llama-tiny qat-w4a8, nobody 8/8: left out, a_package_that_is_not_there is not installed"
    ]


def test_what_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    recipes = {"no-such-recipe": (None, None), "qat-w8a8-token": (None, None)}
    monkeypatch.setattr(bench_qat, "QUICK", {"llama-tiny": (2, 8, recipes)})
    monkeypatch.setattr(bench_qat, "PEERS", {})
    failed, content = run(tmp_path, "step")
    assert failed == 1 and [row["case"] for row in content["rows"]] == ["llama-tiny qat-w8a8-token"]
    assert content["notes"][0].startswith("step llama-tiny no-such-recipe: FAILED, ValueError")


def test_a_step_that_takes_too_long_is_stopped():
    with pytest.raises(TimeoutError, match="no time is left"), bench_qat.limited(0.05):
        while True:
            torch.ones(1)


def test_ours_come_before_the_peers():
    """And peers' steps, which wait for the host, are not captured."""
    models = {"resnet50": (1, 1, ["qat-w8a8"]), "llama": (1, 1, [])}
    ours = [("resnet50", True), ("resnet50", True)]
    found = [(name, peer is None) for name, _, peer in bench_qat.plan_of("step", models)]
    assert found == [*ours, ("resnet50", False), ("resnet50", False), ("llama", True)]
    assert [(name, peer is None) for name, _, peer in bench_qat.plan_of("captured", models)] == [*ours, ("llama", True)]


@pytest.mark.parametrize(
    "peer", [qat_peers.TORCH_AO, qat_peers.BREVITAS_W8, qat_peers.BREVITAS_W4], ids=lambda p: p.name
)
def test_a_peer_rounds_and_a_float_model_is_found_out(peer):
    if not peer.installed:
        pytest.skip(f"{peer.package} is not installed")
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(32, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 300), nn.ReLU(), nn.Linear(300, 4)
    )
    x = torch.randn(32, 32, 8, 8)
    theirs = qat_peers.prepared_by(peer, model, x)
    for _ in range(2):
        theirs(x).sum().backward()
    assert "of 3 inputs" in qat_peers.products_that_round(peer, lambda: theirs(x))
    float_model = nn.Sequential(nn.Linear(400, 400))
    with pytest.raises(AssertionError, match="to round what it multiplies"):
        qat_peers.products_that_round(peer, lambda: float_model(torch.randn(8, 400)))
