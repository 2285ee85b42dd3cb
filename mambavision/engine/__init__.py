"""What mmengine lacks here: safe and atomic checkpoints, and the OpenMMLab libraries on mmcv-lite."""
