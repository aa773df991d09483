"""`jaxq` and `python -m jaxq`."""

import gc

from jaxq.cli import app


def main() -> None:
    gc.freeze()  # what is imported by now stays: looking through it for garbage, at exit too, takes a third of a second
    app(prog_name="jaxq")


if __name__ == "__main__":
    main()
