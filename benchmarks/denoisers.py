"""What draws better from the same weights, without training? Changes of the predicted x_0, tabled.

    python -m benchmarks.denoisers --model_path logs/emoji.pth

The solver is predict.py's default. Every number is a Frechet distance as in benchmarks.solvers.
"""
import math
import sys
from functools import partial

from benchmarks import solvers
from benchmarks.timing import markdown
from nets.samplers import DEFAULT_STEPS, half_log_snr
from utils.config import check_values, parse_config, settings
from utils.device import choose_device
from utils.errors import run_script
from utils.evaluate import __main__ as evaluate


@settings
class Config:
    model_path: str = "logs/emoji.pth"    # a checkpoint, or a run's folder
    reference: str = ""                   # its pictures; "": the list that it was trained on
    weaker: str = ""                      # an earlier epoch_XXXX.pth of the same kind, for autoguidance; "": without
    calls: int = DEFAULT_STEPS            # steps of the solver
    samples: int = 2000                   # pictures a cell
    seeds: int = 2                        # cells of each kind, each from other noise
    scales: tuple[float, ...] = (1.005, 1.01, 1.02)  # of the predicted noise, which is divided by them
    guidances: tuple[float, ...] = (1.25, 1.5, 2.0)  # weights of guidance and autoguidance
    # lambda between which guidance acts: half the logarithm of the signal-to-noise ratio
    interval: tuple[float, float] = (-1.0, 2.0)
    features: str = "classifier"          # classifier, inception, or the file of a feature net
    batch_size: int = 100                 # pictures drawn at once
    device: str = "auto"                  # auto, cuda, mps or cpu


def main(arguments=None):
    config = parse_config(Config, __doc__, arguments)
    check_values(config, calls=(1, None), samples=(2, None), seeds=(1, None), batch_size=(1, None), scales=(0.1, None))
    if config.interval[0] >= config.interval[1]:
        raise ValueError(f"interval goes from the lower lambda to the higher, not {config.interval}")
    device = choose_device(config.device)
    bench = solvers.Bench(solvers.Config(
        model_path=config.model_path, reference=config.reference, samples=config.samples, features=config.features,
        batch_size=config.batch_size), device)  # fmt: skip
    weaker = load_weaker(config.weaker, bench) if config.weaker else None
    rows = []
    try:
        for name, denoiser in denoisers(config, bench.model.diffusion, weaker).items():
            cells = (solvers.Cell("sde-dpm++", "clipped_logsnr", config.calls, config.calls, seed)
                     for seed in range(config.seeds))
            rows.append((name, *(f"{bench.measure(cell, denoiser)['distance']:.3f}" for cell in cells)))
            print(*rows[-1], file=sys.stderr, flush=True)
    finally:  # what was measured before Ctrl-C
        print(markdown(("x_0", *(f"seed {seed}" for seed in range(config.seeds))), rows))


def load_weaker(path, bench):
    """The diffusion of a checkpoint. ValueError for other timesteps, size or classes."""
    weaker = evaluate.load_model(evaluate.Config(samples=path), bench.device, bench.precision)
    other, own = weaker.diffusion, bench.model.diffusion
    for name in ("img_size", "img_channels", "num_classes", "alpha_bars"):
        if getattr(other, name) != getattr(own, name):
            raise ValueError(f"{path} has another {name} than the model: take an earlier file of the same run")
    if weaker.classes != bench.model.classes:
        raise ValueError(f"{path} has other classes than the model: take an earlier file of the same run")
    return other


def denoisers(config, diffusion, weaker):
    """{name: function that takes the place of diffusion.denoiser}."""
    plain, lambdas = diffusion.denoiser, [half_log_snr(alpha_bar) for alpha_bar in diffusion.alpha_bars]

    def changed(change):
        """Classes y -> denoise, whose x_0 `change` makes of the network's, given x_t, t and y."""

        def denoiser(y, *_):
            denoise = plain(y, clip=False)
            return lambda x, t: change(denoise(x, t), x, t, y).clamp(-1, 1)

        return denoiser

    def scaled(scale):
        """The predicted noise divided by `scale` (Ning et al. 2024, "ADM-ES")."""

        def change(x_0, x, t, y):
            a = diffusion.alpha_bars[t] ** 0.5
            return (x - (x - a * x_0) / scale) / a

        return changed(change)

    def guided(other, weight, lowest=-math.inf, highest=math.inf):
        """other(y) is the denoiser that the result is pushed away from, where lambda is between."""

        def change(x_0, x, t, y):
            if not lowest <= lambdas[t] <= highest:
                return x_0
            away = other(y)(x, t)
            return away + weight * (x_0 - away)

        return changed(change)

    found = {"as predicted": changed(lambda x_0, *_: x_0)}
    found |= {f"noise / {scale:g}": scaled(scale) for scale in config.scales}
    if diffusion.null_class is not None:
        null = plain(None, clip=False)
        for weight in config.guidances:
            found[f"guidance {weight:g}"] = guided(lambda y: null, weight)
            found[f"guidance {weight:g}, {config.interval[0]:g} < lambda < {config.interval[1]:g}"] = guided(
                lambda y: null, weight, *config.interval)  # fmt: skip
    if weaker:
        found |= {f"autoguidance {weight:g}": guided(partial(weaker.denoiser, clip=False), weight)
                  for weight in config.guidances}
    return found


if __name__ == "__main__":
    run_script(main)
