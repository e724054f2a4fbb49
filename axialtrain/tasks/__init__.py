"""Target, loss, metrics and pictures of each kind of label: one file a task."""
