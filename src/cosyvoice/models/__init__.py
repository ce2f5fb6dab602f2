"""The networks: one tensor in, one out. They know no request, no file format and no clock."""
