"""Code for GPUs, written without one."""
