"""Training: the loop, schedules, processes, logs, and how a run starts and resumes."""
