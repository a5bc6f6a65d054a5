"""What kvthrift adds to vLLM's OpenAI server: policies chosen, shown and measured over HTTP."""
