"""Tools for tests: a scripted model, and an endpoint on this machine that answers as told."""

from fractal.testing import answers as answers
from fractal.testing._history import check_messages as check_messages
from fractal.testing.endpoint import Endpoint as Endpoint, EndpointError as EndpointError
from fractal.testing.scripted import ScriptedModel as ScriptedModel

__all__ = ["Endpoint", "EndpointError", "ScriptedModel", "answers", "check_messages"]
