"""The engine: requests in, audio out, one thread on the device. No HTTP and no text rules."""
