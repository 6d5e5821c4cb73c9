"""`python -m consumers.cli` is `trading-history`: how its own processes are started."""

from consumers.cli import main

main()
