"""From images and prompts to tokens: padding into few shapes, prefill, decoding, sampling."""
