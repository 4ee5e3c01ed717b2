"""What a run has seen: a row per epoch as CSV, as curves in TensorBoard, and as an image."""

import csv
import io
import math
import os
import time
from contextlib import suppress
from pathlib import Path

from utils.errors import try_optional
from utils.files import atomic_write

TABLES = ("epoch_loss.csv", "speed.csv")  # what every repetition of the run gives, and the rest
SECONDS_BETWEEN_PLOTS = 30
WHOLE = ("epoch", "step", "best_epoch")  # columns of whole numbers
PANELS = {  # columns of the curves -> the scale of their panel
    ("loss", "val_loss"): "log",
    ("loss_t1", "loss_t2", "loss_t3", "loss_t4"): "log",
    **dict.fromkeys([("grad_norm",), ("learning_rate",), ("images_per_second",), ("memory_mib",)], "linear"),
}


def as_text(row: dict) -> dict:
    return {column: "" if value is None else str(value) for column, value in row.items()}


def read_table(path: Path, last_epoch: int) -> list[dict]:
    """The rows {column: text} of a table up to an epoch, or to the first damaged one."""
    rows = []
    if not os.path.isfile(path):  # opening a pipe would wait
        return rows
    damage = suppress(OSError, ValueError, TypeError, KeyError, csv.Error)
    with damage, open(path, encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file, strict=True):
            numbers = {name: (int if name in WHOLE else float)(cell) for name, cell in row.items() if cell}
            if None in row.values() or numbers["epoch"] > last_epoch:
                break
            rows.append(row)
    return rows


def best_saved(losses: list[dict]) -> tuple[float, int]:
    """(validation loss, epoch) of the weights in best.pth by the rows so far; infinity, 0: none."""
    said = losses[-1].get("best_epoch") if losses else None  # older tables do not say: the lowest
    rows = [row for row in losses if said in (None, row["epoch"])]
    cells = [(float(row.get("val_loss") or math.nan), int(row["epoch"])) for row in rows]
    return min((cell for cell in cells if math.isfinite(cell[0])), default=(math.inf, 0))


class LossHistory:
    """The tables and curves of a run. What TensorBoard or matplotlib raise costs only curves."""

    def __init__(self, folder: Path, losses: list[dict] = (), speed: list[dict] = ()) -> None:
        """losses, speed: rows before the run's position. Later ones in the files go."""
        self.folder, self.losses, self.speed = folder, list(losses), list(speed)
        self.plotted, self.plotting = 0.0, True
        self.write()
        self.board = try_optional("tensorboard", "no TensorBoard curves are written", self._open_board)

    def write(self) -> None:
        """Writes both tables. Rows that an OSError keeps out come with the next."""
        for name, rows in zip(TABLES, (self.losses, self.speed)):
            with atomic_write(self.folder / name, "w", encoding="utf-8", newline="") as file:
                writer = csv.DictWriter(file, dict.fromkeys(column for row in rows for column in row), restval="")
                writer.writeheader()
                writer.writerows(rows)

    def _open_board(self):
        from torch.utils.tensorboard import SummaryWriter

        board = self.folder / "tensorboard"
        if board.is_symlink():  # a folder from someone else cannot redirect a write
            board.unlink()
        purge_step = int(self.losses[-1].get("step") or 0) + 1 if self.losses else 0  # hides steps that come again
        return SummaryWriter(str(board), purge_step=purge_step, flush_secs=30)

    def log(self, method: str, *arguments, **options) -> None:
        """Calls a method of TensorBoard's SummaryWriter, which is dropped where that raises."""
        if self.board:
            call, words = getattr(self.board, method), "no more TensorBoard curves are written"
            self.board = try_optional("tensorboard", words, lambda: call(*arguments, **options) or self.board)

    def add(self, row: dict, speed_row: dict) -> None:
        """row, speed_row: {column: number or None}, with "epoch" first and "step" in the first."""
        self.losses.append(as_text(row))
        self.speed.append(as_text(speed_row))
        self.write()
        for name, value in {**row, **speed_row}.items():
            if name not in WHOLE and value is not None:
                self.log("add_scalar", name, value, row["step"])

    def plot(self, final: bool = False) -> None:
        """Plots epoch_loss.png, at most every half minute: it takes longer than a small epoch."""
        if self.plotting and self.losses and (final or time.monotonic() - self.plotted >= SECONDS_BETWEEN_PLOTS):
            words = "no loss curve is plotted (epoch_loss.csv has the numbers)"
            png, self.plotted = try_optional("matplotlib", words, self._plot), time.monotonic()
            self.plotting = png is not None
            if png:
                with atomic_write(self.folder / "epoch_loss.png") as file:
                    file.write(png)

    def _plot(self):
        os.environ["MPLBACKEND"] = "agg"  # notebooks hand on one of theirs, which need not exist here
        from matplotlib.figure import Figure

        figure, rows = Figure(figsize=(9, 9), layout="constrained"), self.losses + self.speed
        for panel, (names, scale) in zip(figure.subplots(3, 2).flat, PANELS.items()):
            panel.set(xlabel="epoch", yscale=scale)
            panel.grid(True, alpha=0.3)
            for name in names:
                if points := [(int(row["epoch"]), float(row[name])) for row in rows if row.get(name)]:
                    panel.plot(*zip(*points), label=name)
                    panel.legend()
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=100)
        return file.getvalue()

    def close(self) -> None:
        self.plot(final=True)
        self.log("close")
