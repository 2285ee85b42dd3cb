"""Diffusion: images and videos from noise."""
