"""Replays long-context prompts against a server, scores the answers, reads its metrics."""
