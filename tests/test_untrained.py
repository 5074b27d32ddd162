"""Untrained networks: everything that was learnt is gone, the same seed gives the same bits, nothing else moves."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from usae_probe.errors import UsageError
from usae_probe.untrained import reinitialise

from .toys import Does, flat_net


class Bare(nn.Module):
    """Parameters that no reset reaches, a buffer, and a reset that wants an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.arange(6.0).view(1, 1, 6))
        self.pair = nn.Parameter(torch.tensor([1.0, 2.0]))
        self.constant = nn.Parameter(torch.full((4,), 0.5))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.frozen = nn.Parameter(torch.randn(3, 5), requires_grad=False)
        self.register_buffer("table", torch.arange(5))
        self.inner = nn.Linear(6, 2)

    def reset_parameters(self, scale: float) -> None:
        raise AssertionError("not without its argument")

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def toy() -> nn.Module:
    return flat_net(4, 3, Does(torch.relu), Bare(), nn.BatchNorm1d(6), nn.LayerNorm(6), nn.MultiheadAttention(6, 2))


def weight_normed() -> nn.Module:
    return nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Embedding(7, 3), nn.InstanceNorm1d(3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: timm.create_model("test_vit3", pretrained=False),  # registers, positions, layer scales, a latent
    "resnet": lambda: timm.create_model("resnet10t", pretrained=False),
    "toy": toy,
    "weight norm": weight_normed,
}


def trained(build: Callable[[], nn.Module]) -> nn.Module:
    """As a training would leave it: no parameter is constant, running statistics have run."""
    torch.manual_seed(3)
    module = build().eval()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn(parameter.shape))
        for name, buffer in module.named_buffers():
            if "running" in name:
                buffer.uniform_(0.5, 2)
            elif name.endswith("num_batches_tracked"):
                buffer.fill_(7)
    return module


def bits(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_every_parameter_changes_and_the_seed_decides_how(build: Callable[[], nn.Module]) -> None:
    first = trained(build)
    before = bits(first)
    flags = {name: parameter.requires_grad for name, parameter in first.named_parameters()}
    second, other = deepcopy(first), deepcopy(first)
    assert reinitialise(first, seed=1) is first
    for name, parameter in first.named_parameters():
        assert parameter.numel() == 0 or not torch.equal(parameter, before[name]), name
        assert parameter.isfinite().all(), name
        assert parameter.dtype == before[name].dtype
        assert parameter.requires_grad == flags[name]
    torch.rand(5)  # where the generator outside is does not matter
    one, same, another = bits(first), bits(reinitialise(second, seed=1)), bits(reinitialise(other, seed=2))
    assert all(torch.equal(value, same[name]) for name, value in one.items())
    drawn = {name for name, value in one.items() if value.dim() > 1 and value.unique().numel() > 2}
    assert drawn
    assert all(not torch.equal(one[name], another[name]) for name in drawn)


@pytest.mark.parametrize("build", MODELS.values(), ids=MODELS)
def test_of_an_untrained_module_every_parameter_that_varies_changes_too(build: Callable[[], nn.Module]) -> None:
    module = build()
    before = bits(module)
    reinitialise(module, seed=5)
    for name, parameter in module.named_parameters():
        if before[name].unique().numel() > 1:
            assert not torch.equal(parameter, before[name]), name


def test_running_statistics_start_again_and_other_buffers_stay() -> None:
    module = trained(lambda: timm.create_model("resnet10t", pretrained=False))
    reinitialise(module, seed=0)
    for name, buffer in module.named_buffers():
        start = 1.0 if name.endswith("running_var") else 0.0
        assert bool((buffer == start).all()), name
    bare = Bare()
    reinitialise(bare, seed=0)
    assert torch.equal(bare.table, torch.arange(5))


def test_running_statistics_of_a_frozen_normalisation() -> None:
    from torchvision.ops import FrozenBatchNorm2d

    frozen = FrozenBatchNorm2d(3)
    frozen.running_mean.fill_(4.0)
    frozen.running_var.fill_(9.0)
    reinitialise(frozen, seed=0)
    assert frozen.running_mean.tolist() == [0.0] * 3
    assert frozen.running_var.tolist() == [1.0] * 3


def test_what_no_reset_reaches_is_permuted() -> None:
    module = Bare()
    frozen = module.frozen.clone()
    reinitialise(module, seed=4)
    assert sorted(module.token.flatten().tolist()) == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert module.token.shape == (1, 1, 6)
    assert module.pair.tolist() == [2.0, 1.0]  # of two entries there is one other order, whatever the seed
    assert module.constant.tolist() == [0.5] * 4
    assert torch.equal(module.frozen.flatten().sort().values, frozen.flatten().sort().values)
    assert not torch.equal(module.frozen, frozen)


def test_what_is_drawn_is_what_pytorch_draws() -> None:
    """U(−1/√fan_in, 1/√fan_in) for a linear layer, from the seed; a normalisation starts from 1 and 0."""
    net = nn.Sequential(nn.Linear(400, 300), nn.BatchNorm1d(300))
    with torch.no_grad():
        net[0].weight.normal_(3.0)
        net[1].weight.normal_()
    reinitialise(net, seed=9)
    torch.manual_seed(9)
    assert torch.equal(net[0].weight, nn.Linear(400, 300).weight)
    assert 0.04 < float(net[0].weight.detach().abs().max()) <= 0.05  # 1/√400
    assert net[1].weight.tolist() == [1.0] * 300


def test_shared_parameters_stay_shared() -> None:
    one, other = nn.Linear(4, 4), nn.Linear(4, 4)
    other.weight = one.weight
    net = reinitialise(nn.Sequential(one, other), seed=0)
    assert net[0].weight is net[1].weight


def test_the_generator_outside_is_where_it_was() -> None:
    module = trained(MODELS["toy"])
    torch.manual_seed(11)
    state = torch.random.get_rng_state()
    reinitialise(module, seed=0)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_other_dtypes_and_modules_without_parameters() -> None:
    half = reinitialise(nn.Linear(3, 3).to(torch.bfloat16), seed=0)
    assert half.weight.dtype == torch.bfloat16
    assert list(reinitialise(Does(torch.relu), seed=0).parameters()) == []
    with pytest.raises(UsageError, match="seed=-1 must not be negative"):
        reinitialise(nn.Linear(2, 2), seed=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_on_cuda() -> None:
    module = trained(MODELS["toy"]).cuda()
    states = torch.random.get_rng_state(), torch.cuda.get_rng_state()
    first, second = (bits(reinitialise(deepcopy(module), seed=1)) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(value.is_cuda for value in first.values())
    assert torch.equal(torch.random.get_rng_state(), states[0])
    assert torch.equal(torch.cuda.get_rng_state(), states[1])
