"""Megatron checkpoints: how their tensors hold parts of the model's, on any number of ranks."""
