"""What draws better from the same weights, without training? Changes of the predicted x_0, tabled.

    python -m benchmarks.denoisers --model_path logs/emoji.pth

The solver is predict.py's default. Every number is a Frechet distance as in benchmarks.solvers.
"""

import sys

from utils.config import check_values, parse_config, settings

from benchmarks import solvers
from benchmarks.timing import markdown
from nets.samplers import DEFAULT_STEPS
from nets.sampling import SamplingOptions, make_denoiser
from utils.device import choose_device
from utils.errors import run_script
from utils.evaluate import __main__ as evaluate


@settings
class Config:
    model_path: str = "logs/emoji.pth"  # a checkpoint, or a run's folder
    reference: str = ""  # its pictures; "": the list that it was trained on
    guiding_path: str = ""  # an earlier epoch_XXXX.pth of the same run, for autoguidance; "": without
    calls: int = DEFAULT_STEPS  # steps of the solver
    samples: int = 2000  # pictures a cell
    seeds: int = 2  # cells of each kind, each from other noise
    scales: tuple[float, ...] = (1.005, 1.01, 1.02)  # of the predicted noise, which is divided by them
    guidances: tuple[float, ...] = (1.25, 1.5, 2.0)  # weights of guidance and autoguidance
    # lambda between which guidance acts: half the logarithm of the signal-to-noise ratio
    interval: tuple[float, float] = (-1.0, 2.0)
    features: str = "classifier"  # classifier, inception, or the file of a feature net
    batch_size: int = 100  # pictures drawn at once
    device: str = "auto"  # auto, cuda, mps or cpu


def main(arguments=None):
    config = parse_config(Config, __doc__, arguments)
    check_values(config, calls=(1, None), samples=(2, None), seeds=(1, None), batch_size=(1, None), scales=(0.1, None))
    device = choose_device(config.device)
    bench = solvers.Bench(
        solvers.Config(
            model_path=config.model_path,
            reference=config.reference,
            samples=config.samples,
            features=config.features,
            batch_size=config.batch_size,
        ),
        device,
    )
    both = evaluate.Config(samples=config.model_path, guiding_path=config.guiding_path)
    guide = evaluate.load_model(both, device, bench.precision).guide
    rows = []
    try:
        for name, denoiser in denoisers(config, bench.model.diffusion, guide).items():
            cells = (
                solvers.Cell("sde-dpm++", "clipped_logsnr", config.calls, config.calls, seed)
                for seed in range(config.seeds)
            )
            rows.append((name, *(f"{bench.measure(cell, denoiser)['distance']:.3f}" for cell in cells)))
            print(*rows[-1], file=sys.stderr, flush=True)
    finally:  # what was measured before Ctrl-C
        print(markdown(("x_0", *(f"seed {seed}" for seed in range(config.seeds))), rows))


def denoisers(config, diffusion, guide):
    """{name: function of the labels that takes the place of make_denoiser}."""

    def plain(y, **settings):
        return make_denoiser(diffusion, y, SamplingOptions().override(**settings))

    def scaled(scale):
        """The predicted noise divided by `scale` (Ning et al. 2024, "ADM-ES")."""

        def denoiser(y, *_):
            denoise = plain(y, clip=False)

            def change(x, t):
                a = diffusion.alpha_bars[t] ** 0.5
                return ((x - (x - a * denoise(x, t)) / scale) / a).clamp(-1, 1)

            return change

        return denoiser

    def guided(**guidance):
        return lambda y, *_: plain(y, **guidance)

    found = {"as predicted": guided()} | {f"noise / {scale:g}": scaled(scale) for scale in config.scales}
    where = "{:g} < lambda < {:g}".format(*config.interval)
    for name, model in (("guidance", None), ("autoguidance", guide)):
        if model or (name == "guidance" and diffusion.null_class is not None):
            for weight in config.guidances:
                settings = {"guidance_scale": weight, "guiding_model": model}
                found[f"{name} {weight:g}"] = guided(**settings)
                found[f"{name} {weight:g}, {where}"] = guided(**settings, guidance_interval=config.interval)
    return found


if __name__ == "__main__":
    run_script(main)
