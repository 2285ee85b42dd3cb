import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mambavision.backbones.dncnn import DnCNN
from mambavision.engine.flops import count_flops, count_macs
from mambavision.layers import SelectiveSSM


def test_scan_is_counted_by_its_rule():
    ssm = SelectiveSSM(6, 2, d_state=3)
    x = torch.rand(2, 20, 6)
    projections = 2 * 2 * 20 * 4 * (6 * (2 + 2 * 3) + 2 * 6)
    assert count_flops(lambda: ssm(x, (4, 5))) == projections + 9 * 2 * 20 * 4 * 6 * 3


def test_attention_is_two_products():
    q, k = torch.rand(2, 3, 5, 8), torch.rand(2, 3, 7, 8)
    assert count_flops(lambda: F.scaled_dot_product_attention(q, k, k)) == 2 * 2 * 2 * 3 * 5 * 7 * 8


def test_macs_of_convolutions():
    net = DnCNN(1, depth=3, dim=8).train()
    assert count_macs(net, (4, 6)) == 4 * 6 * 9 * (8 + 8 * 8 + 8)
    assert net.training


def test_network_elsewhere_is_refused():
    with pytest.raises(ValueError, match="on the CPU, got one on meta"):
        count_macs(nn.Linear(1, 1, device="meta"), (4, 4))
