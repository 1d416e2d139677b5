"""`python -m eda.server` is the `eda` command."""

from eda.server.cli import main

main()
