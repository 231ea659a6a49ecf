"""llmosd: an operating system for model workers on Linux."""

__version__ = "0.1.0"
