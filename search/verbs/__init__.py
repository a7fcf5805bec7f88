"""The verbs of the ``bdense-search`` command, those that belong together in one module."""
