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

SECONDS_BETWEEN_PLOTS = 30
WHOLE = ("epoch", "step")  # columns of whole numbers
DAMAGE = (OSError, ValueError, TypeError, KeyError, csv.Error)  # what reading a damaged table raises


class Table:
    """A CSV file that grows by a row {column: text} per epoch, with "epoch" first."""

    def __init__(self, path: Path, rows: list[dict]) -> None:
        self.path, self.rows = path, list(rows)
        self.rewrite()

    def rewrite(self) -> None:
        columns = list(dict.fromkeys(column for row in self.rows for column in row))
        with atomic_write(self.path, "w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        self.columns, self.written = columns, len(self.rows)

    def append(self, row: dict) -> None:
        """Adds a row {column: number or None}. What an OSError keeps out comes with the next."""
        self.rows.append(as_text(row))
        missing = self.rows[self.written :]
        if self.path.is_file() and all(column in self.columns for row in missing for column in row):
            self.write_at_end(missing)
        else:
            self.rewrite()

    def write_at_end(self, rows: list[dict]) -> None:
        size = self.path.stat().st_size
        try:
            with open(self.path, "a", encoding="utf-8", newline="") as file:
                csv.DictWriter(file, self.columns, restval="").writerows(rows)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            os.truncate(self.path, size)  # a disk that is full may have taken half a row
            raise
        self.written = len(self.rows)


def read_table(path: Path, last_epoch: int) -> list[dict]:
    """The rows {column: text} of a table up to an epoch, or to the first damaged one."""
    rows = []
    with suppress(*DAMAGE), open(path, encoding="utf-8", errors="replace", newline="") as file:
        for row in csv.DictReader(file, strict=True):
            numbers = {name: (int if name in WHOLE else float)(cell) for name, cell in row.items() if cell}
            if None in row.values() or numbers["epoch"] > last_epoch:
                break
            rows.append(row)
    return rows


def as_text(row: dict) -> dict:
    return {column: "" if value is None else str(value) for column, value in row.items()}


def read_tables(folder: Path, last_epoch: int) -> tuple[list[dict], list[dict]]:
    """(rows of the losses, rows of the speed) of a run's folder, up to an epoch."""
    return read_table(folder / "epoch_loss.csv", last_epoch), read_table(folder / "speed.csv", last_epoch)


class LossHistory:
    """The tables of a run: `epoch_loss.csv` has what every repetition gives, `speed.csv` the rest.

    Whatever TensorBoard or matplotlib raise costs the run their curves, and nothing else.
    """

    def __init__(self, folder: Path, earlier: list[dict] = (), earlier_speed: list[dict] = ()) -> None:
        """earlier, earlier_speed: rows before the run's position. Later ones in the files go."""
        self.losses, self.speed = Table(folder / "epoch_loss.csv", earlier), Table(folder / "speed.csv", earlier_speed)
        self.folder, self.plotted, self.plotting = folder, 0.0, True
        self.board = try_optional("tensorboard", "no TensorBoard curves are written", self._open_board)

    def _open_board(self):
        from torch.utils.tensorboard import SummaryWriter

        # Steps after the position are hidden: the run repeats them.
        purge_step = int(self.losses.rows[-1].get("step") or 0) + 1 if self.losses.rows else 0
        return SummaryWriter(str(self.folder / "tensorboard"), purge_step=purge_step, flush_secs=30)

    def _log(self, method, *arguments, **options):
        """Calls a method of the SummaryWriter, which is dropped where that raises."""

        def call():
            getattr(self.board, method)(*arguments, **options)
            return self.board

        self.board = self.board and try_optional("tensorboard", "no more TensorBoard curves are written", call)

    def add(self, row: dict, speed_row: dict) -> None:
        """row, speed_row: {column: number or None}, with "epoch" first and "step" in the first."""
        try:
            self.losses.append(row)
        finally:
            self.speed.append(speed_row)
        for name, value in {**row, **speed_row}.items():
            if name not in WHOLE and value is not None:
                self._log("add_scalar", name, value, row["step"])

    def add_image(self, image, step: int) -> None:
        """image: (H, W, C) uint8 array, into TensorBoard."""
        self._log("add_image", "preview", image, step, dataformats="HWC")

    def lowest(self, column: str) -> tuple:
        """(value, epoch) of the lowest cell of a loss; infinity and None without any."""
        cells = [(float(row.get(column) or math.nan), row["epoch"]) for row in self.losses.rows]
        return min((cell for cell in cells if math.isfinite(cell[0])), default=(math.inf, None))

    def plot(self, final: bool = False) -> None:
        """Plots epoch_loss.png, at most every half minute: it takes longer than a small epoch."""
        due = final or time.monotonic() - self.plotted >= SECONDS_BETWEEN_PLOTS
        if self.plotting and self.losses.rows and due:
            png = try_optional("matplotlib", "no loss curve is drawn (epoch_loss.csv has the numbers)", self._png)
            self.plotting, self.plotted = png is not None, time.monotonic()
            if png:
                with atomic_write(self.folder / "epoch_loss.png") as file:
                    file.write(png)

    def _png(self):
        os.environ["MPLBACKEND"] = "agg"  # notebooks hand on one of theirs, which need not exist here
        from matplotlib.figure import Figure

        figure, file = Figure(figsize=(9, 9), layout="constrained"), io.BytesIO()
        rows = self.losses.rows + self.speed.rows
        panels = [["loss", "val_loss"], [name for name in self.losses.columns if name.startswith("loss_t")]]
        panels += [["grad_norm"], ["learning_rate"], ["images_per_second"], ["memory_mib"]]
        for number, (panel, names) in enumerate(zip(figure.subplots(3, 2).flat, panels)):
            panel.set(xlabel="epoch", yscale="log" if number < 2 else "linear")
            panel.grid(True, alpha=0.3)
            for name in names:
                points = [(int(row["epoch"]), float(row[name])) for row in rows if row.get(name)]
                if points:
                    panel.plot(*zip(*points), label=name)
                    panel.legend()
        figure.savefig(file, format="png", dpi=100)
        return file.getvalue()

    def close(self) -> None:
        self.plot(final=True)
        self._log("close")
