"""What operators see: the commands put together, progress, and the doctor."""
