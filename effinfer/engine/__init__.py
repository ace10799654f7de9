"""The engine: continuous and depth-wise batching of requests over one model."""
