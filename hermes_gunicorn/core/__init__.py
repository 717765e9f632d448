"""The decision, the table and one worker's life: standard library only."""
