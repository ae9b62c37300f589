"""Worker side: load weights, and say why they were refused."""

from dsv3.config.root import Config
from dsv3.errors import UserError
from dsv3.planning.layout import ParallelDims
from tests.parallel.tiny_training import prepared


def refusal(config: Config, degrees: ParallelDims) -> str:
    """Return the error with which this rank refuses the weights, empty where it loads them."""
    try:
        prepared(config, degrees, "sgd")
    except UserError as error:
        return str(error)
    return ""
