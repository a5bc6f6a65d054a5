"""KV-cache policies for vLLM: how stored tokens are encoded, kept and read."""
