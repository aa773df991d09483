"""`python -m jaxq`, the same as `jaxq`."""

from jaxq.cli import app

app(prog_name="jaxq")
