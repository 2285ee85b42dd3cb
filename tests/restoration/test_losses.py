import math

import pytest
import torch

from mambavision.restoration.losses import CharbonnierLoss, L1Loss, PSNRLoss


def test_losses_by_hand():
    x = torch.tensor([[[[0.0, 0.3]]], [[[0.1, 0.1]]]])
    gt = torch.tensor([[[[0.0, 0.7]]], [[[0.0, 0.0]]]])
    assert L1Loss()(x, gt) == pytest.approx((0.4 + 0.1 + 0.1) / 4)
    roots = 0.1 + math.hypot(0.4, 0.1) + 2 * math.hypot(0.1, 0.1)
    assert CharbonnierLoss(eps=0.1)(x, gt) == pytest.approx(roots / 4)
    assert PSNRLoss()(x, gt) == pytest.approx((10 * math.log10(0.08) - 20) / 2, abs=1e-5)


@pytest.mark.parametrize("loss", [CharbonnierLoss(), PSNRLoss()])
def test_gradients_of_a_perfect_picture_are_finite(loss):
    x = torch.zeros(1, 1, 4, 4, requires_grad=True)
    loss(x, torch.zeros(1, 1, 4, 4)).backward()
    assert x.grad.isfinite().all()
