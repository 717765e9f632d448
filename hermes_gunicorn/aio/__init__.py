"""Serving on any asyncio loop, uvloop's included."""
