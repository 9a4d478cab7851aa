"""What systems share whose network is a copy of the encoder and middle of the base's UNet."""
