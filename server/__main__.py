"""``python -m server``: the kvthrift command of exactly this interpreter."""

from server.cli import main

main()
