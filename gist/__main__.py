"""``python -m gist``: the ``gist`` command."""

from gist.cli import main

main()
