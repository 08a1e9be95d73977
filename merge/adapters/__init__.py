"""Methods whose result is a LoRA adapter, one a file; ``merge lora`` and ``merge extract-lora`` run them."""
