"""The HTTP service: app, routes, engine process, jobs, checkpoint registry, metrics, command line."""

__version__ = "0.1.0"
