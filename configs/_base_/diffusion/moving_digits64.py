_base_ = "evaluation.py"

# drawn when the run begins: 2000 clips of 64 frames, 131 MB
clips = (64, 32, 32)
train_dataloader = dict(dataset=dict(type="MovingDigits", num=2000, size=clips), batch_size=4)
held_out = dict(type="MovingDigits", num=64, size=clips, seed=1)
val_dataloader = dict(dataset=dict(dataset=held_out, batch_size=8))
test_dataloader = dict(dataset=dict(dataset=held_out, batch_size=8))
