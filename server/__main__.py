"""`python -m server` is the `eda` command."""

from server.cli import main

main()
