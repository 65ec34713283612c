"""Where demonstrations come from: files, hub data sets, generated problems; and the layouts of their rows."""
