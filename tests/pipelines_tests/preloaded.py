"""What a run imports before it begins."""

from pipelines import run, schema, workflow
from pipelines.run import SLOW_IMPORTS

__all__ = ["SLOW_IMPORTS", "run", "schema", "workflow"]
