"""The implementation of the commands, and what operators see: progress, logs and the doctor."""
