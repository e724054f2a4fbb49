"""Measurements that anybody can repeat, as commands."""
