"""What every process needs: settings, logs, metrics, traces, tasks, and its share of the machine."""
