"""Memory that is used again must never be memory that somebody still holds."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from usae_probe.config import TrainConfig
from usae_probe.usae import USAE
from usae_probe.usae.kernels import CsrKernel, SiteEncoder, workspace
from usae_probe.usae.kernels.workspace import Workspace
from usae_probe.usae.losses import Objective

CPU = torch.device("cpu")
LARGE = (workspace.SMALLEST // 4 // 64, 64)


def taken(space: Workspace, shape: tuple[int, ...] = LARGE) -> Tensor:
    return space.empty(shape, torch.float32, CPU)


class TestWorkspace:
    def test_memory_comes_back_when_the_tensor_is_gone(self) -> None:
        space = Workspace()
        first = taken(space)
        assert first.shape == LARGE
        place = first.data_ptr()
        assert place % 64 == 0
        del first
        assert taken(space).data_ptr() == place
        assert taken(space, (LARGE[0] * 64,)).data_ptr() == place  # of any shape

    def test_memory_is_handed_out_for_what_fills_half_of_it(self) -> None:
        for times, expected in ((2, True), (3, False)):
            space = Workspace()
            place = taken(space, (times * LARGE[0], 64)).data_ptr()
            assert (taken(space).data_ptr() == place) == expected

    @pytest.mark.parametrize("alias", ["the tensor", "a view", "detached", "saved for backward", "numpy"])
    def test_memory_that_is_held_is_not_handed_out(self, alias: str) -> None:
        space = Workspace()
        first = taken(space)
        place = first.data_ptr()
        leaf = torch.ones((), requires_grad=True)
        held = {
            "the tensor": lambda: first,
            "a view": lambda: first[3:, 1],
            "detached": lambda: first.detach(),
            "saved for backward": lambda: (leaf * first).sum(),
            "numpy": lambda: first.numpy(),
        }[alias]()
        del first
        second = taken(space)
        assert second.data_ptr() != place
        del held
        assert taken(space).data_ptr() == place

    def test_small_tensors_are_torchs_own(self) -> None:
        space = Workspace()
        assert taken(space, (2, 3)).shape == (2, 3)
        assert taken(space, (0, 3)).shape == (0, 3)
        assert not space._buffers

    def test_what_nobody_takes_is_given_back(self) -> None:
        space = Workspace()
        taken(space, (4 * LARGE[0], 64))
        held = [taken(space) for _ in range(100)]  # too small for it: each makes a buffer of its own
        assert len(space._buffers) == len(held)

    def test_a_copy_starts_empty(self) -> None:
        space = Workspace()
        held = taken(space)
        for other in (copy.deepcopy(space), pickle.loads(pickle.dumps(space))):
            assert not other._buffers
        assert held.numel()


@pytest.fixture
def everything_pooled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workspace, "SMALLEST", 1)
    monkeypatch.setattr("usae_probe.usae.kernels.csr._PART", 1)


def usae_and_rows(kernel: str) -> tuple[USAE, Tensor]:
    usae = USAE({"a/x": 20, "b/y": 24}, n_latents=96, k=3, kernel=kernel)
    return usae, torch.randn(16, 44, generator=torch.Generator().manual_seed(1))


def loss(usae: USAE, x: Tensor, source: str, dead: Tensor) -> Tensor:
    how = TrainConfig(aux_k=5, aux_coef=0.5)
    return Objective(usae, how)(x, "main", source, dead).total


@pytest.mark.usefixtures("everything_pooled")
class TestStepsOverPooledMemory:
    def gradients(self, kernel: str) -> list[dict[str, Tensor]]:
        """Two steps of two accumulated backward passes each, with aux-k: W_dec is decoded by twice per pass."""
        usae, x = usae_and_rows(kernel)
        dead, found = torch.arange(96) % 3 == 0, []
        for _ in range(2):
            usae.zero_grad(set_to_none=True)
            for source in usae.sites:
                loss(usae, x, source, dead).backward()
            found.append({name: p.grad.clone() for name, p in usae.named_parameters() if p.grad is not None})
            with torch.no_grad():
                for p in usae.parameters():
                    p.sub_(p.grad, alpha=0.1)
        return found

    def test_accumulated_gradients_equal_the_references(self) -> None:
        for ours, reference in zip(self.gradients("csr"), self.gradients("reference"), strict=True):
            assert ours.keys() == reference.keys() >= {"W_dec", "W_enc.0", "W_enc.1"}
            for name, gradient in reference.items():
                torch.testing.assert_close(ours[name], gradient, rtol=1e-4, atol=1e-6)

    def test_gradients_by_autograd_grad_stay_what_they_are(self) -> None:
        usae, x = usae_and_rows("csr")
        dead = torch.zeros(96, dtype=torch.bool)
        first = torch.autograd.grad(loss(usae, x, "a/x", dead), usae.W_dec)[0]
        before = first.clone()
        second = torch.autograd.grad(loss(usae, 2 * x, "b/y", dead), usae.W_dec)[0]
        assert first.equal(before)
        assert not second.equal(before)

    def test_a_gradient_is_taken_over_without_a_copy(self) -> None:
        kernel, w_dec = CsrKernel(), torch.randn(4096, 40, requires_grad=True)
        support = usae_and_rows("csr")[0].code(torch.randn(4, 20), "a/x").support
        support = type(support).of(support.columns.view(4, 3), 4096)
        kernel.decode(torch.ones(12), support, w_dec).sum().backward()
        assert w_dec.grad is not None
        memory = {buffer.memory.ctypes.data for buffer in kernel._products.workspace._buffers}
        assert w_dec.grad.data_ptr() in memory

    def test_z_pre_of_several_sites_are_distinct(self) -> None:
        kernel, encoder = CsrKernel(), SiteEncoder(torch.randn(9, 4), torch.zeros(9), torch.zeros(4))
        x = torch.randn(5, 4)
        one, other = kernel.pre(x, encoder), kernel.pre(-x, encoder)
        torch.testing.assert_close(one, -other)
        assert one.data_ptr() != other.data_ptr()

    def test_a_model_is_copied_and_pickled_without_its_memory(self) -> None:
        usae, x = usae_and_rows("csr")
        loss(usae, x, "a/x", torch.zeros(96, dtype=torch.bool)).backward()
        for other in (copy.deepcopy(usae), pickle.loads(pickle.dumps(usae))):
            assert other.kernel.name == "csr"
            assert not other.kernel._workspace._buffers
            assert other.W_dec.equal(usae.W_dec)
