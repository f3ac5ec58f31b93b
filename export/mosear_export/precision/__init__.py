"""Precision: clips balanced over what they bring, NVIDIA's Model Optimizer on them, parity with fp32, sensitivity of layers."""
