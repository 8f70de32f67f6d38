"""Where it runs: a task with a key and a function, mapped over threads or processes."""
