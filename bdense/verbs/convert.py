"""``bdense convert``: a foreign checkpoint becomes a file of ours."""

import argparse

from bdense.knobs import from_options
from bdense.models import convert as conversion
from bdense.verbs.common import require_file_name
from bdense.verbs.options import ConvertOptions


def convert(options: argparse.Namespace) -> None:
    """Run the verb."""
    own = from_options(ConvertOptions, options)
    require_file_name(own.out)
    for line in conversion.convert(options.source, own.out).lines():
        print(line)
