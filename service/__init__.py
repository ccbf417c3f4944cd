"""The HTTP service: app, routes, engine process, jobs, checkpoint registry, metrics, command line."""
