"""Tokens: tokenizers, ids on disk in every form, their cache, and the engine that writes token shards."""
