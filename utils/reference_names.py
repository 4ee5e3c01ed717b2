"""The reference's settings that have another name or meaning here."""

REFERENCE_NAMES = {
    "Cuda": "device: auto takes a GPU where there is one",
    "cuda": "device: auto takes a GPU where there is one",
    "fp16": "precision: auto chooses; fp16, bf16 or fp32 to decide",
    "distributed": "nothing: start with torchrun --nproc_per_node N train.py",
    "sync_bn": "nothing: the network has group norm",
    "diffusion_model_path": "start_from (weights for a new run) or resume (the whole run)",
    "Init_Epoch": "resume: a run continues at the epoch where it was",
    "Epoch": "epochs",
    "Init_lr": "init_lr, the highest learning rate",
    "Min_lr": "min_lr, the last learning rate itself, not a fraction of Init_lr",
    "sample_size": "input_shape, height and width",
    "train_annotation_path": "annotation_path",
    "save_path_5x5": "save_dir of predict.py, a folder",
    "save_path_1x1": "save_dir of predict.py, a folder",
}
