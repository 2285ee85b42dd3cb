data_advice = "tools/prepare_restoration_data.py makes it (see its --help), or name yours with --data-root"
# Whole photos, one at a time; the config of a task gives the sets.
val_dataloader = dict(
    batch_size=1,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=False),
    collate_fn=dict(type="default_collate"),
    dataset=dict(type="EvaluationSets"),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="RestorationMetric")
test_evaluator = val_evaluator
