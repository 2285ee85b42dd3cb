"""Drawn clips and the video U-Net together."""

import pytest
import torch
from mmengine.registry import MODELS

from mambavision.backbones.video_unet import video_unet_debug
from mambavision.diffusion import register  # noqa: F401
from mambavision.diffusion.batches import NoisyBatches
from mambavision.diffusion.generated import BouncingShapes, MovingDigits
from tests.diffusion.conftest import untrained


@pytest.mark.parametrize(("kind", "channels", "classes"), [(MovingDigits, 1, 0), (BouncingShapes, 3, 3)])
def test_a_video_u_net_learns_drawn_clips(kind, channels, classes):
    torch.manual_seed(0)
    batches = NoisyBatches(kind(4, (4, 16, 16)), 4, device="cpu")
    network = dict(type="video_unet_debug", input_size=(4, 16, 16), in_channels=channels, num_classes=classes)
    model = MODELS.build(dict(type="Diffusion", network=network, objective=dict(type="RectifiedFlow")))
    optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for i in range(25):
        loss = model(**batches.batch(i % 3), mode="loss")["loss"]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_clips_are_sampled():
    pipeline = untrained(video_unet_debug, (3, 8, 8), class_names=("disc", "square"))
    clips = pipeline(["disc", "square"], num_inference_steps=2, output_type="np", seeds=[0, 1], progress=False)
    alone = pipeline(["square"], num_inference_steps=2, output_type="np", seeds=[1], progress=False)
    assert clips.frames.shape == (2, 3, 8, 8, 3)
    assert abs(clips.frames[1] - alone.frames[0]).max() < 1e-3
