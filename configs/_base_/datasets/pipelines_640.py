train_pipeline = [
    dict(type="MosaicAffine", size=640, scale=(0.5, 1.5), translate=0.1),
    dict(type="HSVGain", hue=0.015, saturation=0.7, value=0.4),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
test_pipeline = [
    dict(type="LoadPhoto"),
    dict(type="LetterBox", size=640, rect=True),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape", "scale_factor", "pad_param")),
]
