# The loss on held-out items, whole batches of them at a time; the config of a data set gives the items.
val_dataloader = dict(
    batch_size=None,
    num_workers=0,
    collate_fn=dict(type="whole_batch"),
    sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="HeldOutBatches", batch_size=250),
)
test_dataloader = val_dataloader
val_evaluator = dict(type="HeldOutLoss")
test_evaluator = val_evaluator
