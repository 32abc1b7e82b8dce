"""From images and prompts to a model's arrays, with the checkpoint's own processor.

One file a model. A reader is all that differs between the models on this side of the compiled
programs; `catp_jax.model` is written against `reading.Reader`.
"""
