"""Tools for tests: a scripted model, and an endpoint on this machine that answers as told."""

from fractal.testing import answers as answers
