"""What a run has seen: a row an epoch, as CSV, as curves in TensorBoard, and as an image."""
import csv
import time
from pathlib import Path

from utils.files import atomic_write

SECONDS_BETWEEN_PLOTS = 30


class LossHistory:
    """The rows of a run, one an epoch, in memory and in the checkpoint. The files are always written whole.

    `epoch_loss.csv` has the columns that every repetition of the run gives, `speed.csv` the others.
    """

    def __init__(self, folder, rows=(), speed_rows=()):
        """rows, speed_rows: those of the checkpoint. Later rows in the files go: they will come again."""
        self.folder, self.rows, self.speed_rows = Path(folder), list(rows), list(speed_rows)
        self.board, self.plotted = _tensorboard(self.folder, self.rows), 0.0
        self.plotting = True
        self._write_tables()

    def add(self, row, speed_row, step):
        """row, speed_row: {column: number}, with "epoch" first. step: of the whole run so far."""
        self.rows.append(row)
        self.speed_rows.append(speed_row)
        self._write_tables()
        for name, value in {**row, **speed_row}.items():
            if self.board and name not in ("epoch", "step") and value is not None:
                self.board.add_scalar(name, value, step)

    def add_image(self, image, step):
        """image: (H, W, C) uint8 array, into TensorBoard."""
        if self.board:
            self.board.add_image("preview", image, step, dataformats="HWC")

    def _write_tables(self):
        for name, rows in (("epoch_loss.csv", self.rows), ("speed.csv", self.speed_rows)):
            columns = list(dict.fromkeys(column for row in rows for column in row))
            with atomic_write(self.folder / name, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, fieldnames=columns, restval="")
                writer.writeheader()
                writer.writerows(rows)

    def plot(self, final=False):
        """Draw epoch_loss.png, at most every half minute: drawing takes longer than a small epoch."""
        if not self.plotting or not self.rows or (not final and time.monotonic() - self.plotted < SECONDS_BETWEEN_PLOTS):
            return
        try:
            _draw(self.rows, self.speed_rows, self.folder / "epoch_loss.png")
        except ImportError:
            self.plotting = False
            print("no loss curve is drawn: `pip install matplotlib` brings it (epoch_loss.csv has the numbers)")
        self.plotted = time.monotonic()

    def close(self):
        self.plot(final=True)
        if self.board:
            self.board.close()


def _tensorboard(folder, rows):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("no TensorBoard curves are written: `pip install tensorboard` brings them")
        return None
    # Steps behind the restored one are hidden: the run takes them again.
    return SummaryWriter(str(folder / "tensorboard"), purge_step=rows[-1]["step"] + 1 if rows else 0, flush_secs=30)


def _draw(rows, speed_rows, path):
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 9), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(3, 2).flatten().tolist()
    quarters = [name for name in rows[-1] if name.startswith("loss_t")]
    panels = [("loss", "val_loss"), quarters, ("grad_norm",), ("learning_rate",), ("images_per_second",), ("memory_mib",)]
    for panel, names in zip(axes, panels):
        for name in names:
            points = [(row["epoch"], row[name]) for row in (*rows, *speed_rows) if row.get(name) is not None]
            if points:
                panel.plot(*zip(*points), label=name)
        panel.set(xlabel="epoch", yscale="log" if names[0].startswith("loss") else "linear")
        panel.grid(True, alpha=0.3)
        if panel.lines:
            panel.legend()
    with atomic_write(path) as file:
        figure.savefig(file, format="png")
