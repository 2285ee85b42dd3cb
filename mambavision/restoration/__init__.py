"""Image restoration: denoising, deblurring, super-resolution, JPEG artefacts, inpainting."""
