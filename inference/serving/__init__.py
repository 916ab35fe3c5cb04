"""A model that people and programs talk to: conversations, the OpenAI protocol, a page in the browser."""
