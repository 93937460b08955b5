"""Several servers behind Ray Serve: one front that people ask, and replicas that each have a base and adapters."""
