"""What a service is made of: the engine over its facts, the runner around it, its gRPC server and certificates."""
