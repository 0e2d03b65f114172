"""The service: accounts, conversations, an OpenAI-compatible API and what keeps them running (`moss serve`)."""
