"""Diffusion of images and video: DiM, its attention twin and the video U-Net, trained, sampled and measured."""
