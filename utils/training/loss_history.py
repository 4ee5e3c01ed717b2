"""What a run has seen: a row an epoch, as CSV, as curves in TensorBoard, and as an image."""

import csv
import math
import os
import time
from contextlib import suppress

from utils.errors import try_optional
from utils.files import atomic_write

SECONDS_BETWEEN_PLOTS = 30


class Table:
    """A CSV file that grows by a row an epoch. Cells are text: reading and writing changes none."""

    def __init__(self, path, rows):
        """rows: [{column: text}], with "epoch" first. The file is written anew with these rows."""
        self.path, self.rows, self.pending = path, rows, []
        self.rewrite()

    def rewrite(self):
        self.columns = list(dict.fromkeys(column for row in (*self.rows, *self.pending) for column in row))
        with atomic_write(self.path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)

    def append(self, row):
        """Adds a row {column: number or None}, and earlier rows that an OSError kept out."""
        self.pending.append(as_text(row))
        if any(column not in self.columns for column in row):
            self.rewrite()
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerows(self.pending)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, size)  # a disk that is full may have taken half a row
            raise
        self.rows, self.pending = self.rows + self.pending, []


def read_table(path, last_epoch):
    """The rows of a table up to an epoch: [{column: text}]. Whatever is no whole row ends it."""
    rows = []
    with suppress(OSError, ValueError, KeyError, csv.Error), open(path, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file, strict=True):
            if None in row.values() or int(row["epoch"]) > last_epoch:
                break
            rows.append(row)
    return rows


def as_text(row):
    """A row of numbers as the cells of a table."""
    return {column: "" if value is None else str(value) for column, value in row.items()}


def earlier_rows(checkpoint, folder):
    """(rows of the losses, rows of the speed) up to the checkpoint, from the tables beside it."""
    if "history" in checkpoint:  # older versions kept the rows in the checkpoint
        return tuple([as_text(row) for row in checkpoint[key]] for key in ("history", "speed"))
    return tuple(read_table(folder / name, checkpoint["position"]["epoch"]) for name in ("epoch_loss.csv", "speed.csv"))


class LossHistory:
    """The tables of a run, and their curves.

    `epoch_loss.csv` has the columns that every repetition of the run gives, `speed.csv` the others.
    """

    def __init__(self, folder, earlier=(), earlier_speed=()):
        """earlier, earlier_speed: rows before the run's position. Later ones in the files go."""
        self.losses = Table(folder / "epoch_loss.csv", list(earlier))
        self.speed = Table(folder / "speed.csv", list(earlier_speed))
        self.folder, self.plotted, self.plotting = folder, 0.0, True
        self.board = try_optional("tensorboard", "no TensorBoard curves are written", self._tensorboard)

    def _tensorboard(self):
        from torch.utils.tensorboard import SummaryWriter

        # Steps behind the position are hidden: the run takes them again.
        purge_step = int(self.losses.rows[-1]["step"]) + 1 if self.losses.rows else 0
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step, flush_secs=30)

    def add(self, row, speed_row):
        """row, speed_row: {column: number or None}, with "epoch" first and "step" in the first."""
        for name, value in {**row, **speed_row}.items():
            if self.board and name not in ("epoch", "step") and value is not None:
                self.board.add_scalar(name, value, row["step"])
        self.losses.append(row)
        self.speed.append(speed_row)

    def lowest(self, column):
        """(value, epoch) of the lowest cell of a loss; infinity and None without any."""
        cells = [(float(row[column]), row["epoch"]) for row in self.losses.rows if row.get(column)]
        return min(cells, default=(math.inf, None))

    def add_image(self, image, step):
        """image: (H, W, C) uint8 array, into TensorBoard."""
        if self.board:
            self.board.add_image("preview", image, step, dataformats="HWC")

    def plot(self, final=False):
        """Draws epoch_loss.png, at most every half minute: it takes longer than a small epoch."""
        due = final or time.monotonic() - self.plotted >= SECONDS_BETWEEN_PLOTS
        if self.plotting and self.losses.rows and due:
            figure = try_optional("matplotlib", "no loss curve is drawn (epoch_loss.csv has the numbers)", self._figure)
            self.plotting, self.plotted = figure is not None, time.monotonic()
            if figure:
                with atomic_write(self.folder / "epoch_loss.png") as file:
                    figure.savefig(file, format="png")

    def _figure(self):
        """The curves as a matplotlib figure."""
        os.environ["MPLBACKEND"] = "agg"  # notebooks hand on one of theirs, which need not exist here
        from matplotlib.backends import backend_agg  # noqa: F401 (savefig needs it: a broken one is met here)
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 9), dpi=100, layout="constrained")
        panels = [["loss", "val_loss"], [name for name in self.losses.columns if name.startswith("loss_t")]]
        panels += [[name] for name in ("grad_norm", "learning_rate", "images_per_second", "memory_mib")]
        for panel, names in zip(figure.subplots(3, 2).flatten(), panels):
            for name in names:
                rows = [row for row in (*self.losses.rows, *self.speed.rows) if row.get(name)]
                if rows:
                    panel.plot([int(row["epoch"]) for row in rows], [float(row[name]) for row in rows], label=name)
            panel.set(xlabel="epoch", yscale="log" if names[0].startswith("loss") else "linear")
            panel.grid(True, alpha=0.3)
            if panel.lines:
                panel.legend()
        return figure

    def close(self):
        self.plot(final=True)
        if self.board:
            self.board.close()
