"""report.html: an HTML report of a run, from its files alone.

usage: python -m utils.report [logs/<run>]    (without a run: the newest in logs/)
"""

import ast
import base64
import csv
import html
import json
import sys
from contextlib import suppress
from pathlib import Path

from utils.checkpoint.runs import SUMMARY, newest_weights
from utils.errors import UserError, run_script
from utils.files import atomic_write, read_json, remove_leftovers
from utils.settings import expand_home

SCRIPT = Path(__file__).resolve().parent.parent / "train.py"
PREVIEW_BYTES, MOST_PREVIEWS = 2_500_000, 40
GRID, EVALUATION = Path("results/predict_out/predict_5x5_results.png"), Path("results/evaluate_out")
HEAD = """<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{name}</title><style>{style}</style>
<meta name="viewport" content="width=device-width, initial-scale=1"><h1>Run {name}</h1>{body}</html>"""
STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:auto;padding:1rem;overflow-wrap:anywhere}
img{max-width:100%;height:auto;background:#fff}.pixels{image-rendering:pixelated;width:min(100%,34rem)}input{width:100%}
td{border-bottom:1px solid #bbb;padding:.2rem .8rem .2rem 0}.warn{border-left:4px solid #d80;padding-left:.6rem}
p{overflow-x:auto}pre{white-space:pre-wrap}.curves{max-width:none;width:max(100%,40rem)}"""
SLIDER = """<p id="when">{shown[0]}</p><input id="time" type="range" min="0" max="{last}" value="{last}">
<p><img id="preview" class="pixels" alt="preview" src="{shown[1]}"></p><script>const frames={frames};
document.getElementById("time").oninput=e=>{{const [name,image]=frames[e.target.value];
document.getElementById("when").textContent=name;document.getElementById("preview").src=image}}</script>"""

CURVES = """<p>loss is the mean of an epoch, and loss_t1 to loss_t4 that of a quarter of the timesteps each, from low
to high noise. It falls fast at first and slowly ever after, while samples still improve: judge by samples or a
distance. val_loss rising while loss falls is memorization. A grad_norm that jumps calls for a lower init_lr.</p>"""


def main(arguments=None):
    words = list(sys.argv[1:] if arguments is None else arguments)
    if {"-h", "--help"}.intersection(words):
        return print(__doc__)
    newest = next((path.parent for path in newest_weights("logs")), Path("logs"))
    folder = Path(expand_home(words[0])) if words else newest
    if len(words) > 1 or read_json(folder / "config.json") is None:
        raise UserError(f"{folder}: no run with a sound config.json: python -m utils.report logs/<run>")
    remove_leftovers(folder, "report.html")
    with atomic_write(folder / "report.html", "w", encoding="utf-8", errors="backslashreplace") as file:
        file.write(page(folder))
    return print((folder / "report.html").resolve())


def page(folder):
    """The whole page as text. What comes from a file is escaped."""
    config, rows, found = read_json(folder / "config.json"), read_rows(folder / "epoch_loss.csv"), read_results(folder)
    curves = image(folder / "epoch_loss.png", "curves") or table(row.items() for row in rows[-5:])
    sections = {
        "What was trained": trained(folder / SUMMARY),
        "What happened": summary(config, rows, read_rows(folder / "speed.csv")),
        "Warnings": warnings(config, rows, found),
        "Settings that differ from train.py's": settings_table(config),
        "Curves": curves and CURVES + curves,
        "Previews": previews(folder),
        "Samples": samples(folder, config) or "<p>None yet: python predict.py</p>",
        "Distances and nearest training images": distances(found) or "<p>None yet: python -m utils.evaluate</p>",
    }
    body = "".join(f"<h2>{title}</h2>{text or '<p>None.</p>'}" for title, text in sections.items())
    return HEAD.format(name=html.escape(folder.resolve().name), style=STYLE, body=body)


def read_rows(path):
    """The rows of a table, {column: number}, up to the first damaged one."""
    rows, damage = [], suppress(OSError, ValueError, TypeError, csv.Error)
    if not path.is_file():  # opening a pipe would wait
        return rows
    with damage, open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            rows.append({name: float(value) for name, value in row.items() if value})
    return rows


def read_results(folder):
    """The numbers of the last evaluation, distances and nearest; {} unless it was of this run."""
    results = read_json(EVALUATION / "evaluate_results.json") or {}
    samples = str(results.get("samples"))  # their name ends with the whole path of the weights
    ours = any(samples.endswith(f", {path}") for path in folder.resolve().glob("*.pth"))
    parts = [results.get(name) for name in ("distances", "nearest") if ours]
    return {name: value for part in parts if isinstance(part, dict) for name, value in part.items()}


def table(rows):
    """An HTML table; "" without rows."""
    lines = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return f"<table><tr>{'</tr><tr>'.join(lines)}</tr></table>" if lines else ""


def image(path, kind="pixels"):
    """A PNG in the page itself; "" where there is none."""
    return f'<p><img class="{kind}" alt="{path.stem}" src="{embedded(path)}"></p>' if path.is_file() else ""


def embedded(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def trained(path):
    """How the run was started, each time: command, images, network, device, versions."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    return f"<pre>{html.escape(text)}</pre>" if text else ""


def summary(config, rows, speed):
    last, seconds = rows[-1] if rows else {}, sum(row.get("seconds", 0) for row in speed)
    lowest = min(((row["val_loss"], row.get("epoch", 0)) for row in rows if "val_loss" in row), default=None)
    shown = {
        "epochs": f"{last.get('epoch', 0):.0f}" + f" of {config.get('epochs')}" * (not config.get("steps")),
        "steps": f"{last.get('step', 0):,.0f}" + f" of about {config.get('steps')}" * bool(config.get("steps")),
        "training time": f"{seconds / 60:.1f} min",
        "loss": f"{last.get('loss', 0):.5g}",
        "images per second": speed[-1].get("images_per_second", "") if speed else "",
        "lowest validation loss": f"{lowest[0]:.5g} after epoch {lowest[1]:.0f}" if lowest else "no val_split",
    }
    return table(shown.items())


def warnings(config, rows, found):
    """What the files show that a user should know, each with its meaning."""
    skipped, steps = sum(row.get("skipped", 0) for row in rows), rows[-1].get("step", 0) if rows else 0
    validated, start = [row["val_loss"] for row in rows if "val_loss" in row], config.get("ema_start")
    names = ("copies", "copies_low", "other_copies", "other_copies_high")
    copies, low, chance, high = (found[name] if isinstance(found.get(name), float) else 0 for name in names)
    texts = {
        f"{skipped:.0f} steps were skipped: their gradients were NaN or infinite. They changed nothing; many of them "
        "call for a lower --init_lr.": skipped,
        f"The EMA starts at step {start}, and the run has {steps:.0f}: the samples are those of the "
        "last weights, which are rougher. Lower --ema_start.": isinstance(start, int) and 0 < steps <= start,
        "The validation loss has risen by more than 2 % above its lowest: the network memorizes the training images. "
        "best.pth has the weights of the lowest.": validated and validated[-1] > 1.02 * min(validated),
        f"{copies:.1%} of the samples are copies of training images, and {chance:.1%} of real images pass for such: "
        "train for fewer epochs, or on more images.": low > high,
    }
    return "".join(f'<p class="warn">{html.escape(text)}</p>' for text, holds in texts.items() if holds)


def settings_table(config):
    """Name, value and train.py's own value, where they differ. Its block is read, not run."""
    nodes = ast.parse(SCRIPT.read_text(encoding="utf-8")).body
    block, rows = next(node for node in nodes if getattr(node, "name", "") == "Config"), []
    for line in (line for line in block.body if isinstance(line, ast.AnnAssign)):
        with suppress(ValueError):  # an expression, like 10 ** 3
            name, default = line.target.id, json.loads(json.dumps(ast.literal_eval(line.value)))  # tuples as lists
            if config.get(name, default) != default:
                rows.append((name, config[name], default))
    return table([("", "this run", "train.py"), *rows] if rows else [])


def previews(folder):
    """The previews behind a slider, every second one left out until they are small enough."""
    found = Path("results/train_out", folder.resolve().name).glob("epoch_*.png")
    shown = sorted((int(path.stem[6:]), path) for path in found if path.stem[6:].isdecimal() and path.is_file())
    while len(shown) > 1 and (len(shown) > MOST_PREVIEWS or sum(p.stat().st_size for _, p in shown) > PREVIEW_BYTES):
        shown = shown[::-1][::2][::-1]  # keeps the last
    frames = [(f"epoch {number:04d}", embedded(path)) for number, path in shown]
    return SLIDER.format(shown=frames[-1], last=len(frames) - 1, frames=json.dumps(frames)) if frames else ""


def samples(folder, config):
    """The grid of the last `python predict.py`, where it is newer than the run's weights."""
    times = [path.stat().st_mtime for path in (folder / "last.pth", GRID) if path.is_file()]
    rows = " A row of each class, by name." if config.get("class_conditional") and not config.get("condition") else ""
    title = f"<p>The last grid of python predict.py, be it of this run or of other weights.{rows}</p>"
    return title + image(GRID) if len(times) == 2 and times[0] <= times[1] else ""


def distances(found):
    """The distances and pairs of `python -m utils.evaluate`, where it measured this run."""
    shown = {name: f"{value:.4g}" if isinstance(value, float) else value for name, value in found.items()}
    rows = [(name, value) for name, value in shown.items() if isinstance(value, (int, str))]
    pairs = EVALUATION / "evaluate_nearest_results.png" if "by" in found else Path()  # of this evaluation
    return table(rows) + image(pairs) if found else ""


if __name__ == "__main__":
    run_script(main)
