"""Compute what a layout needs before anything starts: degrees, memory, traffic, bubble; no torch."""
