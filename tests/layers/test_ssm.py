import pytest
import torch
import torch.nn.functional as F

from mambavision.layers import LayerNorm2d, SelectiveSSM, init_mamba, init_mamba_yolo, init_vmamba_v1, init_vmamba_v2
from mambavision.layers.ssm import ssm_scan

D, R, N = 64, 4, 16


def drawn(init):
    torch.manual_seed(0)
    return SelectiveSSM(D, R, d_state=N, init=init)


def test_init_mamba_is_s4d_real_with_steps_in_range():
    ssm = drawn(init_mamba)
    expected = torch.arange(1.0, N + 1).expand(4 * D, N)
    torch.testing.assert_close(ssm.A_logs.exp(), expected)
    assert (ssm.Ds == 1).all()
    dt = F.softplus(ssm.dt_projs_bias.detach())
    assert 0.999e-3 <= dt.min() < 2e-3 and 0.05 < dt.max() <= 0.1001
    assert dt.log().std() == pytest.approx(1.33, abs=0.15)  # log-uniform over two decades: ln(100) / sqrt(12)
    assert ssm.dt_projs_weight.abs().max() <= R**-0.5


def test_init_mamba_has_a_floor():
    ssm = SelectiveSSM(D, R, init=lambda *p: init_mamba(*p, dt_min=1e-6, dt_max=1e-2, dt_init_floor=1e-3))
    assert F.softplus(ssm.dt_projs_bias).min() >= 0.999e-3


@pytest.mark.parametrize(
    ("init", "mean", "std", "A_std"),
    [(init_mamba_yolo, 0, 1, 0), (init_vmamba_v1, 0, 0.1, 1), (init_vmamba_v2, 0.05, 0.1 / 12**0.5, 0)],
)
def test_other_inits_have_their_statistics(init, mean, std, A_std):
    ssm = drawn(init)
    for v in (ssm.dt_projs_weight, ssm.dt_projs_bias):
        assert v.mean().item() == pytest.approx(mean, abs=0.2 * std)
        assert v.std().item() == pytest.approx(std, rel=0.2)
    assert ssm.A_logs.std().item() == pytest.approx(A_std, rel=0.1)
    assert (ssm.Ds == 1).all()


def test_x_proj_is_drawn_as_a_linear_layer():
    bound = drawn(init_mamba).x_proj_weight.abs().max()
    assert 0.95 * D**-0.5 < bound <= D**-0.5


def test_ssm_scan_is_the_written_recurrence():
    torch.manual_seed(0)
    x, grid = torch.randn(1, 6, 3, dtype=torch.float64), (2, 3)
    x_proj, dt_weight = torch.randn(2, 1 + 2 * 2, 3).double(), torch.randn(2, 3, 1).double()
    dt_bias, A_log, skip = torch.randn(2, 3).double(), torch.randn(2, 3, 2).double(), torch.randn(2, 3).double()
    y = ssm_scan(x, x_proj, dt_weight, dt_bias, A_log, skip, orders=("row", "col_reverse"), grid=grid)
    expected = torch.zeros_like(x)
    for k, order in enumerate(([0, 1, 2, 3, 4, 5], [5, 2, 4, 1, 3, 0])):
        h = torch.zeros(3, 2, dtype=torch.float64)
        for i in order:
            dt, b, c = (x_proj[k] @ x[0, i]).split([1, 2, 2])
            delta = F.softplus(dt_weight[k] @ dt + dt_bias[k])[:, None]
            h = torch.exp(-delta * A_log[k].exp()) * h + delta * b * x[0, i, :, None]
            expected[0, i] += h @ c + skip[k] * x[0, i]
    torch.testing.assert_close(y, expected)


def test_layer_norm_2d_normalises_channels_and_keeps_memory_format():
    x = torch.randn(2, 8, 3, 5)
    norm = LayerNorm2d(8)
    torch.nn.init.normal_(norm.weight)
    expected = (x - x.mean(1, True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(norm(x), expected * norm.weight[:, None, None])
    image = x.contiguous(memory_format=torch.channels_last)
    assert norm(image).is_contiguous(memory_format=torch.channels_last)
