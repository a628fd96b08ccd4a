"""Our attention in other people's models: transformers (`huggingface`) and plain PyTorch (`multihead`)."""
