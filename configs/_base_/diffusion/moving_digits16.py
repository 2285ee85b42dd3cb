_base_ = "evaluation.py"

# drawn when the run begins: 4000 clips of 16 frames, 66 MB
clips = (16, 32, 32)
train_dataloader = dict(dataset=dict(type="MovingDigits", num=4000, size=clips), batch_size=8)
held_out = dict(type="MovingDigits", num=128, size=clips, seed=1)
val_dataloader = dict(dataset=dict(dataset=held_out, batch_size=32))
test_dataloader = dict(dataset=dict(dataset=held_out, batch_size=32))
