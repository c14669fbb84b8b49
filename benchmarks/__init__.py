"""What jaxq costs and what it saves: `python -m benchmarks.<name>`."""
