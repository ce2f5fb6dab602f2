"""The engine: requests in, audio out, one thread on the device. It knows no HTTP and no text rules."""
