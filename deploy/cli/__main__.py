"""``python -m fedphd.deploy.cli``: the ``fedphd`` command without its script."""

from fedphd.deploy.cli.main import main

main()
