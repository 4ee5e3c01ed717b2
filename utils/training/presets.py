"""Presets of train.py: sets of settings by one name. Precedence: command line > preset > Config.

benchmarks/recipes.py and benchmarks/time_to_quality.py measure them (benchmarks/NOTES.md).
"""

# fmt: off
PRESETS = {
    "": {},  # the article's settings, the defaults in Config
    # Minutes without a GPU. v with the cosine schedule learns soonest, Muon makes most of a step,
    # and a narrow network and small batches leave time for many. Short runs need an early EMA.
    "quick": {
        "channel": 32, "num_res_blocks": 1, "dropout": 0.0, "prediction": "v", "schedule": "cosine",
        "epochs": 8, "batch_size": 16, "init_lr": 1.2e-3, "warmup": 0.01,
        "optimizer_type": "muon", "ema_start": 100,
    },
    # An hour on one core, minutes on a GPU: more channels where the images are small, and batches
    # that make Muon's part of the time small. The bundled checkpoint began with it. 60 epochs
    # suit a few thousand images.
    "small": {
        "channel": 32, "channel_mults": (1, 2, 4, 4), "num_res_blocks": 1, "attention_resolutions": (2,),
        "dropout": 0.0, "prediction": "v", "schedule": "cosine",
        "epochs": 60, "batch_size": 32, "init_lr": 1.4e-3, "optimizer_type": "muon", "ema_start": 100,
        "ema_decay": 0.999,
    },
    # Photographs on one GPU, 500 to 70,000 of them. Published recipes agree on attention at 16x16
    # alone, v with the cosine schedule, which images above 64x64 shift by log(64 / size) (Hoogeboom
    # et al. 2023, "simple diffusion", section 3.1), and dropout below 20,000 images. A shorter EMA
    # than the article's, as there are fewer steps. A few images make many short epochs: the files
    # kept are the last three. Not yet measured on a GPU.
    "photo64": {
        "input_shape": (64, 64), "channel": 64, "channel_mults": (1, 2, 4, 4), "attention_resolutions": (2,),
        "dropout": 0.1, "prediction": "v", "schedule": "cosine",
        "steps": 50_000, "batch_size": 64, "ema_decay": 0.9995, "save_period": 100, "keep_last": 3,
    },
    "photo128": {
        "input_shape": (128, 128), "channel": 64, "channel_mults": (1, 2, 2, 4, 4), "attention_resolutions": (3,),
        "dropout": 0.1, "prediction": "v", "schedule": "cosine", "schedule_shift": -0.69,
        "steps": 100_000, "batch_size": 32, "ema_decay": 0.9995, "save_period": 100, "keep_last": 3,
    },
}
# fmt: on
