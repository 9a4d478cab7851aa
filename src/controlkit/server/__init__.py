"""HTTP server: A1111's API, OpenAI's images API and one of its own, in front of a queue and one worker process."""
