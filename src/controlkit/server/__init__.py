"""HTTP server: A1111's API, OpenAI's images API and controlkit's own, in front of a queue and one worker process."""
