"""How the CUDA scan is laid over the GPU, for shapes of every size, and what of a call needs no GPU."""

import re
from itertools import product
from pathlib import Path

import pytest
import torch

from mambavision.kernels import cuda, reference
from mambavision.kernels.cuda_plan import Plan, bytes_of_sums, merged_plan, plan, team_plan

SHAPES = [(1, 1, 1, 1), (1, 400, 4, 512), (1, 262144, 4, 96), (64, 3136, 4, 192), (70000, 3, 1, 5), (8, 4096, 1, 2304)]
P2, P3 = (16, 25600, 4, 128, 16), (16, 6400, 4, 256, 16)
DIM256, DIM1024 = (64, 256, 1, 2304, 16), (8, 4096, 1, 2304, 16)
SERPENT, NEXT = (1, 262144, 4, 96, 16), (1, 65536, 4, 192, 16)
# batch, length, scans, channels, N: states, lanes, segments of the forward; segments of the backward, decays kept
FASTEST = {
    P2: (8, 2, 2, 1, True),
    P3: (8, 2, 1, 1, True),
    DIM256: (16, 1, 1, 1, True),
    DIM1024: (8, 2, 1, 1, True),
    SERPENT: (4, 4, 22, 64, True),
    NEXT: (4, 4, 11, 32, True),
}


def segments(p: Plan, length: int) -> int:
    return -(-length // p.segment)


@pytest.mark.parametrize("N", [1, 2, 3, 8, 16, 17, 64, 100, 128])
def test_every_state_step_and_channel_has_a_lane(N):
    for shape, backward in product([*SHAPES, *(s[:4] for s in FASTEST)], (False, True)):
        p = plan(*shape, N, 132, backward=backward)
        assert p.states * p.split >= N and p.tile % p.split == 0 and 32 % p.tile == 0
        assert p.threads % 32 == 0 and p.channels * p.split == p.threads
        assert p.segment % p.tile == 0 and p.segment > 0
        assert p.resident * p.threads <= (256 if p.keep_decay and N > 1 else 512)


@pytest.mark.parametrize("shape", FASTEST)
def test_an_h100_gets_the_plans_that_were_fastest_on_it(shape):
    states, lanes, cuts, cuts_back, keeps = FASTEST[shape]
    forward, backward = (plan(*shape, 132, backward=b) for b in (False, True))
    assert (forward.states, forward.split, segments(forward, shape[1])) == (states, lanes, cuts)
    assert forward.tile == 16 and not forward.keep_decay
    assert (backward.states, backward.split, backward.tile, backward.threads) == (4, 4, 16, 128)
    assert (segments(backward, shape[1]), backward.keep_decay, backward.resident) == (cuts_back, keeps, 3 - keeps)


def test_a_backward_that_two_segments_fill_gets_no_more():
    """Each cut costs a walk over what it passes on."""
    p = plan(8, *P2[1:], 132, backward=True)
    assert segments(p, P2[1]) == 2 and p.states == p.split == 4


def test_few_channels_over_a_long_sequence_fill_the_gpu():
    p = plan(1, 262144, 4, 96, 16, 132, backward=False)
    blocks = 4 * -(-96 // p.channels) * segments(p, 262144)
    assert blocks * p.threads / 32 >= 8 * 132
    assert plan(64, 256, 1, 2304, 16, 132, backward=False).segment >= 256


def test_addresses_are_packed_as_the_kernels_read_them():
    source = Path(cuda.__file__).with_name("scan.cuh").read_text()
    pointers = re.search(r"struct Call \{(.*?)View x_view", source, re.S)[1]
    pointers = re.sub(r"//.*", "", pointers)
    assert tuple(re.findall(r"\*(\w+)", pointers)) == cuda._GIVEN + cuda._OF_FORWARD + cuda._OF_BACKWARD


@pytest.mark.parametrize("merge", [False, True])
def test_an_empty_batch_has_empty_results_and_no_gradient(merge):
    length, K, channels, N = 5, 2, 3, 4
    inputs = [(0, length, 1, channels), (0, length, K, channels), (K, channels, N), *[(0, length, K, N)] * 2]
    leaves = [torch.ones(s, requires_grad=True) for s in (*inputs, (K, channels), (K, channels), (0, K, channels, N))]
    want = reference.scan(*leaves, None, True, merge)
    got = cuda.scan(*(v.detach() for v in leaves), None, True, merge)
    assert [v.shape for v in got] == [v.shape for v in want]
    gradients = cuda.scan_backward(*got, *(v.detach() for v in leaves), None, True, merge)
    expected = torch.autograd.grad(want, leaves, got, allow_unused=True, materialize_grads=True)
    torch.testing.assert_close(list(gradients), list(expected))


def test_parameters_are_read_sixteen_bytes_at_once():
    whole = torch.arange(33.0)
    odd = whole[1:].view(2, 4, 4)
    assert odd.data_ptr() % 16 and odd.is_contiguous()
    copy = cuda._parameter(odd)
    assert copy.data_ptr() % 16 == 0 and torch.equal(copy, odd)
    assert cuda._parameter(whole) is whole and cuda._parameter(None) is None
    assert cuda._parameter(odd.mT.half()).is_contiguous()


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("shared", [64, 96, 99, 163, 227])
def test_a_backward_fits_into_a_blocks_shared_memory(shared, gated):
    for N, shape in product((1, 2, 3, 8, 16, 17, 64, 128), SHAPES):
        p = plan(*shape, N, 132, backward=True).fitting(gated, shared << 10)
        assert p.steps(gated) <= 48 << 10 and p.steps(gated) + p.partials <= shared << 10 and p.threads % 32 == 0


@pytest.mark.parametrize("shared", [64, 96, 99, 163, 227])
def test_merged_scans_and_teams_fit_into_a_blocks_shared_memory(shared):
    for length, backward, row in product((1, 49, 784, 1600, 3136, 6400), (False, True), (64, 128, 192)):
        p = merged_plan(64, length, 192, row, 132, shared << 10, backward=backward)
        a_thread = row + (36 if backward else 14)  # of the stages and of what is declared
        assert p is None or (shared > 96 and a_thread * p.threads + bytes_of_sums(length) < shared << 10)
        team = team_plan(1, length, 4, 192, 16, 132, shared << 10)
        assert team is None or team.threads == 128 and 4 * length * team.channels * 4 + (48 << 10) <= shared << 10
    assert merged_plan(64, 3136, 192, 64, 132, 227 << 10, backward=False).threads == 352
