"""`max_grad_norm` in a swarm: what the optimizer steps with is clipped, as torch clips it."""

from __future__ import annotations

import pytest
import torch

from hivetrain.trainer import clip
from hivetrain.trainer.clip import clip_, clipped


def weights_with_gradients(dtype: torch.dtype = torch.float32) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((3, 5), (7,))]
    for weight in weights:
        weight.grad = torch.randn(weight.shape, generator=generator).to(dtype)
    return [*weights, torch.nn.Parameter(torch.zeros(2))]  # the last has none


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("max_norm", [0.5, 100.0])
def test_gradients_are_clipped_together_as_torch_does_it(dtype: torch.dtype, rtol: float, max_norm: float) -> None:
    ours, reference = weights_with_gradients(dtype), weights_with_gradients(dtype)
    clip_(torch.optim.SGD([{"params": ours[:1]}, {"params": ours[1:]}]), max_norm)
    torch.nn.utils.clip_grad_norm_(reference, max_norm)
    for one, other in zip(ours[:2], reference[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=rtol, atol=0)
    assert ours[2].grad is None


def test_a_device_without_float64_clips_as_well(monkeypatch: pytest.MonkeyPatch) -> None:
    norm = torch.linalg.vector_norm

    def as_on_mps(tensor: torch.Tensor, *, dtype: torch.dtype) -> torch.Tensor:
        if dtype is torch.float64:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return norm(tensor, dtype=dtype)

    assert "mps" in clip.WITHOUT_FLOAT64
    monkeypatch.setattr(clip, "WITHOUT_FLOAT64", ("cpu",))
    ours, reference = weights_with_gradients(), weights_with_gradients()
    torch.nn.utils.clip_grad_norm_(reference, 0.5)
    monkeypatch.setattr(torch.linalg, "vector_norm", as_on_mps)
    clip_(torch.optim.SGD(ours), 0.5)
    for one, other in zip(ours[:2], reference[:2], strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-6, atol=0)


def test_an_optimizer_clips_before_each_step_and_with_0_never() -> None:
    for max_norm, expected in ((1.0, -1.0), (0.0, -4.0)):
        weight = torch.nn.Parameter(torch.zeros(1))
        optimizer = clipped(torch.optim.SGD([weight], lr=1.0), max_norm)
        weight.grad = torch.tensor([4.0])
        optimizer.step()
        assert weight.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_that_are_not_finite_are_left_as_they_are() -> None:
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([float("nan"), 3.0])
    clip_(torch.optim.SGD([weight]), 1.0)
    assert weight.grad[1].item() == 3.0


def test_the_same_gradients_keep_the_same_bits_however_many_threads_add_them_up() -> None:
    kept = torch.get_num_threads()
    gradient, found = torch.randn(300_000, generator=torch.Generator().manual_seed(0)), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            weight = torch.nn.Parameter(torch.zeros(gradient.shape))
            weight.grad = gradient.clone()
            clip_(torch.optim.SGD([weight]), 1.0)
            found.append(weight.grad)
    finally:
        torch.set_num_threads(kept)
    assert torch.equal(*found)
