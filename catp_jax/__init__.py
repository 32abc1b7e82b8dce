"""BLIP-2 and Llama 3.2 Vision in JAX, with visual-token and KV pruning that keeps shapes fixed."""
