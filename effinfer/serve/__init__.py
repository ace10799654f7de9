"""An OpenAI-compatible HTTP server over the engine."""

from effinfer.serve.app import create_app
from effinfer.serve.model import ServedModel
from effinfer.serve.settings import ServeSettings

__all__ = ["ServeSettings", "ServedModel", "create_app"]
