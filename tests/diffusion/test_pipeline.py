import numpy as np
import pytest
import torch
from torch import nn

from mambavision.backbones.dim import dim_debug
from mambavision.backbones.dit import dit_debug
from mambavision.diffusion import pipeline as module
from mambavision.diffusion.objectives import EpsilonPrediction, RectifiedFlow, VPrediction
from mambavision.diffusion.pipeline import DiffusionPipeline
from mambavision.engine.checkpoint import CheckpointError
from tests.diffusion.conftest import untrained, untrained_network

QUIET = dict(num_inference_steps=3, progress=False, output_type="pt")
SAMPLERS = [
    *((EpsilonPrediction(), kind) for kind in ("ddpm", "ddim", "dpm-solver++")),
    *((RectifiedFlow(), kind) for kind in ("euler", "heun", "dpm-solver++")),
    (VPrediction("cosine"), "ddim"),
]


class Ideal(nn.Module):
    """Predicts what it was trained for, without error, of pictures that are all one gray of each class.

    The null class is the mean of all grays.
    """

    def __init__(self, objective, grays, size=(4, 4)):
        super().__init__()
        grays = torch.tensor(grays)
        self.grays = nn.Parameter(torch.cat([grays, grays.mean(0, keepdim=True)]))
        self.objective, self.input_size, self.in_channels, self.num_classes = objective, size, 3, len(grays)

    def forward(self, x, t, labels=None):
        x_0 = self.grays[labels].view(-1, *[1] * (x.ndim - 1)).expand_as(x)
        zero, one = torch.zeros_like(x), torch.ones_like(x)
        signal = self.objective.noisy(one, zero, t)
        noise = (x - signal * x_0) / self.objective.noisy(zero, one, t)
        return self.objective.target(x_0, noise, t)


@pytest.mark.parametrize(("objective", "kind"), SAMPLERS, ids=lambda v: v if isinstance(v, str) else type(v).__name__)
def test_an_ideal_network_samples_its_classes(objective, kind):
    pipeline = DiffusionPipeline(Ideal(objective, [-0.5, 0.0, 0.5]), objective)
    options = dict(num_inference_steps=20, guidance_scale=1.0, progress=False, output_type="pt")
    x = pipeline(num=6, scheduler=kind, **options).images
    want = torch.tensor([0.25, 0.5, 0.75] * 2).view(6, 1, 1, 1).expand_as(x)
    assert x.shape == (6, 3, 4, 4)
    torch.testing.assert_close(x, want, atol=0.02, rtol=0)


@pytest.mark.parametrize("mean", [1.0, 1.6])
def test_a_shifted_flow_takes_as_many_steps_as_it_was_trained_with(mean):
    objective = RectifiedFlow("logit_normal", mean=mean)
    pipeline = DiffusionPipeline(Ideal(objective, [-0.5, 0.5]), objective)
    x = pipeline([1], scheduler="dpm-solver++", guidance_scale=1.0, **{**QUIET, "num_inference_steps": 1000}).images
    torch.testing.assert_close(x, torch.full_like(x, 0.75), atol=0.02, rtol=0)


def test_ddim_is_refused_in_steps_that_it_would_take_to_other_times(make_pipeline):
    pipeline = make_pipeline(objective=EpsilonPrediction())
    with pytest.raises(ValueError, match="ddim cannot take 30 equal steps of 1000: it can 1, 2, 4, 5, 8, 10, 20, 25"):
        pipeline([0], scheduler="ddim", num_inference_steps=30, progress=False)


@pytest.mark.parametrize("kind", ["ddpm", "dpm-solver++"])
def test_steps_that_would_end_below_time_0_are_refused(make_pipeline, kind):
    pipeline = make_pipeline(objective=EpsilonPrediction())
    with pytest.raises(ValueError, match="cannot take 61 steps: its times would go below 0"):
        pipeline([0], scheduler=kind, num_inference_steps=61, progress=False)
    assert len(pipeline([0], scheduler=kind, **QUIET | {"num_inference_steps": 60}).images) == 1


def test_every_batch_takes_the_same_times_none_below_zero():
    objective, times = VPrediction("cosine"), []
    pipeline = DiffusionPipeline(Ideal(objective, [-0.5, 0.5]), objective)
    pipeline.network.register_forward_pre_hook(lambda module, inputs: times.append(inputs[1][0].item()))
    options = dict(num_inference_steps=700, guidance_scale=1.0, progress=False, output_type="pt")
    x = pipeline([1], num=3, batch_size=1, **options).images
    torch.testing.assert_close(x, torch.full_like(x, 0.75), atol=0.02, rtol=0)
    taken = times[-3 * 698 :]
    assert taken[:698] == taken[698:1396] == taken[1396:] and min(times) == 0


def test_classes_come_as_a_tensor_too(make_pipeline):
    assert make_pipeline().labels(torch.tensor([2, 0]), 3) == [2, 0, 2]
    assert make_pipeline().labels(torch.tensor(1), None) == [1]
    with pytest.raises(ValueError, match="guidance is a number, got '2'"):
        make_pipeline()([0], guidance_scale="2", **QUIET)


def test_guidance_moves_away_from_the_null_class():
    objective = RectifiedFlow()
    network = Ideal(objective, [-0.2, 0.4])  # their mean is 0.1
    pipeline = DiffusionPipeline(network, objective)
    for scale, want in ((0.0, 0.1), (0.5, 0.25), (1.0, 0.4), (2.0, 0.7)):
        x = pipeline([1], guidance_scale=scale, num_inference_steps=4, progress=False, output_type="pt").images
        torch.testing.assert_close(x, torch.full_like(x, want / 2 + 0.5), atol=1e-4, rtol=0)


def test_no_guidance_asks_the_network_once(make_pipeline):
    pipeline, sizes = make_pipeline(), []
    pipeline([0, 1], guidance_scale=1.0, **QUIET)
    pipeline.network.register_forward_pre_hook(
        lambda module, inputs: sizes.append((len(inputs[0]), inputs[2].tolist()))
    )
    pipeline([0, 1], guidance_scale=1.0, **QUIET)
    assert sizes == [(2, [0, 1])] * 3
    pipeline([0, 1], guidance_scale=1.0, **QUIET)
    sizes.clear()
    pipeline([0, 1], guidance_scale=3.0, **QUIET)
    assert sizes[-3:] == [(4, [0, 1, 3, 3])] * 3


def test_classes_of_pictures_guide_unless_told_otherwise(make_pipeline):
    pipeline = make_pipeline()
    options = dict(seeds=[1, 2], **QUIET)
    default = pipeline([0, 1], **options).images
    assert torch.equal(pipeline([0, 1], guidance_scale=1.5, **options).images, default)
    assert not torch.equal(pipeline([0, 1], guidance_scale=1.0, **options).images, default)
    assert pipeline.default_guidance == 1.5 and make_pipeline(class_names=None).default_guidance == 1.0
    assert make_pipeline(size=(3, 8, 8)).default_guidance == 1.0  # clips


def test_a_network_that_always_saw_its_classes_is_not_guided(make_pipeline, tmp_path):
    network = make_pipeline().network
    pipeline = DiffusionPipeline(network, RectifiedFlow(), class_names=["cat", "dog", "fox"], guidable=False)
    pipeline.save_pretrained(tmp_path / "saved")
    make_pipeline().save_pretrained(tmp_path / "guidable")
    again = DiffusionPipeline.from_pretrained(tmp_path / "saved", device="cpu")
    assert pipeline.default_guidance == again.default_guidance == 1.0
    assert DiffusionPipeline.from_pretrained(tmp_path / "guidable", device="cpu").default_guidance == 1.5
    options = dict(seeds=[1], **QUIET)
    assert torch.equal(again([0], **options).images, pipeline([0], guidance_scale=1.0, **options).images)
    with pytest.raises(ValueError, match="guidance 2 needs a network that was trained without classes too"):
        again([0], guidance_scale=2.0, **options)


@pytest.mark.parametrize(("objective", "kind"), [(EpsilonPrediction(), "ddpm"), (RectifiedFlow(), "heun")])
@pytest.mark.parametrize("make", [dim_debug, dit_debug])
def test_a_picture_is_the_same_whatever_the_batch(make, objective, kind):
    pipeline = untrained(make, objective=objective)
    options = dict(seeds=range(10, 15), scheduler=kind, guidance_scale=2.0, **QUIET)
    together = pipeline(num=5, batch_size=5, **options).images
    for size in (1, 2):
        torch.testing.assert_close(pipeline(num=5, batch_size=size, **options).images, together, atol=1e-5, rtol=0)
    alone = pipeline([0], seeds=[13], scheduler=kind, guidance_scale=2.0, **QUIET).images
    torch.testing.assert_close(alone, together[3:4], atol=1e-5, rtol=0)
    assert (together[0] - together[3]).abs().max() > 0.05  # one class, another seed


def test_sampling_is_deterministic_on_a_cpu(make_pipeline):
    pipeline = make_pipeline(objective=EpsilonPrediction())
    first, again = (pipeline(num=3, seeds=[1, 2, 3], scheduler="ddpm", **QUIET).images for _ in range(2))
    assert torch.equal(first, again)


def test_seeds_and_generators(make_pipeline):
    pipeline = make_pipeline()
    by_seed = pipeline([0, 1], seeds=[4, 5], **QUIET).images
    by_generator = pipeline([0, 1], generator=[torch.Generator().manual_seed(s) for s in (4, 5)], **QUIET).images
    assert torch.equal(by_seed, by_generator)
    one, same, other = (pipeline([0, 1], generator=torch.Generator().manual_seed(s), **QUIET).images for s in (7, 7, 8))
    assert torch.equal(one, same) and not torch.equal(one, other)
    torch.manual_seed(0)
    first = pipeline([0], **QUIET).images
    assert not torch.equal(pipeline([0], **QUIET).images, first)
    torch.manual_seed(0)
    assert torch.equal(pipeline([0], **QUIET).images, first)


def test_classes_by_name_and_index(make_pipeline):
    pipeline = make_pipeline()
    assert pipeline.labels(["fox", 0, "dog"], None) == [2, 0, 1]
    assert pipeline.labels("dog", 3) == [1, 1, 1]
    assert pipeline.labels(["fox", "cat"], 5) == [2, 0, 2, 0, 2]
    assert pipeline.labels(None, 4) == [0, 1, 2, 0]
    assert pipeline.labels(2, None) == [2]
    without = make_pipeline(class_names=None)
    assert without.labels(None, 2) == [None, None]
    assert without(num=2, **QUIET).images.shape == (2, 3, 8, 8)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(class_labels=[3]), "class 3 is out of range: there are 3, from 0 to 2"),
        (dict(class_labels=[-1]), "class -1 is out of range"),
        (dict(class_labels=["cat", "cow"], num=1), "there is no class 'cow'"),
        (dict(class_labels="cow"), "there is no class 'cow': classes are cat, dog, fox"),
        (dict(class_labels=[]), "empty list of classes"),
        (dict(num=0), "0 samples are asked for"),
        (dict(num_inference_steps=0), "0 steps cannot be taken: 1 to 1000 can"),
        (dict(num_inference_steps=1001), "1001 steps cannot be taken"),
        (dict(num_inference_steps=2.5), "2.5 steps cannot be taken"),
        (dict(class_labels=1.0), "a class is an index or a name, got 1.0"),
        (dict(class_labels=[True]), "a class is an index or a name, got True"),
        (dict(seeds=3.5), "seeds are whole numbers, one for each sample, got \\[3.5\\]"),
        (dict(num=2, seeds=3), "1 seeds are given for 2 samples"),
        (dict(guidance_scale=-0.5), "guidance -0.5 must be at least 0"),
        (dict(guidance_scale=float("nan")), "guidance nan must be at least 0"),
        (dict(scheduler="ddpm"), "cannot sample a RectifiedFlow; those that can: euler, heun"),
        (dict(batch_size=0), "a batch of 0"),
        (dict(precision="fp8"), "precision must be one of fp32, bf16"),
        (dict(output_type="jpg"), "output_type must be one of pil, np, pt"),
        (dict(num=2, seeds=[1]), "1 seeds are given for 2 samples"),
        (dict(num=2, generator=[torch.Generator()]), "1 generators are given for 2 samples"),
        (dict(seeds=[1], generator=torch.Generator()), "pass one of them"),
    ],
    ids=lambda v: None if isinstance(v, dict) else v[:25],
)
def test_what_cannot_be_sampled_is_said_before_any_work(arguments, message, make_pipeline):
    pipeline = make_pipeline()
    pipeline.network.forward = None
    with pytest.raises(ValueError, match=message) as error:
        pipeline(**{"num": 1, **QUIET, **arguments} if "class_labels" not in arguments else {**QUIET, **arguments})
    assert "\n" not in str(error.value)


def test_a_network_without_classes_refuses_them(make_pipeline):
    pipeline = make_pipeline(class_names=None)
    with pytest.raises(ValueError, match="no classes: leave them out"):
        pipeline([0], **QUIET)
    with pytest.raises(ValueError, match="guidance 2 needs a network with classes"):
        pipeline(guidance_scale=2.0, **QUIET)


def test_output_types(make_pipeline):
    options = dict(seeds=[0, 1], num_inference_steps=2, progress=False)
    for channels, mode in ((3, "RGB"), (1, "L")):
        pipeline = make_pipeline(in_channels=channels, size=(8, 12))
        tensor = pipeline([0, 1], output_type="pt", **options).images
        array = pipeline([0, 1], output_type="np", **options).images
        (pictures,) = pipeline([0, 1], return_dict=False, **options)
        assert tensor.shape == (2, channels, 8, 12) and 0 <= tensor.min() < tensor.max() <= 1
        assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
        assert [(p.mode, p.size) for p in pictures] == [(mode, (12, 8))] * 2
        np.testing.assert_allclose(np.asarray(pictures[1]), array[1].squeeze() * 255, atol=0.51)


def test_clips(make_pipeline):
    pipeline = make_pipeline(size=(5, 8, 8), class_names=None)
    options = dict(seeds=[0, 1], num_inference_steps=2, progress=False)
    tensor = pipeline(num=2, output_type="pt", **options).frames
    assert tensor.shape == (2, 5, 3, 8, 8)
    assert pipeline(num=2, output_type="np", **options).frames.shape == (2, 5, 8, 8, 3)
    clips = pipeline(num=2, **options).frames
    assert [len(clip) for clip in clips] == [5, 5] and clips[0][0].size == (8, 8)
    torch.testing.assert_close(
        pipeline(num=2, batch_size=1, output_type="pt", **options).frames, tensor, atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("size", [(4, 4), (3, 4, 4)], ids=["pictures", "clips"])
def test_latents_are_decoded(size, tiny_autoencoder, make_pipeline, tmp_path):
    with pytest.raises(ValueError, match="makes latents of 4 channels: give their autoencoder"):
        make_pipeline(size=size, in_channels=4)
    network = untrained_network(size=size, in_channels=4)
    latent = DiffusionPipeline(network, RectifiedFlow(), autoencoder=tiny_autoencoder)
    x = latent(num=2, seeds=[0, 1], **QUIET)[0]
    assert x.shape == ((2, 3, 8, 8) if len(size) == 2 else (2, 3, 3, 8, 8))
    latent.save_pretrained(tmp_path / "p")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "p", device="cpu")
    assert torch.equal(loaded(num=2, seeds=[0, 1], **QUIET)[0], x)
    file = tmp_path / "p" / module.NETWORK_FILE
    with pytest.raises(ValueError, match="give their autoencoder too"):
        DiffusionPipeline.from_pretrained(file, device="cpu")
    by_path = DiffusionPipeline.from_pretrained(file, device="cpu", autoencoder=tmp_path / "p" / "autoencoder")
    assert torch.equal(by_path(num=2, seeds=[0, 1], **QUIET)[0], x)
    with pytest.raises(FileNotFoundError, match="no folder of an autoencoder"):
        DiffusionPipeline.from_pretrained(file, device="cpu", autoencoder=tmp_path)
    with pytest.raises(ValueError, match="latents of 4 channels, the network takes 3"):
        DiffusionPipeline(untrained().network, RectifiedFlow(), autoencoder=tiny_autoencoder)


@pytest.mark.parametrize("kind", ["ddim", "ddpm"])
def test_pixels_are_kept_within_their_range_on_the_way_and_latents_are_not(kind, tiny_autoencoder, monkeypatch):
    objective, made = EpsilonPrediction(), []
    scheduler = objective.scheduler
    monkeypatch.setattr(objective, "scheduler", lambda *a, **k: made.append(scheduler(*a, **k)) or made[-1])
    DiffusionPipeline(untrained_network(size=(4, 4)), objective)(scheduler=kind, **QUIET | dict(num_inference_steps=4))
    latent = untrained_network(size=(4, 4), in_channels=4)
    DiffusionPipeline(latent, objective, tiny_autoencoder)(scheduler=kind, **QUIET | dict(num_inference_steps=4))
    assert [one.config.clip_sample for one in made] == [True, False]


def test_an_autoencoder_of_a_pipeline_before_is_not_taken(tiny_autoencoder, tmp_path):
    network = untrained().network
    DiffusionPipeline(untrained_network(size=(4, 4), in_channels=4), RectifiedFlow(), tiny_autoencoder).save_pretrained(
        tmp_path
    )
    DiffusionPipeline(network, RectifiedFlow()).save_pretrained(tmp_path)
    assert DiffusionPipeline.from_pretrained(tmp_path, device="cpu").autoencoder is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(num="3"), "'3' samples are asked for: a whole number"),
        (dict(num=2.5), "2.5 samples are asked for"),
        (dict(batch_size="2"), "a batch of '2' cannot be sampled: a whole number"),
        (dict(batch_size=2.5), "a batch of 2.5 cannot"),
        (dict(generator=5), "generator is a torch.Generator, or one for each sample, got 5"),
        (dict(num=2, generator=[torch.Generator(), None]), "generator is a torch.Generator"),
        (dict(guidance_scale=1e39), r"guidance 1e\+39 must be at least 0, and at most 1000"),
        (dict(guidance_scale=10**400), "guidance 10{400} must be"),
    ],
)
def test_arguments_of_other_types_are_refused(make_pipeline, options, message):
    with pytest.raises(ValueError, match=message):
        make_pipeline()(**options, **QUIET)


def test_latents_are_scaled_for_the_autoencoder(tiny_autoencoder):
    class Constant(nn.Module):
        input_size, in_channels, num_classes = (4, 4), 4, 0

        def __init__(self):
            super().__init__()
            self.value = nn.Parameter(torch.tensor(0.6))

        def forward(self, x, t, labels=None):
            return (x - self.value) / (t.view(-1, 1, 1, 1) / 1000)

    x = DiffusionPipeline(Constant(), RectifiedFlow(), tiny_autoencoder)(num=1, **QUIET).images
    with torch.no_grad():
        want = tiny_autoencoder.decode(torch.full((1, 4, 4, 4), 0.6 / tiny_autoencoder.config.scaling_factor)).sample
    torch.testing.assert_close(x, (want / 2 + 0.5).clamp(0, 1), atol=1e-5, rtol=0)


def test_a_pipeline_is_saved_and_loaded(make_pipeline, tmp_path):
    pipeline = make_pipeline(dit_debug, objective=VPrediction("cosine"))
    pipeline.save_pretrained(tmp_path / "deep" / "p")
    for path in (tmp_path / "deep" / "p", tmp_path / "deep" / "p" / module.NETWORK_FILE):
        loaded = DiffusionPipeline.from_pretrained(path, device="cpu")
        assert loaded.class_names == ["cat", "dog", "fox"]
        assert loaded.objective.config() == pipeline.objective.config()
        assert torch.equal(loaded("dog", seeds=[1], **QUIET).images, pipeline("dog", seeds=[1], **QUIET).images)
    with pytest.raises(FileNotFoundError, match="no network.safetensors in this folder"):
        DiffusionPipeline.from_pretrained(tmp_path, device="cpu")
    with pytest.raises(FileNotFoundError, match="no weights file at"):
        DiffusionPipeline.from_pretrained(tmp_path / "gone.safetensors", device="cpu")
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        (tmp_path / "text.safetensors").write_text("no weights")
        DiffusionPipeline.from_pretrained(tmp_path / "text.safetensors", device="cpu")
    with pytest.raises(NotADirectoryError, match="is a file"):
        pipeline.save_pretrained(tmp_path / "text.safetensors" / "p")


def test_class_names_must_fit(make_pipeline):
    with pytest.raises(ValueError, match="2 class names are given for a network of 3 classes"):
        make_pipeline(class_names=("a", "b"), num_classes=3)


def test_too_little_memory_says_what_is_needed(make_pipeline, monkeypatch):
    pipeline = make_pipeline()
    monkeypatch.setattr(module, "measure_peak", lambda call, device: 10**9)
    monkeypatch.setattr(module, "free_memory", lambda device: 4 * 10**9)
    sizes = []
    monkeypatch.setattr(
        DiffusionPipeline, "_batch", lambda self, s, labels, *rest: sizes.append(len(labels)) or torch.zeros(1)
    )
    list(pipeline.batches(num=7, progress=False))
    assert sizes == [3, 3, 1]  # 80 % of what is free
    with pytest.raises(
        MemoryError, match="5 of 8x8 picture at once need about 5.00 GB on cpu, 4.00 GB .* --batch-size 3"
    ):
        pipeline(num=9, batch_size=5, **QUIET)
    monkeypatch.setattr(module, "free_memory", lambda device: 10**9)
    with pytest.raises(MemoryError, match="one 8x8 picture needs about 1.00 GB on cpu, 1.00 GB are free"):
        pipeline(num=9, guidance_scale=2.0, **QUIET)
    monkeypatch.setattr(module, "free_memory", lambda device: 100)
    with pytest.raises(MemoryError, match="the weights need 0.00 GB on meta, 0.00 GB are free"):
        pipeline.to("meta")
    with pytest.raises(ValueError, match="stays in fp32; precision='bf16' of a call"):
        pipeline.to(torch.bfloat16)
    with pytest.raises(ValueError, match="'foo' is no device: cpu, cuda or cuda:N"):
        pipeline.to("foo")


def test_running_out_of_memory_is_said_in_one_line(make_pipeline):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has ...\nmore")

    pipeline = make_pipeline()
    pipeline.network.register_forward_pre_hook(fail)
    with pytest.raises(MemoryError, match="one 8x8 picture needs more memory .*, 20.00 GiB of it in one piece"):
        pipeline(num=2, **QUIET)
    pipeline._picture_bytes[pipeline.device, True, "fp32"] = 1
    with pytest.raises(MemoryError, match="out of memory on cpu with 4 at once, .* --batch-size 2"):
        pipeline(num=4, **QUIET)


def test_values_that_are_not_finite_are_refused(make_pipeline):
    pipeline = make_pipeline()
    next(pipeline.network.parameters()).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite in fp32: the weights are broken"):
        pipeline(**QUIET)


def test_bf16_is_near_fp32(make_pipeline):
    pipeline = make_pipeline()
    exact = pipeline(num=3, seeds=[0, 1, 2], **QUIET).images
    half = pipeline(num=3, seeds=[0, 1, 2], precision="bf16", **QUIET).images
    assert 0 < (half - exact).abs().max() < 0.05


def test_a_network_that_was_replaced_samples(make_pipeline):
    pipeline, other = make_pipeline(), make_pipeline()
    with torch.no_grad():
        other.network.final.linear.bias.fill_(1.0)
    pipeline.network = other.network
    torch.testing.assert_close(pipeline(num=2, seeds=[0, 1], **QUIET), other(num=2, seeds=[0, 1], **QUIET))


def test_each_batch_size_and_each_call_records_anew(make_pipeline, monkeypatch):
    pipeline, done = make_pipeline(), []
    monkeypatch.setattr(pipeline.graphs, "forget", lambda: done.append("forget"))
    monkeypatch.setattr(DiffusionPipeline, "_batch", lambda self, s, labels, *_: done.append(len(labels)))
    list(pipeline.batches(num=5, batch_size=2, progress=False))
    assert done == [2, 2, "forget", 1, "forget"]
    batches = pipeline.batches(num=5, batch_size=2, progress=False)
    next(batches)
    batches.close()  # not taken to the end
    assert done[5:] == [2, "forget"]


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("scheduler", ["euler", "dpm-solver++"])
def test_replayed_steps_are_those_of_the_network(make_pipeline, monkeypatch, guidance, scheduler):
    pipeline, replays = make_pipeline(size=(16, 16)).to("cuda"), []
    replay = torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: (replays.append(graph), replay(graph)))
    options = dict(num=5, seeds=range(5), batch_size=2, num_inference_steps=8, guidance_scale=guidance)
    options |= dict(scheduler=scheduler, precision="fp32", progress=False, output_type="pt")
    replayed = pipeline(**options).images
    assert len(replays) >= 6 + 8 + 6 and len(set(map(id, replays))) == 2
    pipeline.graphs.limit = 0
    torch.testing.assert_close(replayed, pipeline(**options).images, atol=1e-5, rtol=0)
    held = torch.cuda.memory_allocated()
    pipeline.graphs.limit = 1
    pipeline(**options)
    assert torch.cuda.memory_allocated() <= held + 2**20


@pytest.mark.gpu
def test_a_compiled_network_is_replayed(make_pipeline):
    pipeline = make_pipeline(size=(16, 16)).to("cuda")
    options = dict(num_inference_steps=8, guidance_scale=2.0, precision="bf16", progress=False, output_type="pt")
    want = [pipeline(num=n, seeds=range(n), **options).images for n in (2, 5)]
    for block in pipeline.network.blocks:
        block.compile(fullgraph=True)
    for n, images in zip((2, 5), want, strict=True):
        for pipeline.graphs.limit in (0, 1):
            got = pipeline(num=n, seeds=range(n), **options).images
            assert (got - images).abs().mean() < 0.01


@pytest.mark.gpu
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_bf16_on_a_gpu(make_pipeline, guidance):
    pipeline = make_pipeline(size=(16, 16))
    options = dict(
        num=6, seeds=range(6), guidance_scale=guidance, num_inference_steps=25, progress=False, output_type="pt"
    )
    exact = pipeline(**options).images
    pipeline.to("cuda")
    half = pipeline(precision="bf16", batch_size=4, **options).images
    assert half.isfinite().all() and (half - exact).abs().mean() < 0.05
    torch.testing.assert_close(pipeline(precision="fp32", **options).images, exact, atol=0.02, rtol=0)
    assert pipeline.default_precision == "bf16"
