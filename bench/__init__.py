"""How fast is a scan, beside the scripts that people write, on this machine? `make bench` (docs/performance.md)."""
