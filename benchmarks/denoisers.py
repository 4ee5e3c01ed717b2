"""What gives better samples of the same weights, without training? Changes of the predicted x_0.

    python -m benchmarks.denoisers --model_path logs/emoji.pth

The solver is predict.py's default. Every number is a Frechet distance as in benchmarks.solvers.
"""

import sys

from benchmarks import solvers
from benchmarks.timing import markdown
from nets.samplers import DEFAULT_STEPS
from nets.sampling import SamplingOptions, make_denoiser
from utils.device import choose_device
from utils.errors import run_script
from utils.evaluate import __main__ as evaluate
from utils.settings import PAIR, number, parse, settings, text, whole

ANY = range(33)  # the count of a tuple's values, which may be none


# fmt: off
@settings
class Config:
    model_path: str = "logs/emoji.pth"               # a checkpoint, or a run's folder
    reference: str = ""                              # its images; "": those that it was trained on
    guiding_path: str = ""                           # autoguidance: an earlier epoch_XXXX.pth of the same run; "": none
    calls: int = DEFAULT_STEPS                       # steps of the solver
    samples: int = 2000                              # per cell
    seeds: int = 2                                   # cells of each kind, each from other noise
    scales: tuple[float, ...] = (1.005, 1.01, 1.02)  # the predicted noise is divided by each
    guidances: tuple[float, ...] = (1.25, 1.5, 2.0)  # scales of guidance and of autoguidance
    interval: tuple[float, float] = (-1.0, 2.0)      # the lambdas between which guidance acts: half the log-SNR
    features: str = "classifier"                     # classifier, inception, or the file of a feature network
    batch_size: int = 100                            # images sampled at once
    device: str = "auto"                             # auto, cuda, mps or cpu
# fmt: on


SETTINGS = {
    "model_path": text(),
    "reference": text(),
    "guiding_path": text(),
    "calls": whole(1, 10**6),
    "samples": whole(2, solvers.SEED_STRIDE),
    "seeds": whole(1, 100),
    "scales": number(0.1, 10, count=ANY),
    "guidances": number(0, 1000, count=ANY),
    "interval": number(-1000, 1000, count=PAIR),
    "features": text(),
    "batch_size": whole(1),
    "device": text(),
}


def main(arguments=None):
    config = parse(Config, SETTINGS, __doc__, arguments)
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

    def plain(y, **options):
        return make_denoiser(diffusion, y, SamplingOptions(**options))

    def scaled(scale):
        """The predicted noise divided by `scale` (Ning et al. 2024, "ADM-ES")."""

        def denoiser(y):
            denoise = plain(y, clip=False)

            def change(x, t):
                a = diffusion.alpha_bars[t] ** 0.5
                return ((x - (x - a * denoise(x, t)) / scale) / a).clamp(-1, 1)

            return change

        return denoiser

    def guided(**guidance):
        return lambda y: plain(y, **guidance)

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
