task = "diffusion"
custom_imports = dict(imports=["mambavision.diffusion.register"])
default_scope = "mmengine"

default_hooks = dict(
    runtime_info=dict(type="DeferredRuntimeInfoHook", interval=50),  # of logger and LossCurveHook, or a part of it
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="AtomicCheckpointHook",
        by_epoch=False,
        interval=2000,
        max_keep_ckpts=1,
        save_best="held_out/loss",
        rule="less",
    ),
    sampler_seed=None,
)
env_cfg = dict(
    cudnn_benchmark=False,
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="Visualizer", vis_backends=vis_backends, name="visualizer")
# mmengine's own pattern takes in held_out/loss, and logs its mean over all validations so far
averaged = r"^((train|val|test)/)?(loss|time|data_time|grad_norm)$"
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=False, mean_pattern=averaged)
log_level = "INFO"
load_from = None
resume = False
