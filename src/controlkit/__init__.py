"""controlkit: spatial controls for text-to-image diffusion models."""
from controlkit._version import __version__ as __version__
