"""The verbs of the ``bdense`` command, those that belong together in one module."""
