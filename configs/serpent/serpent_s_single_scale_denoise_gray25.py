_base_ = "serpent_s_denoise_gray25.py"

# for comparison: every scan runs over the pixels of its level, none at a stride
network = dict(
    _delete_=True,
    type="Serpent",
    in_channels=1,
    dims=(64, 64, 96),
    depths=(1, 2, 2),
    refinement=1,
    d_state=(1, 1, 1),
    mixer="strided",
    strides=(1, 1, 1),
)
model = dict(network=network)
