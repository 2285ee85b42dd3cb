_base_ = "./mamba_yolo_t_8xb64_300e_coco.py"

# 1 GPU x 64 images: same rate, since the loss is a sum over the batch; weight decay follows the batch by itself
