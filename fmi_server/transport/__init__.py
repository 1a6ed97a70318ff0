"""gRPC, and nothing else: servicers, handlers, and the mapping of errors to statuses."""
