"""The rules of compaction, and the messages that cross a process: pure, without vLLM and torch."""
