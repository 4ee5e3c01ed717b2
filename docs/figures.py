"""Makes the figures of docs/how_it_works.md and README's animation.

Most show the bundled checkpoint.


python -m docs.figures --names loss,ema
"""

import io
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image

import train
from nets import SCHEDULES, build
from nets.samplers import seeded_noise
from nets.sampling import SamplingOptions, sampling_schedule
from nets.schedules import make_betas
from utils.checkpoint.file import load_checkpoint
from utils.data.dataset import normalize
from utils.data.image_format import ImageFormat
from utils.errors import UserError, run_script
from utils.evaluate.distances import nearest as nearest_features
from utils.evaluate.image_sets import open_images
from utils.files import atomic_write
from utils.images import make_grid, to_uint8
from utils.settings import parse, settings, text

PROJECT = Path(__file__).resolve().parent.parent
FOLDER, WEIGHTS, IMAGES = PROJECT / "docs" / "figures", PROJECT / "logs" / "emoji.pth", PROJECT / "datasets/noto_emoji"
CPU, SIZE = torch.device("cpu"), (64, 64)
FORWARD, REVERSE = "#b45309", "#1f5fa8"  # colors of the two processes
SHOWN_STEPS = (5, 8, 9, 10, 11, 12, 13, 14, 16, 24)  # of 25: what can be seen happens between the ends


def load():
    """(GaussianDiffusion, class names) of the bundled checkpoint."""
    return build.from_checkpoint(load_checkpoint(WEIGHTS))


def real_images(count=None, size=SIZE):
    """The emoji as uint8 (N, H, W, C); `count` of them, the same ones each time."""
    images = open_images(IMAGES, ImageFormat(size))
    return images.images(images.shuffled(count or 0, seed=1))


def noise_like(x, seed=0):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))


def save(name, figure, colors=64):
    """The figure as a PNG of few colors, which is small."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with atomic_write(FOLDER / f"{name}.png") as file:
        Image.open(buffer).convert("RGB").quantize(colors).save(file, format="PNG", optimize=True)
    print(FOLDER / f"{name}.png")


def panels(name, rows, row_names, column_names, colors=64):
    """A table of images: rows of (n, 3, H, W) tensors in [-1, 1]."""
    figure = Figure(figsize=(1.05 * len(column_names) + 1, 1.05 * len(rows) + 0.3), dpi=100, layout="constrained")
    places = figure.subplots(len(rows), len(column_names), squeeze=False)
    for row, title, line in zip(places, row_names, rows):
        row[0].set_ylabel(title, rotation=0, ha="right", va="center")
        for place, image in zip(row, to_uint8(line)):
            place.imshow(image)
            place.set(xticks=[], yticks=[])
    for place, title in zip(places[0], column_names):
        place.set_title(title, fontsize="medium")
    save(name, figure, colors)


def curves(name, lines, xlabel, ylabel, **axes):
    """lines: {label: (x, y)}."""
    figure = Figure(figsize=(6, 3.2), dpi=100, layout="constrained")
    place = figure.subplots()
    for label, (x, y) in lines.items():
        place.plot(x, y, label=label)
    place.set(xlabel=xlabel, ylabel=ylabel, **axes)
    place.grid(True, alpha=0.3)
    place.legend()
    save(name, figure)


def chain():
    """The Markov chain x_0 ... x_T: noise is added to the right and removed to the left."""
    diffusion, _ = load()
    names, t = ("$x_0$", "$x_{t-1}$", "$x_t$", "$x_T$"), torch.tensor([0, 420, 560, 999])
    x = normalize(real_images(9)[8:], CPU).expand(len(t), -1, -1, -1)
    figure = Figure(figsize=(8.4, 2.2), dpi=100)
    for place, image in enumerate(to_uint8(diffusion.perturb_x(x, t, noise_like(x[:1]).expand_as(x)))):
        axes = figure.add_axes((0.01 + 0.285 * place, 0.32, 0.125, 0.48))
        axes.imshow(image)
        axes.set(xticks=[], yticks=[], xlabel=names[place])
        axes.xaxis.label.set_size("large")
    for place, steps in enumerate(("...", "", "...")):
        left, right = 0.145 + 0.285 * place, 0.285 + 0.285 * place
        arrow(figure, (left, 0.66), (right, 0.66), color=FORWARD)
        arrow(figure, (right, 0.46), (left, 0.46), color=REVERSE)
        figure.text((left + right) / 2, 0.54, steps, ha="center", size="large")
    figure.text(0.5, 0.88, "forward process: $q(x_t | x_{t-1})$ adds noise", ha="center", color=FORWARD)
    figure.text(0.5, 0.05, r"reverse process: $p_\theta(x_{t-1} | x_t)$ removes it", ha="center", color=REVERSE)
    save("chain", figure)


def arrow(place, start, end, **style):
    """An arrow between two points of a figure, or of axes."""
    patch = FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=14, shrinkA=0, shrinkB=0, **style)
    if isinstance(place, Figure):
        patch.set_transform(place.transFigure)
    place.add_artist(patch)


def unet():
    """The UNet with the defaults of train.py: resolutions, channels, skip connections."""
    config = train.Config()
    figure = Figure(figsize=(8.4, 5.2), dpi=100, layout="constrained")
    axes = figure.subplots()
    axes.set(xlim=(0, 10.5), ylim=(-len(config.channel_mults) - 0.5, 1.5))
    axes.axis("off")

    def box(x, y, text, color, width=3.6):
        shape = FancyBboxPatch((x, y - 0.3), width, 0.6, boxstyle="round,pad=0.02", facecolor=color, edgecolor="black")
        axes.add_patch(shape)
        axes.text(x + width / 2, y, text, ha="center", va="center", size=8.5)

    last = len(config.channel_mults) - 1
    for level, factor in enumerate(config.channel_mults):
        attention = " with attention" if level in config.attention_resolutions else ""
        height, width = (side >> level for side in config.input_shape)
        size = f"{height}x{width}, {config.channel * factor} channels"
        for x, count in ((0.1, config.num_res_blocks), (6.8, config.num_res_blocks + 1)):
            box(x, -level, f"{count} x ResidualBlock{attention}\n{size}", "#cfe2f3")
        arrow(axes, (3.75, -level), (6.75, -level), color=REVERSE, linestyle="--")
        if level < last:
            arrow(axes, (1.9, -level - 0.33), (1.9, -level - 0.67), color="black")
            arrow(axes, (8.6, -level - 0.67), (8.6, -level - 0.33), color="black")
            axes.text(2.0, -level - 0.5, "Downsample", va="center", size=8)
            axes.text(8.5, -level - 0.5, "Upsample", va="center", ha="right", size=8)
    axes.text(5.25, 0.08, "skip connections (concatenated)", ha="center", size=8, color=REVERSE)
    box(3.45, -last - 1, "ResidualBlock with attention, ResidualBlock\n(mid)", "#fff2cc")
    arrow(axes, (1.9, -last - 0.33), (3.4, -last - 1), color="black")
    arrow(axes, (7.1, -last - 1), (8.6, -last - 0.33), color="black")
    box(0.1, 1, "$x_t$, Conv 3x3", "#eeeeee")
    box(6.8, 1, "norm, SiLU, Conv 3x3: prediction", "#eeeeee")
    arrow(axes, (1.9, 0.67), (1.9, 0.33), color="black")
    arrow(axes, (8.6, 0.33), (8.6, 0.67), color="black")
    box(4.0, 1, "$t$, PositionalEmbedding,\n2 linear layers", "#d9ead3", width=2.5)
    axes.text(5.25, 0.55, "to every ResidualBlock", ha="center", size=8, color=FORWARD)
    save("unet", figure)


def noising():
    """One image at six timesteps, by perturb_x."""
    diffusion, _ = load()
    t = torch.tensor([0, 100, 300, 500, 700, 999])
    x = normalize(real_images(1), CPU).expand(6, -1, -1, -1)
    panels("noising", [diffusion.perturb_x(x, t, noise_like(x[:1]).expand_as(x))], ["x_t"], [f"t = {n}" for n in t])


def schedules():
    """alpha_bar and the signal-to-noise ratio of each schedule."""
    figure = Figure(figsize=(8, 3.2), dpi=100, layout="constrained")
    for place, title in zip(figure.subplots(1, 2), ("alpha_bar", "signal-to-noise ratio")):
        for name in SCHEDULES:
            alpha_bar = np.cumprod(1 - make_betas(name))
            place.plot(alpha_bar if title == "alpha_bar" else alpha_bar / (1 - alpha_bar), label=name)
        place.set(title=title, xlabel="t", yscale="linear" if title == "alpha_bar" else "log")
        place.grid(True, alpha=0.3)
        place.legend()
    save("schedules", figure)


def predictions():
    """What the network gets and predicts: x_t, eps, x_0."""
    diffusion, classes = load()
    x, t = normalize(real_images(1), CPU), (100, 500, 900)
    rows = [[], [], []]
    for step in t:
        x_t = diffusion.perturb_x(x, torch.tensor([step]), noise_like(x))
        x_0 = diffusion.denoiser(torch.tensor([diffusion.null_class]))(x_t, step)
        a, s = diffusion.alpha_bars[step] ** 0.5, (1 - diffusion.alpha_bars[step]) ** 0.5
        for row, image in zip(rows, (x_t, (x_t - a * x_0) / s, x_0)):
            row.append(image)
    panels("predictions", [torch.cat(row) for row in rows], ["x_t", "eps", "x_0"], [f"t = {step}" for step in t])


def reverse():
    """The reverse process: x_t and the x_0 predicted from it, at every third of 25 steps."""
    diffusion, classes = load()
    schedule = sampling_schedule(diffusion.alpha_bars, SamplingOptions("sde-dpm++", 25))
    y = torch.tensor([classes.index("faces")])
    after, x_0 = zip(*diffusion.sample_steps(1, CPU, y, sampler="sde-dpm++", seeds=[3], guidance_scale=2))
    before = (next(seeded_noise([3], (3, *SIZE), CPU)), *after)
    rows = [torch.cat(images[:25:3]) for images in (before, x_0)]
    panels("reverse", rows, ["x_t", "x_0"], [f"t = {step.t}" for step in schedule[::3]])


def posterior():
    """The weights of x_0 and x_t in the posterior mean (Ho et al. 2020, equation 7)."""
    betas = make_betas("linear")
    alpha_bar = np.cumprod(1 - betas)
    before = np.concatenate(([1.0], alpha_bar[:-1]))
    weights = {
        "of x_0": np.sqrt(before) * betas / (1 - alpha_bar),
        "of x_t": np.sqrt(1 - betas) * (1 - before) / (1 - alpha_bar),
    }
    curves(
        "posterior",
        {name: (np.arange(1000), values) for name, values in weights.items()},
        "t",
        "weight",
        yscale="log",
        ylim=(5e-5, 2),
    )


def loss():
    """The loss of eps, and of v, over the timesteps."""
    diffusion, _ = load()
    x, ts = normalize(real_images(64), CPU), np.arange(9, 1000, 45)
    y = torch.full((len(x),), diffusion.null_class)
    v, eps = [], []
    for step in ts:
        t = torch.full((len(x),), int(step))
        with torch.no_grad():
            error = diffusion.get_losses(x, t, y, noise=noise_like(x), use_ema=True, reduction="none").mean()
        v.append(error.item() / diffusion.loss_weight[step].item())
        eps.append(v[-1] * diffusion.alpha_bars[step])  # eps = a v + s x_t
    curves("loss", {"of v": (ts, v), "of eps": (ts, eps)}, "t", "squared error", yscale="log", ylim=(1e-4, 2))


def ema(steps=240):
    """A short training at a constant learning rate: the loss of the weights, and of their EMA."""
    config = train.Config(
        input_shape=(16, 16),
        channel=16,
        channel_mults=(1, 2),
        num_res_blocks=1,
        num_groups=4,
        prediction="v",
        schedule="cosine",
        ema_start=0,
        ema_decay=0.95,
    )
    torch.manual_seed(0)
    diffusion = build.from_config(asdict(config))
    optimizer = torch.optim.Adam(diffusion.model.parameters(), lr=3e-3)
    images = normalize(real_images(size=(16, 16)), CPU)
    held_out, images = images[:128], images[128:]
    t, found = torch.arange(128) * 1000 // 128, {"the weights": [], "their EMA": []}
    for step in range(steps):
        diffusion(images[torch.randint(len(images), (16,))]).backward()
        optimizer.step()
        optimizer.zero_grad()
        diffusion.update_ema()
        if step % 8 == 7:
            for use_ema, values in enumerate(found.values()):
                with torch.no_grad():
                    value = diffusion(held_out, t=t, noise=noise_like(held_out), use_ema=bool(use_ema))
                values.append((step + 1, value.item()))
    curves(
        "ema", {name: zip(*values) for name, values in found.items()}, "step", "loss of held-out images", yscale="log"
    )


def solvers():
    """The same seed by solver and number of network calls."""
    diffusion, classes = load()
    y, names = torch.tensor([classes.index("faces")]), ("ddpm", "ddim", "dpm++", "sde-dpm++")
    rows = []
    for name in names:
        images = [diffusion.sample(1, CPU, y, sampler=name, steps=steps, seeds=[2]) for steps in (5, 10, 25, 1000)]
        rows.append(torch.cat(images))
    panels("solvers", rows, names, ["5", "10", "25", "1000"])


def guidance():
    """The same seeds at guidance scales of 1 to 5."""
    diffusion, classes = load()
    y = torch.arange(7)
    rows = [
        diffusion.sample(7, CPU, y, sampler="dpm++", steps=25, seeds=range(7), guidance_scale=scale)
        for scale in (1, 2, 3, 5)
    ]
    panels("guidance", rows, ["1", "2", "3", "5"], classes)


def forming():
    """README's animation of samples as they form: two of each class, in 48 colors."""
    diffusion, classes = load()
    y = torch.arange(len(classes)).repeat_interleave(2)
    seeds = [100 + 5 * (i // 2) + i % 2 for i in range(len(y))]  # as in predict.py's grid from seed 100
    options = {"sampler": "sde-dpm++", "seeds": seeds, "guidance_scale": 2}
    steps = [x for x, _ in diffusion.sample_steps(len(y), CPU, y, **options)]
    images = [next(seeded_noise(seeds, (3, *SIZE), CPU)), *(steps[number] for number in SHOWN_STEPS)]
    grids = [make_grid(to_uint8(x), 2) for x in images]
    first, *others = (Image.fromarray(grid).quantize(48) for grid in grids)
    with atomic_write(FOLDER.parent / "emoji_forming.gif") as file:
        times = [150] * len(others) + [2000]  # milliseconds
        first.save(file, format="GIF", save_all=True, append_images=others, duration=times, loop=0)
    print(FOLDER.parent / "emoji_forming.gif")


def nearest():
    """Samples above the training images that are nearest in pixels."""
    diffusion, classes = load()
    x = diffusion.sample(7, CPU, torch.arange(7), sampler="sde-dpm++", steps=25, seeds=range(7))
    bank = real_images()
    _, found = nearest_features(torch.from_numpy(to_uint8(x)).flatten(1), [bank.flatten(1)], 1)
    panels("nearest", [x, normalize(bank[found[:, 0]], CPU)], ["sample", "nearest"], classes)


FIGURES = {
    function.__name__: function
    for function in (
        *(chain, noising, schedules, posterior, predictions, reverse, unet, loss, ema),
        *(solvers, guidance, nearest, forming),
    )
}


@settings
class Config:
    names: str = ",".join(FIGURES)  # the figures to make, with commas between


SETTINGS = {"names": text()}


def main(arguments=None):
    names = parse(Config, SETTINGS, __doc__, arguments).names.split(",")
    unknown = [name for name in names if name not in FIGURES]
    if unknown:
        raise UserError(f"--names: unknown {', '.join(unknown)}; known: {', '.join(FIGURES)}")
    for name in names:
        FIGURES[name]()


if __name__ == "__main__":
    run_script(main)
