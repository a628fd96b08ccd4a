"""What runs things: a benchmark, trainings side by side, the whole comparison. They end in rows, for `report`."""
