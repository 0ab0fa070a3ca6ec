"""Lets `python -m router` do what the `llamayard` command does."""

from router.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
