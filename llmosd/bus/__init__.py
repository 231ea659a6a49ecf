"""The daemon's side of the bus: two ROUTER sockets. What their messages mean is the kernel's to say."""
