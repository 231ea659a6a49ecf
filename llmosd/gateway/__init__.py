"""The OpenAI-compatible HTTP API: a service worker, and an ordinary client of the bus."""
