"""Sampling under control: the request, the plan, the sampler."""
