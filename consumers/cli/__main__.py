"""Makes `python -m consumers.cli` the same as `trading-history`; its child processes are started this way."""

from consumers.cli import main

main()
