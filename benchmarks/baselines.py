"""This project and the baselines: each trains one step, takes one denoising step and samples, on
the same images.

All have the same widths, blocks, dropout and batch. Ours takes what train.py would choose for the
device. diffusers runs the loop of its unconditional training example (AdamW, its EMA, files decoded
and augmented every epoch, the loss read every step; bf16 as its option on a GPU, float32 on a CPU,
and bf16 there too as a baseline of its own); denoising-diffusion-pytorch runs its own Trainer, in
float32 on a CPU unless `cpu_precision` says otherwise. A package that is missing is a
ModuleNotFoundError here.
"""

import copy
import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

import train
from benchmarks.timing import quiet
from utils.data.annotation import write_annotation
from utils.data.dataset import epoch_batches, normalize
from utils.data.search import find_images
from utils.device import autocast, choose_compile, choose_precision, memory_format, round_weights
from utils.training.optimizer import learning_rate

MULTS = (1, 2, 2, 2)


@dataclass
class Job:
    """What is trained and where."""

    device: torch.device
    channel: int
    size: int
    batch_size: int
    dropout: float
    images: Path  # folder of images, size x size each
    scratch: Path
    img_channels: int = 3
    # Of the baselines. None: what their example or README has.
    init_lr: float | None = None
    groups: int = 32  # diffusers' default; denoising-diffusion-pytorch has RMSNorm, without groups
    flips: bool = True  # both flip by default


def forever(make_iterator):
    while True:
        yield from make_iterator()


def prepare_training(asked):
    """(Config, TrainContext) of train.py's settings, as its `main` makes them."""
    with quiet():
        config, device = train.resolve(asked)
        config = replace(config, compile=choose_compile(config.compile, device, math.inf))
        context = train.prepare(config, device, None, train.saved_settings(asked, config, []))
    if config.compile:
        context.diffusion.model.compile()
    return config, context


class Ours:
    """This project: the step of train.py's loop and the sampling of predict.py."""

    name = "this project"

    def __init__(self, job):
        self.job = job
        paths = find_images(job.images)
        write_annotation(job.scratch / "train_lines.txt", paths)
        self.config = train.Config(
            annotation_path=str(job.scratch / "train_lines.txt"),
            input_shape=(job.size, job.size),
            channel=job.channel,
            dropout=job.dropout,
            batch_size=job.batch_size,
            device=job.device.type,
            img_channels=job.img_channels,
            num_groups=32,  # as diffusers has
        )
        self.config, self.context = prepare_training(self.config)
        self.precision, self.diffusion = self.config.precision, self.context.diffusion
        self.network = self.diffusion.model
        self.batches, self.step = forever(self.epoch), 0

    def epoch(self):
        batches = epoch_batches(len(self.context.dataset), self.context.batch_size, seed=0, epoch=self.step)
        return self.context.dataset.batches(batches, pin_memory=self.job.device.type == "cuda")

    def train_step(self):
        """A batch and the step of train.py's loop."""
        images, labels = next(self.batches)
        lr = learning_rate(
            self.step, 10_000, self.config.init_lr, self.config.min_lr, self.config.warmup, self.config.lr_decay_type
        )
        train.train_step(self.config, self.context, images, labels, 0, self.step * self.context.batch_size, lr)
        self.context.meter.latest()
        self.step += 1

    @functools.cached_property
    def sampling(self):
        """The diffusion as predict.py samples from it."""
        sampling = copy.deepcopy(self.diffusion).to(memory_format=memory_format(self.job.device, self.precision))
        round_weights(sampling.ema_model, self.precision)
        if self.config.compile:
            sampling.ema_model.compile()
        return sampling

    def denoise_step(self):
        """One step of ddpm, as `sample` takes it."""
        if not hasattr(self, "steps"):
            self.steps = forever(
                lambda: self.sampling.sample_steps(self.job.batch_size, self.job.device, sampler="ddpm")
            )
        with autocast(self.job.device, self.precision):
            next(self.steps)

    def sample(self, count):
        """`count` images as predict.py samples them. Returns the fraction of the job: all of it."""
        with autocast(self.job.device, self.precision):
            self.sampling.sample(count, self.job.device, sampler="sde-dpm++", steps=25, seeds=range(count))
        return 1.0

    def batch(self):
        images, _ = next(self.batches)
        return normalize(images, self.job.device, None, self.context.layout)


class Files(torch.utils.data.Dataset):
    """The dataset of diffusers' example: it opens, augments and normalizes an image per access."""

    def __init__(self, folder, size, img_channels, flips=True):
        from torchvision import transforms

        self.mode = "L" if img_channels == 1 else "RGB"
        self.paths = find_images(folder)
        self.transform = transforms.Compose(
            [
                transforms.Resize(size, interpolation=transforms.InterpolationMode.BILINEAR),
                transforms.CenterCrop(size),
                transforms.RandomHorizontalFlip(0.5 if flips else 0.0),
                transforms.ToTensor(),
                transforms.Normalize([0.5], [0.5]),
            ]
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        from PIL import Image

        return self.transform(Image.open(self.paths[index]).convert(self.mode))


class Diffusers:
    """diffusers: UNet2DModel in the loop of examples/unconditional_image_generation."""

    name = "diffusers"
    cpu_precision, init_lr = "fp32", 1e-4

    def __init__(self, job):
        from accelerate import Accelerator
        from diffusers import DDPMScheduler, UNet2DModel
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.job = job
        gpu = job.device.type == "cuda"
        self.precision = "bf16" if gpu else self.cpu_precision
        self.accelerator = Accelerator(mixed_precision="bf16" if gpu else "no", cpu=not gpu)
        down, up = ["DownBlock2D"] * len(MULTS), ["UpBlock2D"] * len(MULTS)
        down[1], up[-2] = "AttnDownBlock2D", "AttnUpBlock2D"
        model = UNet2DModel(
            sample_size=job.size,
            in_channels=job.img_channels,
            out_channels=job.img_channels,
            layers_per_block=2,
            block_out_channels=tuple(job.channel * mult for mult in MULTS),
            dropout=job.dropout,
            norm_num_groups=job.groups,
            down_block_types=tuple(down),
            up_block_types=tuple(up),
            attention_head_dim=None,
        )
        self.ema = EMAModel(
            model.parameters(),
            decay=0.9999,
            use_ema_warmup=True,
            inv_gamma=1.0,
            power=0.75,
            model_cls=UNet2DModel,
            model_config=model.config,
        )
        self.scheduler = DDPMScheduler(num_train_timesteps=1000)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=job.init_lr or self.init_lr, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        files = Files(job.images, job.size, job.img_channels, job.flips)
        loader = torch.utils.data.DataLoader(files, batch_size=job.batch_size, shuffle=True, drop_last=True)
        rate = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=10_000)
        self.model, self.optimizer, self.loader, self.rate = self.accelerator.prepare(model, optimizer, loader, rate)
        self.ema.to(self.accelerator.device)
        self.network = model
        self.batches = forever(lambda: self.loader)
        self.generator = torch.Generator(job.device).manual_seed(0)

    def train_step(self):
        self.model.train()
        images = next(self.batches)
        noise = torch.randn(images.shape, device=images.device)
        t = torch.randint(0, 1000, (len(images),), device=images.device, dtype=torch.int64)
        noisy = self.scheduler.add_noise(images, noise, t)
        # On a GPU the accelerator does this by itself.
        with self.accelerator.accumulate(self.model):
            with autocast(self.job.device, self.precision):
                loss = nn.functional.mse_loss(self.model(noisy, t).sample.float(), noise.float())
            self.accelerator.backward(loss)
            if self.accelerator.sync_gradients:
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.rate.step()
            self.optimizer.zero_grad()
        if self.accelerator.sync_gradients:
            self.ema.step(self.model.parameters())
        return loss.detach().item()

    @torch.no_grad()
    def denoise_step(self):
        """One step of DDPMPipeline's loop."""
        if not hasattr(self, "x"):
            self.network.eval()
            self.x = torch.randn(self.job.batch_size, 3, self.job.size, self.job.size, device=self.job.device)
        with autocast(self.job.device, self.precision):
            predicted = self.network(self.x, 500).sample
        self.scheduler.step(predicted, 500, self.x, generator=self.generator)

    def sample(self, count, steps=5):
        """`count` images by DDPMPipeline with `steps` of its 1000 steps, which are all alike.

        Returns the fraction of the job.
        """
        from diffusers import DDPMPipeline, DDPMScheduler

        pipeline = DDPMPipeline(unet=self.network, scheduler=DDPMScheduler(num_train_timesteps=1000))
        pipeline.set_progress_bar_config(disable=True)
        with autocast(self.job.device, self.precision):
            pipeline(batch_size=count, num_inference_steps=steps, generator=torch.manual_seed(0))
        return steps / 1000

    def batch(self):
        return next(self.batches)


class DiffusersHalf(Diffusers):
    """The same in bf16 on a CPU too, which its example leaves to the user to ask for."""

    name = "diffusers, told to use bf16"
    cpu_precision = "bf16"


class Lucidrains:
    """denoising-diffusion-pytorch: Unet, GaussianDiffusion and Trainer as in its README."""

    name = "denoising-diffusion-pytorch"
    cpu_precision, init_lr = "fp32", 8e-5

    def __init__(self, job):
        from denoising_diffusion_pytorch import GaussianDiffusion, Trainer, Unet

        self.job = job
        self.network = Unet(
            dim=job.channel, dim_mults=MULTS, dropout=job.dropout, channels=job.img_channels, flash_attn=True
        )
        diffusion = GaussianDiffusion(self.network, image_size=job.size, timesteps=1000).to(job.device)
        self.precision = "bf16" if job.device.type == "cuda" else self.cpu_precision
        self.trainer = Trainer(
            diffusion,
            str(job.images),
            train_batch_size=job.batch_size,
            augment_horizontal_flip=job.flips,
            train_lr=job.init_lr or self.init_lr,
            train_num_steps=0,
            calculate_fid=False,
            amp=self.precision == "bf16",
            mixed_precision_type="bf16",
            save_and_sample_every=10**9,
            results_folder=str(job.scratch / "results"),
        )
        self.diffusion = diffusion

    def train_step(self):
        self.trainer.train_num_steps = self.trainer.step + 1
        with quiet():
            self.trainer.train()

    @torch.inference_mode()
    def denoise_step(self):
        if not hasattr(self, "x"):
            self.diffusion.eval()
            self.x = torch.randn(self.job.batch_size, 3, self.job.size, self.job.size, device=self.job.device)
        with self.trainer.accelerator.autocast():
            self.diffusion.p_sample(self.x, 500)

    @torch.inference_mode()
    def sample(self, count, steps=5):
        """`steps` of its 1000 steps for `count` images."""
        self.diffusion.eval()
        x = torch.randn(count, 3, self.job.size, self.job.size, device=self.job.device)
        with self.trainer.accelerator.autocast():
            for t in range(999, 999 - steps, -1):
                x, _ = self.diffusion.p_sample(x, t)
        return steps / 1000

    def batch(self):
        return next(self.trainer.dl)


IMPLEMENTATIONS = {kind.name: kind for kind in (Ours, Diffusers, DiffusersHalf, Lucidrains)}


def installed(job):
    """The implementations that can run here, built; a line for each that cannot."""
    built = {}
    for name, kind in IMPLEMENTATIONS.items():
        if kind is DiffusersHalf and (job.device.type == "cuda" or choose_precision("auto", job.device) == "fp32"):
            continue  # it would be Diffusers again, or slower
        try:
            built[name] = kind(job)
        except ImportError as error:
            print(f"left out: {name} ({error}); pip install -r benchmarks/requirements.txt")
    return built
