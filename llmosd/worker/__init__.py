"""What runs inside a worker: the host that speaks the bus, and the drivers that speak to engines."""
