"""Shared code of systems whose network copies the encoder and middle block of the base's UNet."""
