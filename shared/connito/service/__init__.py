"""Parts of a service: the engine over its facts, the runner around it, its gRPC server and certificates."""
