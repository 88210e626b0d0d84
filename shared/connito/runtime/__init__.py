"""Basis of every process: settings, logs, metrics, traces, tasks, and its share of the machine."""
