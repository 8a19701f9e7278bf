"""Joined blocks in several processes, with synchronized batch norms, and whole training steps in CUDA graphs."""

import copy

import pytest
import torch
from samples.fuse import LEARNED, PATTERNS, agree, batch, plainly, same, several, sgd, step
from torch import nn

import quantrain.nn as qnn
from quantrain.nn.fuse import unfuse


def synchronized(model):
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)


@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
def test_synchronized_batch_norms_train_in_one_process(before):
    """Without a process group a SyncBatchNorm is a batch norm, on any device."""
    model = several("relu, next", "shortcut")
    plain = qnn.prepare(copy.deepcopy(model), "qat-w8a8")
    if before:
        apart = qnn.prepare(synchronized(copy.deepcopy(model)), "qat-w8a8")
        joined = qnn.prepare(synchronized(model), "qat-w8a8", fuse=True)
    else:
        apart = synchronized(qnn.prepare(copy.deepcopy(model), "qat-w8a8"))
        joined = synchronized(qnn.prepare(model, "qat-w8a8", fuse=True))
    assert len(joined.quantization_summary.fused) == 4 and type(joined[0][0].bn) is nn.SyncBatchNorm
    want, found = plainly(apart), plainly(joined)
    for number, (a, b) in enumerate(zip(want, found, strict=True)):
        same(b, a, "", f"result {number}")
    agree(apart, joined, "")
    torch.testing.assert_close(found[:2], plainly(plain)[:2], rtol=1e-4, atol=1e-5)
    x = batch(3)
    assert torch.equal(qnn.convert(joined.eval(), inplace=False)(x), joined(x))


def _ranks(rank, folder):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        for recipe in ("qat-w8a8", LEARNED):
            results = []
            model = several("relu, next", "shortcut", "depthwise")
            joined = qnn.prepare(copy.deepcopy(model), recipe, fuse=True)
            apart = qnn.prepare(model, recipe)
            if recipe == LEARNED:
                apart = copy.deepcopy(joined)
                unfuse(apart)
            for network in (apart, joined):
                parallel = nn.parallel.DistributedDataParallel(network)
                optimizer, found = sgd(network), []
                for seed in range(3):
                    found += step(parallel, optimizer, (1 + rank) * batch(10 * rank + seed))
                trained = {name: value.clone() for name, value in network.state_dict().items()}
                with torch.no_grad():  # which sends the buffers of rank 0
                    found.append(parallel.eval()(batch(7)))
                sent = {name: value.clone() for name, value in network.state_dict().items()}
                gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
                results.append({"found": found, "trained": trained, "sent": sent, "gradients": gradients})
            torch.save(results, f"{folder}/{recipe}{rank}.pt")
        errors = []
        for order in ("before", "after"):
            model = several("relu, next")
            model = synchronized(model) if order == "before" else model
            model = qnn.prepare(model, "qat-w8a8", fuse=True)
            model = synchronized(model) if order == "after" else model
            try:
                model(batch())
            except ValueError as error:
                errors.append(str(error))
            qnn.calibrate(model, [batch(rank)])  # evaluation synchronizes nothing
        torch.save(errors, f"{folder}/errors{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes_train_as_the_written_calls_do(tmp_path):
    """Under DistributedDataParallel: gradients are averaged, statistics and ranges are those of rank 0."""
    torch.multiprocessing.spawn(_ranks, (str(tmp_path),), nprocs=2)
    for recipe in ("qat-w8a8", LEARNED):
        ranks = [torch.load(tmp_path / f"{recipe}{rank}.pt") for rank in range(2)]
        for apart, joined in ranks:
            tied = "tied" if recipe == LEARNED else ""
            for number, (a, b) in enumerate(zip(apart["found"], joined["found"], strict=True)):
                same(b, a, tied, f"{recipe}: result {number}")
            for kind in ("trained", "sent", "gradients"):
                assert apart[kind].keys() == joined[kind].keys()
                for name, value in apart[kind].items():
                    same(joined[kind][name], value, tied, f"{recipe}: {kind}: {name}")
        one, other = (joined for _, joined in ranks)
        for kind in ("sent", "gradients"):
            assert all(torch.equal(value, other[kind][name]) for name, value in one[kind].items()), kind
        assert not torch.equal(one["found"][0], other["found"][0])
        moved = [name for name, value in one["trained"].items() if not torch.equal(value, other["trained"][name])]
        ranges = [name for name in moved if name.endswith("input_fake_quant.scale")]
        assert any("running_mean" in name for name in moved) and bool(ranges) == (recipe != LEARNED)
        assert all(torch.equal(value, one["trained"][name]) for name, value in one["sent"].items())
    for rank in range(2):
        errors = torch.load(tmp_path / f"errors{rank}.pt")
        assert len(errors) == 2 and all("SyncBatchNorm expected input tensor to be on" in text for text in errors)


# ---- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("recipe", ["qat-w8a8", LEARNED])
def test_a_whole_step_is_captured_in_a_graph(recipe):
    joined = qnn.prepare(several(*(name for name in PATTERNS if name != "transposed")), recipe, fuse=True).cuda()
    x = batch(size=(4, 6, 12, 12)).cuda()
    optimizer = sgd(joined)

    def backward(model):
        loss = model(x).square().mean()
        loss.backward()
        return loss

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            optimizer.zero_grad()
            backward(joined)
            optimizer.step()
    torch.cuda.current_stream().wait_stream(side)
    optimizer.zero_grad()
    eager = copy.deepcopy(joined)
    other = sgd(eager)
    other.load_state_dict(optimizer.state_dict())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = backward(joined)
        optimizer.step()
    for seed in range(3):
        # Each time from the eager model's state: gradients of convolutions are added in no fixed order on a GPU, and
        # rounding makes much of little, so that two eager models part in their second step too.
        with torch.no_grad():
            for name, value in joined.state_dict().items():
                value.copy_(eager.state_dict()[name])
        before = [parameter.detach().clone() for parameter in joined.parameters()]
        x.copy_(batch(seed, (4, 6, 12, 12)))
        graph.replay()
        other.zero_grad()
        want = backward(eager)
        other.step()
        torch.testing.assert_close(loss, want, rtol=1e-5, atol=1e-6)
        moved = [not torch.equal(a, b) for a, b in zip(joined.parameters(), before, strict=True)]
        assert sum(moved) > len(moved) / 2, "the graph holds no optimizer's step"
        for name, value in eager.named_buffers():
            torch.testing.assert_close(joined.get_buffer(name), value, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["gloo", "nccl"])
@pytest.mark.parametrize("before", [True, False], ids=["before prepare", "after prepare"])
def test_synchronized_batch_norms_train_on_a_gpu(backend, before, tmp_path):
    torch.distributed.init_process_group(backend, init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = several("relu, next", "shortcut").cuda()
        plain = qnn.prepare(copy.deepcopy(model), "qat-w8a8", fuse=True)
        model = synchronized(model) if before else model
        joined = qnn.prepare(model, "qat-w8a8", fuse=True)
        joined = joined if before else synchronized(joined)
        assert type(joined[0][0].bn) is nn.SyncBatchNorm and len(joined.quantization_summary.fused) == 4
        want, found = (step(network, sgd(network), batch()) for network in (plain, joined))
        torch.testing.assert_close(found, want, rtol=1e-3, atol=1e-4)
        for name, value in plain.state_dict().items():
            torch.testing.assert_close(joined.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)
    finally:
        torch.distributed.destroy_process_group()


def calibrated(model, images):
    """With ranges that stay: two processes agree on those of the whole batch."""
    with pytest.warns(UserWarning, match="have seen no batch"):
        qnn.calibrate(model, [images])
    qnn.enable_observer(model, False)
    return model


def _synchronized_ranks(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        images = batch(size=(8, 6, 5, 6))[4 * rank : 4 * rank + 4].cuda()
        joined = synchronized(qnn.prepare(several("relu, next", "shortcut"), "qat-w8a8", fuse=True)).cuda()
        parallel = nn.parallel.DistributedDataParallel(calibrated(joined, images), device_ids=[0])
        y = parallel(images)
        y.square().sum().backward()
        gradients = {name: parameter.grad.cpu() for name, parameter in joined.named_parameters()}
        torch.save((y.detach().cpu(), gradients, joined.cpu().state_dict()), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.cuda
def test_two_processes_synchronize_batch_norms_on_one_gpu(tmp_path):
    """Halves of a batch on two ranks, as the whole in one process."""
    torch.multiprocessing.spawn(_synchronized_ranks, (str(tmp_path),), nprocs=2)
    images = batch(size=(8, 6, 5, 6)).cuda()
    model = qnn.prepare(several("relu, next", "shortcut"), "qat-w8a8", fuse=True).cuda()
    want = calibrated(model, images)(images)
    (want.square().sum() / 2).backward()  # DistributedDataParallel gives the mean over ranks
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([y for y, _, _ in ranks]), want.detach().cpu(), rtol=1e-3, atol=1e-3)
    for _, gradients, states in ranks:
        for name, parameter in model.named_parameters():
            size = float(parameter.grad.abs().max())
            torch.testing.assert_close(
                gradients[name], parameter.grad.cpu(), rtol=1e-2, atol=1e-2 * size, msg=f"gradient of {name}"
            )
        for name, value in model.state_dict().items():
            torch.testing.assert_close(states[name], value.cpu(), rtol=1e-4, atol=1e-5, msg=name)
