"""Concurrency that knows no agent: cancellation, threads, tasks and queues, and what a fork does to them."""
