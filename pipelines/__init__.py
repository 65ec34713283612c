"""How rows and files move: one stage a file; the only place that wires Ray Data and Ray Train."""
