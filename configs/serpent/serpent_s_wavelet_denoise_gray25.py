_base_ = "serpent_s_denoise_gray25.py"

# the other form of the multi-scale core: a scan of Haar bands
network = dict(
    _delete_=True,
    type="Serpent",
    in_channels=1,
    dims=(64, 64, 96),
    depths=(1, 2, 2),
    refinement=1,
    d_state=(1, 1, 1),
    mixer="wavelet",
    strides=(2, 2, 2),
)
model = dict(network=network)
