"""Finetuning: pretrained models taught a text or a chat, by adapters or whole."""
