"""The bar of a training: how far it is, how long it took and will take, and a note on how it goes."""

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


def training_progress(note: str = "{task.fields[note]}") -> Progress:
    """The bar, to be used in a `with`.

    Args:
        note: format of what stands behind the bar, of the task's fields.
    """
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn(note),
    )
