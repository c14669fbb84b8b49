"""The command line: `jaxq demo | quantize | eval | generate | plan | ...`."""

from jaxq.cli.app import app as app
from jaxq.cli.app import main as main
