"""``python -m eyespot``."""

from eyespot.cli import script

script()
