import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from mambavision.backbones.serpent import serpent_debug
from mambavision.restoration import inferencer as module
from mambavision.restoration import weights
from mambavision.restoration.images import PhotoFile, write_photo_file
from mambavision.restoration.inferencer import RestorationInferencer

RNG = np.random.default_rng(0)


def save(path, task="denoise_color", in_channels=3, scale=1, sigma_input=False, **metadata):
    torch.manual_seed(0)
    net = serpent_debug(in_channels, scale=scale, sigma_input=sigma_input)
    nn.init.normal_(net.head.weight, std=0.03)
    weights.save(net, path, task=task, metadata=metadata, precision="fp32")
    return path


class Network(nn.Module):
    """A stand-in with a given function as its forward."""

    config = dict(in_channels=3, scale=1, sigma_input=False)

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.fixture
def make(tmp_path, monkeypatch):
    """An inferencer, on the CPU, of a function or of weights."""

    def made(network=None, *, of=None, **options):
        path = tmp_path / "w.safetensors"
        if network is None:
            save(path, **(of or {}))
        else:
            loaded = Network(network), {"task": "denoise_color"}
            monkeypatch.setattr(module.weight_files, "load", lambda *_: loaded)
        return RestorationInferencer(weights=path, **{"device": "cpu", **options})

    return made


def array(*shape, dtype=np.uint8):
    return RNG.integers(0, np.iinfo(dtype).max, shape, dtype)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("shape", [(1, 1, 3), (3, 5, 3), (70, 90, 3), (40, 30), (40, 30, 1), (40, 30, 2), (9, 8, 4)])
def test_arrays_come_back_as_they_went_in(make, dtype, shape):
    picture = array(*shape, dtype=dtype)
    out = make()(picture)
    assert out.dtype == dtype and out.shape == (shape[:2] if shape[2:] == (1,) else shape)
    if shape[2:] in ((2,), (4,)):
        assert np.array_equal(out[..., -1], picture[..., -1])
    assert not np.array_equal(out, picture.reshape(out.shape)) or out.size < 10


def test_a_picture_is_what_its_network_makes_of_it(make):
    inferencer = make()
    picture = array(48, 32, 3)
    x = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        expected = (inferencer.network(x)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(inferencer(picture), expected)


def test_one_identity_loses_nothing(make):
    for dtype in (np.uint8, np.uint16):
        picture = array(150, 100, 4, dtype=dtype)
        assert np.array_equal(make(lambda x: x, tile=64)(picture), picture)
        assert np.array_equal(make(lambda x: x, self_ensemble=True)(picture), picture)


def test_pillow_images_and_paths(make, tmp_path):
    inferencer = make()
    picture = array(40, 30, 3)
    image = inferencer(Image.fromarray(picture))
    assert image.mode == "RGB" and np.array_equal(np.asarray(image), inferencer(picture))
    for name in ("a.png", "deep/b.png"):
        write_photo_file(tmp_path / "photos" / name, PhotoFile(picture))
    assert np.array_equal(inferencer(str(tmp_path / "photos" / "a.png")), inferencer(picture))
    assert len(inferencer(tmp_path / "photos")) == 2
    assert len(inferencer(tmp_path / "photos" / "*.png")) == 1
    assert [type(one) for one in inferencer([picture, Image.fromarray(picture)])] == [np.ndarray, Image.Image]
    with pytest.raises(FileNotFoundError, match="no file is named"):
        inferencer(tmp_path / "*.gif")
    with pytest.raises(ValueError, match="not a float"):
        inferencer(1.0)


def test_enlarging(make):
    inferencer = make(of=dict(task="sr_x2", scale=2))
    assert inferencer(array(1, 1, 3)).shape == (2, 2, 3)
    whole, tiled = (make(of=dict(task="sr_x2", scale=2), tile=tile)(array(3, 5, 4)) for tile in ("auto", 64))
    assert whole.shape == tiled.shape == (6, 10, 4)


def test_self_ensemble_is_the_average_of_eight(make):
    plain, ensemble = make(), make(self_ensemble=True)
    picture = array(32, 48, 3) // 2 + 60  # nothing is clipped
    sums = np.zeros(picture.shape)
    for k in range(4):
        for flipped in (False, True):
            turned = np.rot90(picture[:, ::-1] if flipped else picture, k)
            back = np.rot90(plain(np.ascontiguousarray(turned)).astype(float), -k)
            sums += back[:, ::-1] if flipped else back
    assert np.abs(ensemble(picture) - sums / 8).max() <= 1.5  # each of the eight was rounded


def test_turned_pictures_keep_the_blocks_of_jpeg(make):
    def block_means(x):
        height, width = x.shape[2:]
        padded = F.pad(x, (0, -width % 8, 0, -height % 8), mode="replicate")
        return nearest(F.avg_pool2d(padded, 8))[..., :height, :width]

    def nearest(x):
        return x.repeat_interleave(8, 2).repeat_interleave(8, 3)

    picture = np.kron(array(9, 11, 3), np.ones((8, 8, 1), np.uint8))[:67, :81]  # of blocks, the last ones cut
    for tile in (0, 64):  # tiles too begin where a block begins
        for self_ensemble in (False, True):
            restored = make(block_means, tile=tile, self_ensemble=self_ensemble)(picture)
            assert np.array_equal(restored[:64, :80], picture[:64, :80])


def test_noise_level(make, tmp_path):
    of = dict(sigma_input=True, sigma_range=[0, 50])
    picture = array(24, 40, 3)
    assert not np.array_equal(make(of=of, sigma=50)(picture), make(of=of)(picture))
    with pytest.raises(ValueError, match=r"sigma 60 is outside the 0 to 50 that w\.safetensors"):
        make(of=of, sigma=60)
    with pytest.raises(ValueError, match="takes no noise level"):
        make(sigma=25)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(task="deblur"), "is for denoise_color, not for deblur"),
        (dict(task="colourise"), "unknown task 'colourise'"),
        (dict(tile=-5), "tile -5 is too small"),
        (dict(tile=63), "tile 63 is too small"),
        (dict(overlap=-1), "overlap -1"),
        (dict(tile=64, overlap=64), "smaller than the tile"),
        (dict(precision="fp8"), "unknown precision"),
        (dict(device="tpu"), "device 'tpu' cannot be used"),
    ],
)
def test_bad_arguments_are_refused(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_colour_for_gray_weights_is_refused(make):
    inferencer = make(of=dict(task="denoise_gray", in_channels=1))
    assert inferencer(array(20, 20)).shape == (20, 20)
    with pytest.raises(ValueError, match="in colour"):
        inferencer(array(20, 20, 3))


def test_weights_that_are_not_there(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors"):
        RestorationInferencer(weights=tmp_path / "gone.safetensors")
    monkeypatch.setattr(module, "WEIGHTS_FOLDER", tmp_path)
    with pytest.raises(FileNotFoundError, match="no weights for sr_x8 in"):
        RestorationInferencer("sr_x8")
    with monkeypatch.context() as patch, pytest.raises(FileNotFoundError, match="come with the checkout: start there"):
        patch.setattr(module, "WEIGHTS_FOLDER", tmp_path / "none")
        RestorationInferencer("sr_x8")
    for size in ("t", "l", "s"):
        save(tmp_path / f"serpent_{size}_denoise_color.safetensors")
    largest = RestorationInferencer(device="cpu")
    assert largest.task == "denoise_color" and largest.weights.name == "serpent_l_denoise_color.safetensors"
    save(tmp_path / "serpent_s_jpeg_gray.safetensors", task="jpeg_gray", in_channels=1)
    with pytest.raises(FileNotFoundError, match=r"no weights for jpeg in .*, only for denoise_color, jpeg_gray:"):
        RestorationInferencer("jpeg")


def test_gray_pictures_are_restored_by_the_network_for_gray(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(module, "WEIGHTS_FOLDER", tmp_path)
    path = save(tmp_path / "serpent_s_denoise_color.safetensors", sigma_input=True)
    gray, colour = array(40, 50), array(40, 50, 3)
    alone = RestorationInferencer(device="cpu", sigma=9)
    by_colour = alone(gray)
    assert alone.used == {path} and "of a gray picture, noise may stay" in capsys.readouterr().err

    gray_path = save(tmp_path / "serpent_s_denoise_gray.safetensors", "denoise_gray", in_channels=1, sigma_input=True)
    both, only = (
        RestorationInferencer(device="cpu", sigma=9),
        RestorationInferencer(weights=path, device="cpu", sigma=9),
    )
    expected = RestorationInferencer("denoise_gray", device="cpu", sigma=9)(gray)
    assert np.array_equal(both(gray), expected) and not np.array_equal(expected, by_colour)
    assert both.used == {gray_path} and not capsys.readouterr().err
    assert np.array_equal(both(gray[..., None].repeat(3, 2)), expected[..., None].repeat(3, 2))
    tint = np.array([0, 3, 1], np.uint8)
    tinted = gray.clip(0, 252)[..., None] + tint
    restored = both(tinted)
    assert np.array_equal(restored[..., 0], both(gray.clip(0, 252))) and both.used == {gray_path}
    assert np.array_equal(restored, (restored[..., :1].astype(int) + tint).clip(0, 255))
    assert np.array_equal(both(colour), only(colour)) and both.used == {path, gray_path}
    assert np.array_equal(both(tinted + tint), only(tinted + tint))
    assert np.array_equal(only(gray), by_colour) and only.used == {path}


def test_luminance_is_denoised_once_more(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "WEIGHTS_FOLDER", tmp_path)
    path = save(tmp_path / "serpent_s_denoise_color.safetensors", sigma_input=True)
    with pytest.raises(FileNotFoundError, match="no weights for denoise_gray"):
        RestorationInferencer(device="cpu", luminance=True)
    save(tmp_path / "serpent_s_denoise_gray.safetensors", "denoise_gray", in_channels=1, sigma_input=True)
    once, gray = RestorationInferencer(device="cpu", sigma=9), RestorationInferencer("denoise_gray", device="cpu")
    twice = RestorationInferencer(device="cpu", sigma=9, luminance=True)
    picture = array(40, 50, 3)
    first = once(picture)
    luminance = (first @ np.array([0.299, 0.587, 0.114], np.float32)).round().astype(np.uint8)
    change = gray(luminance).astype(int) - luminance
    assert np.array_equal(twice(picture), (first + change[..., None]).clip(0, 255)) and len(twice.used) == 2
    assert np.abs(change).max() > 0
    assert np.array_equal(twice(picture[..., 0]), once(picture[..., 0]))
    for options in (dict(weights=path), dict(task="denoise_gray")):
        with pytest.raises(ValueError, match="luminance is denoised with the task denoise_color"):
            RestorationInferencer(device="cpu", luminance=True, **options)


@pytest.mark.parametrize("task", module.TASKS)
def test_every_task_restores(make, task):
    scale = int(task[-1]) if task.startswith("sr_x") else 1
    gray = task.endswith("gray")
    inferencer = make(of=dict(task=task, scale=scale, in_channels=1 if gray else 3), task=task, tile=64)
    picture = array(20, 70) if gray else array(20, 70, 3)
    assert inferencer.task == task and inferencer(picture).shape == (20 * scale, 70 * scale, *picture.shape[2:])


def test_a_mask_is_filled_and_nothing_else_changes(make):
    picture = array(40, 90, 4)
    mask = np.zeros((40, 90), bool)
    mask[5:9, 20:70] = True
    inferencer = make(of=dict(task="inpaint"), tile=64)
    filled = inferencer(picture, mask=mask)
    assert np.array_equal(filled[~mask], picture[~mask]) and np.array_equal(filled[..., 3], picture[..., 3])
    black = np.where(mask[..., None], 0, picture[..., :3])
    assert np.array_equal(filled[mask][:, :3], inferencer(black)[mask])  # what was under it is not seen
    for wrong in (mask[:, 1:], mask.astype(np.uint8), mask[..., None]):
        with pytest.raises(ValueError, match=r"the mask of a 90x40 picture is bool \(H, W\), not"):
            inferencer(picture, mask=wrong)
    with pytest.raises(ValueError, match=r"a mask is for the task inpaint, w\.safetensors is for denoise_color"):
        make()(picture, mask=mask)


def test_tiles_are_halved_until_they_fit(make, capsys):
    sizes = []

    def network(x):
        sizes.append(x.shape[-1])
        if x.shape[-1] > 128:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x

    inferencer = make(network, tile=512)
    picture = array(300, 600, 3)
    assert np.array_equal(inferencer(picture), picture)
    assert "out of memory on cpu: going on with tiles of 128 pixels" in capsys.readouterr().err
    sizes.clear()
    assert np.array_equal(inferencer(picture), picture) and max(sizes) <= 128  # remembered
    assert capsys.readouterr().err == ""


@pytest.mark.gpu
def test_tiles_are_halved_when_a_gpu_runs_out_of_memory(make, capsys):
    picture = array(1024, 1024, 3)
    inferencer = make(device="cuda", tile=1024)
    expected = make(device="cuda", tile=256)(picture)
    torch.cuda.empty_cache()  # what other tests left in the cache would be allowed on top
    allowed = torch.cuda.memory_reserved() + 0.4 * picture.shape[0] ** 2 * inferencer._measured()
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(allowed / torch.cuda.mem_get_info()[1])
    try:
        restored = inferencer(picture)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory on cuda: going on with tiles of " in capsys.readouterr().err
    assert inferencer._largest in (256, 512)
    assert np.abs(restored.astype(int) - expected).mean() < 1


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")]
)
def test_no_memory_for_the_smallest_tile(make, error):
    def network(x):
        raise error

    with pytest.raises(MemoryError, match=r"with tiles of 64 pixels, \d+\.\d\d GB are free"):
        make(network, tile=256)(array(300, 300, 3))
    with pytest.raises(RuntimeError, match="shapes"):  # another error is no reason to go on
        make(lambda x: (_ for _ in ()).throw(RuntimeError("shapes differ")), tile=256)(array(300, 300, 3))


def test_one_piece_that_does_not_fit_is_refused_before_it_starts(make, monkeypatch):
    inferencer = make(tile=0)
    assert inferencer(array(100, 100, 3)).shape == (100, 100, 3)
    inferencer._bytes_per_pixel = 1e9
    with pytest.raises(MemoryError, match=r"100x200 pixels in one piece need about 20000\.0 GB on cpu"):
        inferencer(array(200, 100, 3))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_tiles_that_are_not_finite_are_done_again_in_fp32(make, capsys, precision):
    def network(x):
        half = torch.is_autocast_enabled("cpu")
        return x * torch.nan if half and x.mean() > 0.5 else x

    inferencer = make(network, precision=precision, tile=64)
    picture = np.concatenate([np.full((64, 160, 3), 20, np.uint8), np.full((64, 200, 3), 240, np.uint8)], 1)
    assert np.array_equal(inferencer(picture), picture)
    assert np.array_equal(inferencer(picture), picture)
    assert capsys.readouterr().err.count("not finite") == 1
    with pytest.raises(ValueError, match="even in fp32"):
        make(lambda x: x / 0)(picture)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_is_near_full(make, precision):
    picture = array(40, 48, 3)
    half, full = make(precision=precision)(picture), make()(picture)
    assert np.abs(half.astype(int) - full).max() <= 4


def test_progress_counts_tiles(make):
    calls = []
    make(lambda x: x, tile=64)(array(100, 100, 3), lambda *n: calls.append(n))
    assert calls == [(n, calls[-1][1]) for n in range(1, len(calls) + 1)] and calls[-1][0] == calls[-1][1] > 1
