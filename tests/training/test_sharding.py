"""Weights that FSDP splits are whole where they have to be; over one process, which the launches do over several."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor

from controlkit.training.sharding import copy_full, full_tensor, gathered


@pytest.fixture
def split(monkeypatch):
    """A network that FSDP has split over the one process that there is, and its weights before."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    network[2].bias.requires_grad_(False)
    weights = {name: value.clone() for name, value in network.state_dict().items()}
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(network, mesh=init_device_mesh("cpu", (1,)))
        yield network, weights
    finally:
        torch.distributed.destroy_process_group()


def test_a_block_sees_plain_weights_and_leaves_the_split_ones(split):
    network, weights = split
    before = dict(network.named_parameters())
    assert all(isinstance(parameter, DTensor) for parameter in before.values())
    with pytest.raises(ZeroDivisionError), gathered(network):
        for name, parameter in network.named_parameters():
            assert type(parameter) is nn.Parameter and torch.equal(parameter, weights[name])
            assert parameter.requires_grad == before[name].requires_grad
        raise ZeroDivisionError
    for name, parameter in network.named_parameters():
        assert parameter is before[name]
        assert torch.equal(full_tensor(parameter), weights[name])


def test_whole_tensors_are_copied_into_split_ones_and_into_plain_ones(split):
    network, weights = split
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            copy_full(parameter, weights[name] + 1)
            assert isinstance(parameter, DTensor) and torch.equal(full_tensor(parameter), weights[name] + 1)
    plain = torch.zeros(3)
    copy_full(plain, torch.arange(3.0))
    assert torch.equal(full_tensor(plain), torch.arange(3.0))
