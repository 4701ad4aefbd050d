"""`dmr`, or `python -m dmr_pipeline`."""

from dmr_pipeline import interrupts


def main() -> None:
    interrupts.end_at_once()  # the imports take a while
    from dmr_pipeline.cli import app

    try:
        app()
    finally:
        interrupts.ignore()


if __name__ == "__main__":
    main()
