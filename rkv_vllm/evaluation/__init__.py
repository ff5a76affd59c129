"""What compaction costs: measured in the engine, against its own full cache."""
