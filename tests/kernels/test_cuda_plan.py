"""How the CUDA scan is laid over the GPU, for shapes of every size."""

from itertools import product

import pytest

from mambavision.kernels.cuda import plan

SHAPES = [(1, 1, 1, 1), (1, 400, 4, 512), (1, 262144, 4, 96), (64, 3136, 4, 192), (70000, 3, 1, 5), (8, 4096, 1, 2304)]


@pytest.mark.parametrize("N", [1, 2, 3, 8, 16, 17, 64, 100, 128])
def test_every_state_step_and_channel_has_a_lane(N):
    for shape, backward in product(SHAPES, (False, True)):
        p = plan(*shape, N, 132, backward=backward)
        assert p.states * p.split >= N and p.tile % p.split == 0 and 32 % p.tile == 0
        assert p.threads % 32 == 0 and p.channels * p.split == p.threads
        assert p.segment % p.tile == 0 and p.segment > 0


def test_few_channels_over_a_long_sequence_fill_the_gpu():
    p = plan(1, 262144, 4, 96, 16, 132, backward=False)
    blocks = 4 * -(-96 // p.channels) * -(-262144 // p.segment)
    assert blocks * p.threads / 32 >= 8 * 132
    assert plan(64, 256, 1, 2304, 16, 132, backward=False).segment >= 256
