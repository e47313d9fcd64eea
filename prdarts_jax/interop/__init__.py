"""Networks that leave the library or come into it: StableHLO, safetensors, PyTorch."""
