"""The bodies of /generate and /v1: what requests may say and what answers look like."""
