task = "restoration"
custom_imports = dict(imports=["mambavision.restoration.register"])
default_scope = "mmengine"

model = dict(type="Restorer", loss=dict(type="CharbonnierLoss", eps=1e-3))

default_hooks = dict(
    runtime_info=dict(type="DeferredRuntimeInfoHook", interval=50),  # of logger and LossCurveHook, or a part of it
    timer=dict(type="IterTimerHook"),
    logger=dict(type="LoggerHook", interval=50, log_metric_by_epoch=False),
    param_scheduler=dict(type="ParamSchedulerHook"),
    checkpoint=dict(
        type="AtomicCheckpointHook", by_epoch=False, interval=1000, max_keep_ckpts=2, save_best="auto", rule="greater"
    ),
    sampler_seed=None,
)
custom_hooks = [
    # decay 0.999 * (1 - exp(-t / 300))
    dict(type="EMAHook", ema_type="FusedExpMomentumEMA", momentum=1e-3, gamma=300, update_buffers=True),
    dict(type="CudaGraphHook"),
    dict(type="LossCurveHook", interval=50),
]
env_cfg = dict(
    cudnn_benchmark=False,  # test photos come in many sizes
    mp_cfg=dict(mp_start_method="fork", opencv_num_threads=0),
    dist_cfg=dict(backend="nccl"),
)
vis_backends = [dict(type="LocalVisBackend")]
visualizer = dict(type="Visualizer", vis_backends=vis_backends, name="visualizer")
log_processor = dict(type="LogProcessor", window_size=50, by_epoch=False)
log_level = "INFO"
load_from = None
resume = False
